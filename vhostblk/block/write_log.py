"""What becomes known of the writes to one node: whether anybody wants to see them, that they were, and where.

Block layer rows B16.12, B16.13, B18.7, B24.4 and B29.7. An object of its own, because every write asks for all of it:
CPython remembers at each place in the code where the class that it saw there last has an attribute, and in the path of
requests classes of nodes take turns. Knows nothing about requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vhostblk.block.dirty_map import DirtyMap
    from vhostblk.block.extent import PastWrites
    from vhostblk.block.tracking import RequestTracker


class WriteLog:
    """The writes to one node.

    Attributes:
        may_pass: nobody here forbids writes, or wants to see them.
        generation: grows with every write that may have happened.
        highest: the end of the write that reached furthest, bytes.
        dirty_maps: see `dirty_map.record`.
        tracker: that of the node: others may be in the way.

    Context: the control loop.
    """

    __slots__ = ("dirty_maps", "generation", "highest", "may_pass", "tracker")

    def __init__(self, tracker: RequestTracker) -> None:
        self.tracker = tracker
        self.may_pass = False
        self.generation = 0
        self.highest = 0
        self.dirty_maps: list[DirtyMap] = []

    def wrote(self, offset: int, end: int) -> None:
        """A write has ended: even after a failure, or a veto, a part of it may have been written."""
        self.generation += 1
        if end > self.highest:
            self.highest = end
        if self.dirty_maps:
            self._mark(offset, end - offset)

    def discarded(self, offset: int, length: int) -> None:
        """The same of a discard, which does not count as a write that reaches somewhere."""
        self.generation += 1
        self._mark(offset, length)

    def wrote_past(self, writes: PastWrites) -> None:
        """Somebody above has written through extents."""
        self.generation += writes.count
        self.highest = max(self.highest, writes.highest)
        for offset, length in writes.ranges:
            self._mark(offset, length)

    def _mark(self, offset: int, length: int) -> None:
        for dirty in self.dirty_maps:
            dirty.mark(offset, length)


class Decides:
    """An attribute of a node that decides whether writes may pass: `may_pass` follows it at once."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, node: Any, owner: type) -> Any:
        return getattr(node, self._name)

    def __set__(self, node: Any, value: Any) -> None:
        setattr(node, self._name, value)
        node.review_writes()
