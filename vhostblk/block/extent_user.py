"""What a user of a node may do without asking: extents, flushes, and what becomes known of it afterwards.

The user, an export with its engine, reads and writes by extents and tells the graph later (`collect_writes`). Extents
come back through the edge: `BlockBackend`, which this is a part of.

Context: the control loop. Knows nothing about requests.
"""

from __future__ import annotations

from collections.abc import Callable

from vhostblk.block import pipeline
from vhostblk.block.extent import (
    ExtentFlag,
    FlushTarget,
    HostExtent,
    PastWrites,
    Ranges,
    Writer,
)
from vhostblk.block.node import BlockNode
from vhostblk.block.quiesce import Quiescent

__all__ = ["ExtentUser", "TakeWrites"]

TakeWrites = Callable[[bool], PastWrites]

_MAX_EXTENTS = 256
# A run that is shorter than this part of so many clusters is a short one.
_FEW = 16


class ExtentUser(Quiescent):
    """The part of a user that need not ask for each request.

    Attributes:
        writable: it has the write permission.
        revocations: how often extents were taken back: when something has changed below.
    """

    node: BlockNode
    writable: bool
    revocations: int
    _take_writes: TakeWrites | None

    async def extents(self, offset: int, length: int) -> list[HostExtent]:
        """What may be done alone in and around a range: the whole runs that touch it, in order.

        The answer holds until `revoke` is called; so use it before the next suspension. It ends
        where something may not be done alone, and may be empty.
        """
        found: list[HostExtent] = []
        epoch = self.revocations
        position, end = offset, min(offset + length, self.node.length)
        while position < end and not self.quiesced and len(found) < _MAX_EXTENTS:
            extent = await pipeline.host_extent(self.node, position, end - position)
            if extent is None:
                break
            position = extent.end
            found.append(self._permitted(extent))
        if found and position >= end and not self.quiesced:
            found = await self._with_others(offset, found)
        # A driver that had to wait may have been overtaken; the next miss asks again.
        return found if self.revocations == epoch and not self.quiesced else []

    def _permitted(self, extent: HostExtent) -> HostExtent:
        """As we may use it."""
        if not self.writable or (extent.record and self._take_writes is None):
            return extent.without(ExtentFlag.WRITE)
        return extent

    async def _with_others(self, offset: int, found: list[HostExtent]) -> list[HostExtent]:
        """Where runs are short, those that are near will be asked for, too: a window of them in one go."""
        window = self.node.cluster_size * _MAX_EXTENTS
        start, end = found[0].offset, found[-1].end
        if not window or end - start >= window // _FEW:
            return found
        first = offset // window * window
        last = min(first + window, self.node.length)
        others = await pipeline.host_extents(
            self.node, [run for run in ((first, start), (end, last)) if run[0] < run[1]]
        )
        before = [self._permitted(extent) for extent in others if extent.offset < start]
        after = [self._permitted(extent) for extent in others if extent.offset >= end]
        return before + found + after

    async def extents_of(self, ranges: Ranges) -> list[HostExtent]:
        """What may be done alone in these ranges (in order, apart from each other), as far as anything may: in order,
        maybe more than was asked for. The answer holds like that of `extents`.
        """
        if self.quiesced:
            return []
        epoch = self.revocations
        found = await pipeline.host_extents(self.node, ranges)
        if not found:
            # Who has few and long ones tells of one at a time.
            for start, end in ranges:
                at = max(start, found[-1].end) if found else start
                while at < end and not self.quiesced and len(found) < _MAX_EXTENTS:
                    extent = await pipeline.host_extent(self.node, at, end - at)
                    if extent is None:
                        break
                    found.append(extent)
                    at = extent.end
        if self.revocations != epoch or self.quiesced:
            return []
        return [self._permitted(extent) for extent in found]

    async def prepare_writes(
        self, ranges: Ranges, writer: Writer = Writer.REGULAR
    ) -> list[HostExtent]:
        """What may be written alone in and around these ranges: like `extents`, but the graph does for it what it has
        to do before a first write, for all of them at once. They may be in any order, and touch each other.

        Raises:
            BlockError: one of the writes would fail; which of them is not known.
        """
        if self.quiesced or not self.writable:
            return []
        self.in_flight += 1
        try:
            found, there = await pipeline.prepare_writes(self.node, ranges, writer)
        finally:
            self.leave()
        epoch = self.revocations
        found = [self._permitted(extent) for extent in found]
        reached = 0
        for start, end in sorted(there):
            if reached < end and (more := await self.extents(start, end - start)):
                found += more
                reached = more[-1].end
        return found if self.revocations == epoch and not self.quiesced else []

    def flush_target(self) -> int | FlushTarget:
        """The fd whose fdatasync is a complete flush, `FlushTarget.NOTHING` or `FlushTarget.ASK` (call `flush`).

        May change whenever `revoke` or `revoke_flush` was called, and after `flush_failed`. Only one user may have it:
        the one that writes; where there are several, nobody.
        """
        if self.quiesced or (not self.writable and not self.node.read_only):
            return FlushTarget.ASK
        return FlushTarget.NOTHING if self.node.read_only else pipeline.flush_target(self.node)

    def flush_failed(self, error: int) -> None:
        """Tell the graph that an fdatasync of `flush_target()` failed: later flushes must not succeed by luck.

        Args:
            error: positive errno.
        """
        self.node.flush_failed(error)

    def collect_writes(self, *, ranges: bool) -> None:
        """Tell the graph what was written through extents since it was last told."""
        if self._take_writes is not None:
            writes = self._take_writes(ranges)
            if writes.count or writes.highest or writes.ranges:
                self.node.wrote_past(writes)
