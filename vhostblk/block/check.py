"""Is an image whole? (block layer rows B35.9 and B35.10)

What a check finds, and the one entry point for it. What "whole" means, and what can be repaired, is the driver's
business. Knows nothing about formats.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import field

from vhostblk.block import pipeline
from vhostblk.block.flags import CheckMode
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.no_medium import NoMediumNode
from vhostblk.block.node import BlockNode
from vhostblk.block.quiesce import drained
from vhostblk.errors import BlockError

NO_FIX = CheckMode(0)
_MOST_MESSAGES = 200


@lean_dataclass(slots=True)
class CheckResult:
    """What a check has found (row B35.10), and repaired. What was repaired counts as `fixed` only.

    Attributes:
        corruptions: what is wrong, and may cost data.
        leaks: clusters that nobody uses, and nobody can.
        check_errors: what could not be looked at, or not be repaired; the other numbers are not all there is then.
        image_end_offset: the end of what is in use, in bytes of the file; 0: not known.
        total_clusters, allocated_clusters, compressed_clusters: of the disk.
        fragmented_clusters: allocated ones that are not behind the one before.
        failure: why the check was given up, as an errno; 0: it was not, and all of the image was looked at.
        messages: one line for each finding, as far as they are kept.
        more_messages: how many were not.
        tell: called with each, also with those that are not kept.
        report: the same, for those that QEMU's tools begin with their name.
    """

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    image_end_offset: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    compressed_clusters: int = 0
    fragmented_clusters: int = 0
    failure: int = 0
    messages: list[str] = field(default_factory=list)
    more_messages: int = 0
    tell: Callable[[str], None] | None = None
    report: Callable[[str], None] | None = None

    def say(self, message: str) -> None:
        """One more line of what is found, or done about it: what QEMU's tools print."""
        self._keep(message, self.tell)

    def complain(self, message: str) -> None:
        """The same, of why there is no check."""
        self._keep(message, self.report or self.tell)

    def _keep(self, message: str, tell: Callable[[str], None] | None) -> None:
        if tell is not None:
            tell(message)
        if len(self.messages) < _MOST_MESSAGES:
            self.messages.append(message)
        else:
            self.more_messages += 1

    def summary(self) -> str:
        """What was done, for logs."""
        return f"{self.corruptions_fixed} errors and {self.leaks_fixed} leaked clusters repaired"

    @property
    def is_clean_but_for_leaks(self) -> bool:
        """Whether nothing is wrong that may cost data, or is not any more."""
        return not (self.corruptions or self.check_errors)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong, or is not any more."""
        return not (self.corruptions or self.leaks or self.check_errors)


async def check(
    node: BlockNode,
    fix: CheckMode = NO_FIX,
    tell: Callable[[str], None] | None = None,
    report: Callable[[str], None] | None = None,
) -> CheckResult:
    """Look through the image of a node, while nobody uses it, and repair what can be.

    Must not be awaited by a request.

    Args:
        fix: what to repair.
        tell: called with each message, as it comes.
        report: called instead with those that QEMU's tools begin with their name.

    Returns: what was found; that this returns means that the check ran, not that all is well.

    Raises:
        BlockError: ENOMEDIUM: there is no image; ENOTSUP: its driver cannot check; EACCES: to be repaired, but not open
            for writing; the children's errnos.
    """
    if isinstance(node, NoMediumNode):
        raise BlockError(errno.ENOMEDIUM)
    if fix and (node.read_only or node.inactive):
        raise BlockError(errno.EACCES, f"{node.node_name}: not open for writing")
    async with drained(node):
        if not node.read_only and not node.inactive and not node.for_check:
            await pipeline.flush(node)
        result = CheckResult(tell=tell, report=report)
        await node.driver_check(fix, result)
        return result
