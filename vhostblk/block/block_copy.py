"""Copying clusters from one node to another, each at most once: the old bytes of a snapshot (block layer row B24.2).

Theory of operation: every cluster is *pending*, *copying*, *done* or *given up*; one byte of an array says which. Who
wants a range copied copies what is pending of it, in runs, and waits for what somebody else copies. A run that fails,
or whose request is cancelled, is pending again: the next one who wants it tries anew. A cluster leaves *done* only to
be *given up*, and nothing leaves that. What reads as zeroes is zeroed in the target and not read.

Where the target's content comes from the source until it is copied (an overlay of it), a reader of the target may be on
its way down to the source: writes to the target are then serialising, so that they wait for it.

Knows nothing about who writes to the source, nor why there is to be a copy.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from vhostblk.block.copy_range import nodes_below
from vhostblk.block.edge import Edge
from vhostblk.block.flags import Req, StatusFlag
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import MAX_BOUNCE, MAX_LENGTH, align_down, align_up
from vhostblk.block.status import status_above
from vhostblk.errors import BlockError, ConfigError

# QEMU's for a target that does not say how it allocates.
DEFAULT_CLUSTER = 65536

PENDING, COPYING, DONE, GIVEN_UP = range(4)
_NOT_COPIED = re.compile(rb"[\0\1]")
_COPIED = re.compile(rb"[\2\3]")
_SAME = tuple(re.compile(rb"[%b]*" % bytes([state])) for state in range(4))
# Bytes of the largest run; who wants part of it waits for all of it.
_MAX_RUN = 64 << 20
# Of one copy; so many runs may hold a buffer at once.
_MAX_BUFFERS = 16
# How far back a run is looked for; larger ones are found in parts.
_MAX_BACK = 65536


def cluster_size_for(target: Edge, least: int = 0) -> int:
    """In which units to copy to this node, in bytes; a power of two.

    Args:
        least: what the user wants at least; a power of two.
    """
    info = target.node.info()
    wanted = max(least, info.cluster_size if info else 0, target.node.limits.request_alignment)
    return max(DEFAULT_CLUSTER, 1 << (wanted - 1).bit_length())


@dataclass(eq=False, slots=True)
class Busy:
    """A range that somebody is at, in bytes, and an event for who waits for its end."""

    start: int
    end: int
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def overlaps(self, start: int, end: int) -> bool:
        """Whether the half-open range touches this one."""
        return start < self.end and self.start < end


async def until_over(busy: list[Busy], start: int, end: int) -> None:
    """Return when nothing in the list touches the range."""
    while (other := next((one for one in busy if one.overlaps(start, end)), None)) is not None:
        await other.over.wait()


class BlockCopy:
    """What has been copied from `source` to `target`, and how more is.

    Args:
        source: CONSISTENT_READ; whoever changes its content, or its length, copies the range first.
        target: WRITE; at least as long.
        cluster_size: bytes, a power of two.

    Raises:
        ConfigError: the node has more clusters than there is memory for.

    Attributes:
        length: bytes of the source when the copy began; what is behind has no copy.

    Context: the control loop.
    """

    def __init__(self, source: Edge, target: Edge, cluster_size: int) -> None:
        self.source = source
        self.target = target
        self.cluster_size = cluster_size
        self.length = source.node.length
        try:
            self._states = bytearray(-(-self.length // cluster_size))
        except (MemoryError, OverflowError):
            raise ConfigError(
                f"Node '{source.node.node_name}' has too many clusters of {cluster_size} bytes to keep account of"
            ) from None
        self._runs: list[Busy] = []
        self._buffers = asyncio.Semaphore(_MAX_BUFFERS)
        self._write_flags = 0
        if nodes_below(source.node) & nodes_below(target.node):
            self._write_flags = int(Req.SERIALISING)

    # ------------------------------------------------------------------ what there is

    def is_copied(self, offset: int, end: int) -> bool:
        """Whether nothing of the range needs to be copied any more."""
        first, last = self._clusters(offset, end)
        return not _NOT_COPIED.search(self._states, first, last)

    def run(self, offset: int, end: int) -> tuple[int, int]:
        """The state at `offset`, which is inside, and the end of the run that has it, at most `end`."""
        first, last = self._clusters(offset, end)
        state = self._states[first]
        return state, min(self._run_end(first, last) * self.cluster_size, end)

    def copied_run(self, offset: int) -> tuple[bool, int, int]:
        """Whether `offset` is copied, and a range around it of which the same is true; what has no copy needs none."""
        states, size = self._states, self.cluster_size
        first = min(offset // size, len(states))
        copied = first == len(states) or states[first] >= DONE
        other = _NOT_COPIED if copied else _COPIED
        match = other.search(states, first)
        end = match.start() * size if match else MAX_LENGTH if copied else len(states) * size
        back = max(0, first - _MAX_BACK)
        match = other.search(states[back:first][::-1])
        return copied, (first - match.start() if match else back) * size, end

    # ------------------------------------------------------------------ copying

    async def copy(
        self, offset: int, end: int, may_go_on: Callable[[], bool] = lambda: True
    ) -> None:
        """Return when every cluster that the range touches is copied, or given up.

        Args:
            may_go_on: asked before each further run; False ends the copy early.

        Raises:
            BlockError: the errno of the source or of the target.
        """
        first, last = self._clusters(offset, end)
        while (match := _NOT_COPIED.search(self._states, first, last)) and may_go_on():
            first = match.start()
            if self._states[first] == COPYING:
                start = first * self.cluster_size
                await until_over(self._runs, start, start + 1)
            else:
                step = max(_MAX_RUN // self.cluster_size, 1)
                await self._copy_run(first, self._run_end(first, min(last, first + step)))

    async def give_up(self, offset: int, end: int) -> None:
        """The whole clusters in the range need not be copied any more, nor kept; the target discards them.

        Raises:
            BlockError: the errno of the target.
        """
        start = align_up(offset, self.cluster_size)
        stop = end if end >= self.length else align_down(end, self.cluster_size)
        await until_over(self._runs, start, stop)
        unneeded = []
        while start < min(stop, self.length):
            state, run_end = self.run(start, stop)
            first, last = self._clusters(start, run_end)
            self._states[first:last] = bytes([GIVEN_UP]) * (last - first)
            if state == DONE:
                unneeded.append((start, min(run_end, self.length) - start))
            start = run_end
        for start, count in unneeded:
            await self.target.pdiscard(start, count)

    async def _copy_run(self, first: int, last: int) -> None:
        start, end = first * self.cluster_size, min(last * self.cluster_size, self.length)
        run = Busy(start, end)
        self._runs.append(run)
        self._states[first:last] = bytes([COPYING]) * (last - first)
        state = PENDING
        try:
            await self._copy_bytes(start, end)
            state = DONE
        finally:
            self._states[first:last] = bytes([state]) * (last - first)
            self._runs.remove(run)
            run.over.set()

    async def _copy_bytes(self, offset: int, end: int) -> None:
        while offset < end:
            zero, count = await self._zeroes(offset, end - offset)
            if zero:
                flags = self._write_flags | Req.MAY_UNMAP
                await self.target.pwrite_zeroes(offset, count, flags)
            else:
                count = min(count, MAX_BOUNCE)
                async with self._buffers:
                    await self._copy_data(offset, count)
            offset += count

    async def _copy_data(self, offset: int, count: int) -> None:
        pool = self.target.node.bounce
        buffer = pool.acquire(count, self.target.node.limits.opt_mem_alignment)
        try:
            content = IoVec([buffer[:count]])
            await self.source.preadv(offset, content)
            await self.target.pwritev(offset, content, self._write_flags)
        finally:
            pool.release(buffer)

    async def _zeroes(self, offset: int, length: int) -> tuple[bool, int]:
        """Whether the source reads as zeroes there, and for how many bytes; who does not know has data."""
        try:
            status = await status_above(self.source.node, None, offset, length)
        except BlockError:
            return False, length
        return bool(status.flags & StatusFlag.ZERO), status.length or length

    # ------------------------------------------------------------------

    def _clusters(self, offset: int, end: int) -> tuple[int, int]:
        return offset // self.cluster_size, min(-(-end // self.cluster_size), len(self._states))

    def _run_end(self, first: int, last: int) -> int:
        match = _SAME[self._states[first]].match(self._states, first, last)
        assert match
        return match.end()
