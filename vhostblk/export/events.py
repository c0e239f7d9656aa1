"""What an export tells whoever manages the daemon, in the words of QEMU's events.

Knows nothing of how it is told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from vhostblk.export.error_policy import Action


@dataclass(frozen=True, slots=True)
class ExportEvent:
    """Attributes:
    export: its id.
    """

    NAME: ClassVar[str]
    export: str


@dataclass(frozen=True, slots=True)
class BlockIOError(ExportEvent):
    """A request of the guest failed, and this is done about it (row B39.4).

    Attributes:
        node_name: what the export served at the time.
        operation: `read` or `write`; everything that is no read is a write.
        nospace: whether for want of room; None if nothing can stop this export.
        reason: for people.
    """

    NAME: ClassVar[str] = "BLOCK_IO_ERROR"
    node_name: str
    operation: str
    action: Action
    nospace: bool | None
    reason: str


@dataclass(frozen=True, slots=True)
class QueuesPaused(ExportEvent):
    """No more requests are taken until a resume; behind the `BlockIOError` that made it so."""

    NAME: ClassVar[str] = "QUEUE_PAUSED"


@dataclass(frozen=True, slots=True)
class QueuesResumed(ExportEvent):
    """Requests are taken again: somebody said so, or those that were waiting had to be reported to the guest."""

    NAME: ClassVar[str] = "QUEUE_RESUMED"


@dataclass(frozen=True, slots=True)
class MediumRemoved(ExportEvent):
    """The export has no disk any more.

    Attributes:
        node_name: what it was.
    """

    NAME: ClassVar[str] = "MEDIUM_REMOVED"
    node_name: str


@dataclass(frozen=True, slots=True)
class MediumInserted(ExportEvent):
    """The export has another disk.

    Attributes:
        node_name: which.
    """

    NAME: ClassVar[str] = "MEDIUM_INSERTED"
    node_name: str


OnEvent = Callable[[ExportEvent], None]
