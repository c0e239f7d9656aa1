"""What the disks that are to be copied have where: runs of data, of zeroes, of what the target shows anyway.

Theory of operation: the sources are one disk, one after the other. It is walked twice: once to know how much there is
to copy, and once to copy it; what was learnt is kept in between, as far as memory is not wasted on it.

Context: the control loop. Knows nothing about what is done with runs.
"""

from __future__ import annotations

import enum
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import accumulate

from vhostblk.block.backend import BlockBackend
from vhostblk.block.chain import skip_filters
from vhostblk.block.convert_options import ConvertOptions, Listener, What
from vhostblk.block.flags import StatusFlag
from vhostblk.block.limits import MAX_REQUEST, SECTOR_SIZE, align_down, align_up
from vhostblk.block.node import BlockNode
from vhostblk.block.roles import cow_child
from vhostblk.block.status import status_above, statuses_above
from vhostblk.errors import BlockError

__all__ = ["Kind", "Runs", "Sources"]

# What the first walk has learnt; in runs, 8 bytes each.
_MOST_RUNS = 1 << 20
_ZERO, _DATA = int(StatusFlag.ZERO), int(StatusFlag.DATA)


class Kind(enum.IntEnum):
    """What a run is."""

    DATA = 0
    ZERO = 1
    BACKING = 2  # the target shows the same without us


_KINDS = tuple(Kind)


class Sources:
    """Disks as one, one behind the other.

    Attributes:
        total: bytes of all.
    """

    def __init__(self, users: Sequence[BlockBackend]) -> None:
        self.users = users
        self._ends = list(accumulate(user.length for user in users))
        self.total = self._ends[-1]

    def at(self, offset: int) -> tuple[int, int]:
        """Which of them has this byte of the whole, and where it begins there."""
        which = bisect_right(self._ends, offset)
        return which, self._ends[which - 1] if which else 0


class Runs:
    """What is where, from the beginning to the end, and then once more.

    Args:
        backed: up to where the backing file of a new target shows something; -1: that does not matter.
    """

    def __init__(
        self, sources: Sources, options: ConvertOptions, listener: Listener, backed: int
    ) -> None:
        self._sources = sources
        self._options = options
        self._listener = listener
        self._backed = backed
        self._units = [_unit(source) for source in sources.users]
        self._learnt = array("Q")  # bytes and kind of each, in order
        self._replayed: int | None = None  # how many of them were used again
        # Of the source that was asked last: what is known from here on, as flags and the end in the whole.
        self._known: deque[tuple[int, int]] = deque()

    def rewind(self) -> None:
        """Once more from the beginning."""
        is_known = len(self._learnt) <= _MOST_RUNS and not self._options.salvage
        self._replayed = 0 if is_known else None
        self._known.clear()

    async def next(self, offset: int) -> tuple[int, Kind]:
        """The run at `offset`, which is where the last one has ended: bytes and kind.

        Raises:
            BlockError: the status is not to be had; the listener knows.
        """
        run = self.next_known(offset)
        if run is not None:
            return run
        which, start = self._sources.at(offset)
        flags, count = await self._status(which, start, offset, self._most(offset))
        return self._learn(offset, flags, count)

    def next_known(self, offset: int) -> tuple[int, Kind] | None:
        """The same, if nobody has to be asked."""
        if self._replayed is not None:
            run = self._learnt[self._replayed]
            self._replayed += 1
            kind = run % SECTOR_SIZE
            return run - kind, _KINDS[kind]
        known = self._known
        while known and known[0][1] <= offset:
            known.popleft()
        if not known:
            return None
        flags, end = known[0]
        return self._learn(offset, flags, min(end - offset, self._most(offset)))

    def _most(self, offset: int) -> int:
        """Bytes that may be asked for at once."""
        most = min(self._sources.total - offset, MAX_REQUEST)
        return min(most, self._backed - offset) if offset < self._backed else most

    def _learn(self, offset: int, flags: int, count: int) -> tuple[int, Kind]:
        """The run of which the status is this."""
        which, start = self._sources.at(offset)
        shows_zeroes = 0 <= self._backed <= offset
        count = align_up(count, SECTOR_SIZE)
        # Requests that begin in the middle of a block would have it read twice.
        tail = (offset - start + count) % self._units[which]
        if count > tail:
            count -= tail
        if flags & _ZERO:
            kind = Kind.BACKING if shows_zeroes else Kind.ZERO
        elif flags & _DATA or not self._options.has_backing:
            kind = Kind.DATA
        else:
            kind = Kind.BACKING
        if self._replayed is None and len(self._learnt) <= _MOST_RUNS:
            self._learnt.append(count + kind)
        return count, kind

    async def _status(self, which: int, start: int, offset: int, count: int) -> tuple[int, int]:
        """Flags, and for how many bytes."""
        node = self._sources.users[which].node
        edge = cow_child(skip_filters(node)) if self._options.has_backing else None
        base = edge.node if edge is not None else None
        if self._options.salvage:
            return await self._status_alone(node, base, offset - start, count)
        known = self._known
        known.clear()
        at = offset
        try:
            for flags, length in await statuses_above(
                node, base, at - start, min(count, start + node.length - at)
            ):
                at += length
                if known and known[-1][0] & flags & _ZERO:
                    # Zeroes of several layers are written at once.
                    known.pop()
                known.append((flags, at))
        except BlockError:
            # It may be somewhere else that nobody knows.
            known.clear()
            return await self._status_alone(node, base, offset - start, count)
        flags, end = known[0]
        return flags, min(end - offset, count)

    async def _status_alone(
        self, node: BlockNode, base: BlockNode | None, offset: int, count: int
    ) -> tuple[int, int]:
        while True:
            try:
                status = await status_above(node, base, offset, count)
                return status.flags, status.length
            except BlockError as error:
                if not self._options.salvage:
                    self._listener.failed(What.STATUS, offset, error)
                    raise
                if count <= SECTOR_SIZE:
                    self._listener.lost(What.STATUS, offset, error)
                    return _DATA, SECTOR_SIZE
                count = align_up(-(-count // 4), SECTOR_SIZE)


def _unit(source: BlockBackend) -> int:
    """Bytes that are best read as a whole."""
    info = source.node.info()
    alignment = align_up(source.limits.request_alignment, SECTOR_SIZE)
    return max(alignment, align_down(info.cluster_size, SECTOR_SIZE) if info else 0)
