"""What a check is: a small function with an id, a title, the section it enforces, and what it needs.

A module of checks decorates its functions with `check`, which makes each of them a `Check`, and ends
with `CHECKS = collect(globals())`. A check that returns has passed; the string it may return is a
detail for people. Where the specifications leave a choice, a check accepts every choice, and its
detail says which one was found.

Knows nothing of what is checked.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vhostblk.errors import VhostBlkError
from vhostblk.vhost.message import ProtocolFeature

if TYPE_CHECKING:
    from vhostblk.client.conformance.rig import Rig

__all__ = [
    "Check",
    "CheckFailedError",
    "Level",
    "NotApplicableError",
    "check",
    "collect",
    "expect",
    "skip",
]


class Level(enum.Enum):
    """How much a specification demands it."""

    MUST = "MUST"
    SHOULD = "SHOULD"


class CheckFailedError(VhostBlkError):
    """The back-end did not do what the check demands; the message says what was found."""


class NotApplicableError(VhostBlkError):
    """The check finds that this back-end gives it nothing to look at; the message says why."""


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the registry."""

    id: str
    """`area.name`."""
    title: str
    """What is so when it passes."""
    spec: str
    """The section that says so."""
    run: Callable[[Rig], str | None]
    level: Level = Level.MUST
    features: int = 0
    """Virtio features without which there is nothing to check."""
    without: int = 0
    """Virtio features with which there is nothing to check."""
    protocol: ProtocolFeature = ProtocolFeature.NONE
    """Protocol features without which there is nothing to check."""
    queues: int = 1
    """Queues it takes."""
    writes: bool = False
    """It changes what is on the disk, or would if the back-end were wrong."""
    hostile: bool = False
    """It breaks the rules on purpose; the back-end is looked at afterwards."""

    @property
    def area(self) -> str:
        """What the id begins with."""
        return self.id.partition(".")[0]


def check(
    id: str,  # noqa: A002 - the column's name
    title: str,
    spec: str,
    **columns: Any,
) -> Callable[[Callable[[Rig], str | None]], Check]:
    """Turn a function into a `Check`.

    Args:
        id, title, spec: see `Check`.
        columns: the others of `Check`.
    """
    return lambda run: Check(id, title, spec, run, **columns)


def collect(names: Mapping[str, object]) -> tuple[Check, ...]:
    """Give the checks of a module, in the order of their definition: those among its `globals()`."""
    return tuple(value for value in names.values() if isinstance(value, Check))


def expect(condition: object, found: str) -> None:
    """Fail the check unless `condition` holds.

    Raises:
        CheckFailedError: it does not; `found` says what was found instead.
    """
    if not condition:
        raise CheckFailedError(found)


def skip(reason: str) -> None:
    """End the check without a verdict.

    Raises:
        NotApplicableError: always.
    """
    raise NotApplicableError(reason)
