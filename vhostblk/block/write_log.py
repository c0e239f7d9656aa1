"""What becomes known of the writes to one node: that they were, and where.

Block layer rows B16.12, B16.13, B18.7, B24.4 and B29.7. Knows nothing about requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vhostblk.block.dirty_map import DirtyMap
    from vhostblk.block.extent import PastWrites


class WriteLog:
    """The writes to one node.

    Attributes:
        generation: grows with every write that may have happened.
        highest: the end of the write that reached furthest, bytes.
        dirty_maps: see `dirty_map.record`.

    Context: the control loop.
    """

    __slots__ = ("dirty_maps", "generation", "highest")

    def __init__(self) -> None:
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
