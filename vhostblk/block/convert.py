"""Copying disks into another one: what `qemu-img convert` does (and a job may).

Theory of operation: the sources are one disk, one after the other. A first pass asks for the status of all of it, so
that it is known how much there is to copy; what was learnt is kept, as far as memory is not wasted on it. Then several
workers take chunk after chunk: read, look for zeroes, wait until those before have written (`in_order`), write. So
there are as many buffers as workers, and as many requests in flight.

What is zeroes is not written to a target that reads as zeroes anyway, and is made zeroes cheaply in one that does not.
What the target's backing file shows is left to it. Chunks are larger than qemu-img's, because each costs us more, but
the target is allocated in the same places, and failures are told of as if they were its.

Context: the control loop. Knows nothing about files, formats and messages.
"""

from __future__ import annotations

import asyncio
import enum
import errno
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from vhostblk.block.backend import BlockBackend
from vhostblk.block.chain import skip_filters
from vhostblk.block.copy_range import copy_range
from vhostblk.block.flags import Req, StatusFlag
from vhostblk.block.iov import IoVec, address_of
from vhostblk.block.leaky_bucket import ThrottleLimits
from vhostblk.block.limits import MAX_REQUEST, SECTOR_SIZE, align_down, align_up
from vhostblk.block.roles import cow_child
from vhostblk.block.sparse import is_zero, largest_power_of_two, pieces
from vhostblk.block.status import has_zero_init, status_above
from vhostblk.block.throttle_group import WRITE, ThrottleGroup
from vhostblk.errors import BlockError

LARGEST_BUFFER = 16 << 20
"""Bytes that one worker holds at most; also the largest sensible `min_sparse`."""
MOST_WORKERS = 16
# What qemu-img copies at once: messages and per cents are in these steps.
_STEP = 2 << 20
# What we copy at once, because it costs less; and all that we hold, of several workers.
_CHUNK = 8 << 20
_BUFFERS = 64 << 20
# What the first pass has learnt; in runs, 8 bytes each.
_MOST_RUNS = 1 << 20


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How to copy.

    Attributes:
        min_sparse: zeroes of so many bytes are not written as data; 0: all is written.
        compressed: whole clusters of the target are compressed.
        offload: the storage may copy by itself.
        salvage: what cannot be read is zeroes.
        in_order: the target is written from its beginning to its end.
        workers: chunks that are copied at the same time, at most `MOST_WORKERS`.
        rate: bytes a second that are written; 0: as many as can be.
        is_new: the target was just made.
        has_backing: the target is backed by what the first source is backed by.
        is_zero: the target reads as zeroes, the caller knows.
    """

    min_sparse: int = 4096
    compressed: bool = False
    offload: bool = False
    salvage: bool = False
    in_order: bool = True
    workers: int = 8
    rate: int = 0
    is_new: bool = False
    has_backing: bool = False
    is_zero: bool = False


class What(enum.Enum):
    """What has failed."""

    STATUS = "reading block status"
    READ = "reading"
    WRITE = "writing"


class Listener(Protocol):
    """Who wants to know how it goes."""

    def progress(self, done: float) -> None:
        """How much of the data is being copied, or has been: from 0 to 1."""

    def failed(self, what: What, offset: int, error: BlockError) -> None:
        """It will not succeed; several workers may say so. The offset is one of all sources together."""

    def lost(self, what: What, offset: int, error: BlockError) -> None:
        """A sector cannot be read; the target has zeroes. The offset is one of the source that has it."""


class _Kind(enum.IntEnum):
    DATA = 0
    ZERO = 1
    BACKING = 2  # the target shows the same without us


class _Buffer:
    """Memory of one worker, aligned; the bytearray is for looking into it."""

    def __init__(self, size: int, alignment: int) -> None:
        self.data = bytearray(size + alignment)
        self.start = -address_of(self.data) % alignment
        self.view = memoryview(self.data)[self.start :]

    def part(self, start: int, end: int) -> IoVec:
        return IoVec([self.view[start:end]])


class Conversion:
    """One copy of `sources`, one behind the other, to the beginning of `target`.

    Args:
        target: writable, at least as long as all sources together.

    Raises:
        BlockError: EINVAL: the target has clusters that cannot be written compressed.
    """

    def __init__(
        self,
        sources: Sequence[BlockBackend],
        target: BlockBackend,
        options: ConvertOptions,
        listener: Listener,
    ) -> None:
        self._sources = sources
        self._target = target
        self._options = options
        self._listener = listener
        self._ends = list(accumulate(source.length for source in sources))
        self.total = self._ends[-1]
        """Bytes of all sources."""
        limits, info = target.limits, target.node.info()
        self._cluster = info.cluster_size if info else 0
        self._compressed = options.compressed or bool(info and info.needs_compressed_writes)
        self._step = min(max(_STEP, limits.opt_transfer, limits.pdiscard_alignment), LARGEST_BUFFER)
        self._chunk = self._step
        if self._compressed:
            if not 0 < self._cluster <= self._step:
                raise BlockError(errno.EINVAL, "invalid cluster size")
            self._chunk = align_down(self._step, self._cluster)
            self._step = self._cluster
        elif not (options.salvage or options.rate):
            most = min(_CHUNK, _BUFFERS // options.workers)
            self._chunk = max(self._step, align_down(most, self._step))
        self._block = max(
            largest_power_of_two(options.min_sparse) if options.min_sparse else 0,
            align_up(limits.request_alignment, SECTOR_SIZE),
        )
        self._units = [_unit(source) for source in sources]
        self._backed = self._find_backed()
        self._is_zero = options.is_zero or (
            options.is_new
            and bool(options.min_sparse)
            and not options.has_backing
            and has_zero_init(target.node)
        )
        self._offloads = options.offload
        self._throttle = (
            ThrottleGroup("convert", ThrottleLimits(bps_write=options.rate))
            if options.rate
            else None
        )
        self._member = self._throttle.join() if self._throttle else None
        # The run that is being cut into chunks.
        self._kind = _Kind.DATA
        self._kind_until = 0
        self._runs = array("Q")  # bytes and kind of each, in order
        self._replayed: int | None = None  # how many of them were used again
        self._offset = 0
        self._to_do = self._done = 0
        self._error: BlockError | None = None
        self._claiming = asyncio.Lock()
        self._turn: asyncio.Future[None] | None = None

    def _find_backed(self) -> int:
        """Up to where the backing file of a new target shows something; -1: that does not matter."""
        edge = cow_child(skip_filters(self._target.node))
        if self._options.has_backing and self._options.is_new and edge is not None:
            return edge.node.length
        return -1

    async def run(self) -> None:
        """Copy all.

        Raises:
            BlockError: the first failure; the listener knows of all of them. The target is of no use then.
        """
        offset = 0
        while offset < self.total:
            count = await self._next(offset)
            if self._is_copied(self._kind):
                self._to_do += count
            offset += count
        self._kind_until = 0
        self._replayed = 0 if len(self._runs) <= _MOST_RUNS and not self._options.salvage else None
        async with asyncio.TaskGroup() as group:
            for _ in range(self._options.workers):
                group.create_task(self._work())
        if self._error is not None:
            raise self._error
        if self._compressed:
            # Nothing more comes.
            await self._target.pwritev(0, IoVec([]), int(Req.WRITE_COMPRESSED))

    # ------------------------------------------------------------------ what is where

    def _source_at(self, offset: int) -> tuple[int, int]:
        """Which source has this byte of the whole, and where it begins there."""
        which = bisect_right(self._ends, offset)
        return which, self._ends[which - 1] if which else 0

    def _is_copied(self, kind: _Kind) -> bool:
        return kind is _Kind.DATA or (kind is _Kind.ZERO and not self._options.min_sparse)

    def _needs_nothing(self, kind: _Kind) -> bool:
        """Whether the target is right already."""
        return kind is _Kind.BACKING or (
            kind is _Kind.ZERO and self._is_zero and not self._is_copied(kind)
        )

    async def _next(self, offset: int) -> int:
        """Bytes of the next chunk; what it is is `_kind` then.

        Raises:
            BlockError: the status is not to be had; the listener knows.
        """
        if self._kind_until <= offset:
            if self._replayed is not None:
                run = self._runs[self._replayed]
                self._replayed += 1
            else:
                run = await self._query(offset)
                if len(self._runs) <= _MOST_RUNS:
                    self._runs.append(run)
            self._kind = _Kind(run % SECTOR_SIZE)
            self._kind_until = offset + run - run % SECTOR_SIZE
        count = self._kind_until - offset
        if self._kind is _Kind.DATA:
            count = min(count, self._largest(offset))
        if self._compressed:
            # Only whole clusters can be.
            if count < self._cluster:
                count = min(self._cluster, self.total - offset)
                self._kind = _Kind.DATA
            else:
                count = align_down(count, self._cluster)
        return count

    def _largest(self, offset: int) -> int:
        """Bytes of a chunk; where it matters, zeroes are looked for in the same pieces as by qemu-img."""
        if self._compressed or not self._options.min_sparse:
            return self._chunk
        is_same = not offset % self._block and self._options.min_sparse <= self._block
        return self._chunk if is_same else self._step

    async def _query(self, offset: int) -> int:
        """Bytes of the run at `offset`, plus its kind."""
        which, start = self._source_at(offset)
        count = min(self.total - offset, MAX_REQUEST)
        shows_zeroes = 0 <= self._backed <= offset
        if offset < self._backed:
            count = min(count, self._backed - offset)
        flags, count = await self._status(which, offset - start, count)
        count = align_up(count, SECTOR_SIZE)
        # Requests that begin in the middle of a block would have it read twice.
        tail = (offset - start + count) % self._units[which]
        if count > tail:
            count -= tail
        if flags & StatusFlag.ZERO:
            kind = _Kind.BACKING if shows_zeroes else _Kind.ZERO
        elif flags & StatusFlag.DATA or not self._options.has_backing:
            kind = _Kind.DATA
        else:
            kind = _Kind.BACKING
        return count + kind

    async def _status(self, which: int, offset: int, count: int) -> tuple[int, int]:
        node = self._sources[which].node
        edge = cow_child(skip_filters(node)) if self._options.has_backing else None
        base = edge.node if edge is not None else None
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
                    return StatusFlag.DATA, SECTOR_SIZE
                count = align_up(-(-count // 4), SECTOR_SIZE)

    # ------------------------------------------------------------------ copying

    async def _work(self) -> None:
        """Chunk after chunk, until there are no more, or anything has failed."""
        alignment = max(
            [self._target.limits.opt_mem_alignment]
            + [source.limits.opt_mem_alignment for source in self._sources]
        )
        buffer = None
        while True:
            async with self._claiming:
                if self._error is not None or self._offset >= self.total:
                    return
                offset = self._offset
                try:
                    count = await self._next(offset)
                    while self._needs_nothing(self._kind):
                        self._offset = offset = offset + count
                        if offset >= self.total:
                            return
                        count = await self._next(offset)
                except BlockError as error:
                    self._error = self._error or error
                    return
                kind = self._kind
                if self._is_copied(kind):
                    count = min(count, self._chunk)
                self._offset += count
                before, mine = self._turn, asyncio.get_running_loop().create_future()
                self._turn = mine
            if self._is_copied(kind):
                self._report(count)
                if buffer is None:
                    buffer = _Buffer(self._chunk, alignment)
            try:
                await self._copy(offset, count, kind, buffer, before)
            finally:
                if not mine.done():
                    mine.set_result(None)
            # Whoever waits for this turn writes before we read.
            await asyncio.sleep(0)

    async def _copy(
        self,
        offset: int,
        count: int,
        kind: _Kind,
        buffer: _Buffer | None,
        before: asyncio.Future[None] | None,
    ) -> None:
        """Copy a chunk, when those before it are written."""
        offloads = self._offloads and kind is _Kind.DATA
        if (
            not offloads
            and buffer is not None
            and not await self._load(offset, count, kind, buffer)
        ):
            return
        if self._options.in_order and before is not None:
            await before
        if self._error is not None:
            return
        try:
            if offloads:
                try:
                    await self._copy_range(offset, count)
                    return
                except BlockError:
                    self._offloads = False
                assert buffer is not None
                if not await self._load(offset, count, kind, buffer):
                    return
            await self._write(offset, count, kind, buffer)
        except BlockError as error:
            await self._failed_to_write(offset, count, kind, buffer, error)

    def _report(self, count: int) -> None:
        """So much more is being copied."""
        while count > 0:
            self._done += min(count, self._step)
            count -= self._step
            self._listener.progress(self._done / self._to_do)

    async def _failed_to_read(
        self, offset: int, count: int, buffer: _Buffer, error: BlockError
    ) -> None:
        """Say where."""
        self._error = self._error or error
        failed = False
        if count > self._step:
            for at in range(offset, offset + count, self._step):
                try:
                    await self._read(at, min(self._step, offset + count - at), buffer)
                except BlockError as again:
                    self._listener.failed(What.READ, at, again)
                    failed = True
        if not failed:
            self._listener.failed(What.READ, offset, error)

    async def _failed_to_write(
        self, offset: int, count: int, kind: _Kind, buffer: _Buffer | None, error: BlockError
    ) -> None:
        """Say where; what can be written once can be written again."""
        self._error = self._error or error
        if count > self._step and self._is_copied(kind):
            for at in range(offset, offset + count, self._step):
                try:
                    length = min(self._step, offset + count - at)
                    await self._write(at, length, kind, buffer, at - offset)
                except BlockError as again:
                    offset, error = at, again
                    break
        self._listener.failed(What.WRITE, offset, error)

    async def _load(self, offset: int, count: int, kind: _Kind, buffer: _Buffer) -> bool:
        """Have the data in the buffer, if any are needed; False: that has failed."""
        if kind is _Kind.DATA:
            try:
                await self._read(offset, count, buffer)
            except BlockError as error:
                await self._failed_to_read(offset, count, buffer, error)
                return False
        elif self._is_copied(kind):
            buffer.part(0, count).zero(0, count)
        return True

    async def _read(self, offset: int, count: int, buffer: _Buffer) -> None:
        done = 0
        singly_until = 0
        while done < count:
            which, start = self._source_at(offset + done)
            source, at = self._sources[which], offset + done - start
            length = min(count - done, source.length - at)
            if at < singly_until:
                length = SECTOR_SIZE
            part = buffer.part(done, done + length)
            try:
                await source.begin_preadv(at, part)
            except BlockError as error:
                if not self._options.salvage:
                    raise
                if length > SECTOR_SIZE:
                    singly_until = at + length
                    continue
                self._listener.lost(What.READ, at, error)
                part.zero(0, length)
            done += length

    async def _copy_range(self, offset: int, count: int) -> None:
        end = offset + count
        while offset < end:
            which, start = self._source_at(offset)
            source = self._sources[which]
            length = min(end - offset, start + source.length - offset)
            await self._admit(length)
            await copy_range(source.root, offset - start, self._target.root, offset, length, 0)
            offset += length

    async def _write(
        self, offset: int, count: int, kind: _Kind, buffer: _Buffer | None, skip: int = 0
    ) -> None:
        """Write what the buffer has behind the first `skip` bytes."""
        if kind is _Kind.BACKING:
            return
        if not self._is_copied(kind):
            await self._write_zeroes(offset, count)
            return
        assert buffer is not None
        first = buffer.start
        for start, end, is_data in self._pieces(buffer, skip, count, offset):
            at = offset + start - first - skip
            if not is_data:
                await self._write_zeroes(at, end - start)
                continue
            await self._admit(end - start)
            part = buffer.part(start - first, end - first)
            flags = int(Req.WRITE_COMPRESSED) if self._compressed else 0
            await self._target.begin_pwritev(at, part, flags)

    def _pieces(
        self, buffer: _Buffer, skip: int, count: int, offset: int
    ) -> list[tuple[int, int, bool]]:
        """Begin and end in the bytes of the buffer, and whether it is worth writing."""
        start = buffer.start + skip
        end = start + count
        if not self._options.min_sparse:
            return [(start, end, True)]
        if not self._compressed:
            least = self._options.min_sparse
            return list(pieces(buffer.data, start, end, offset, self._block, least))
        # A cluster is zeroes as a whole, or it is written as a whole.
        found: list[tuple[int, int, bool]] = []
        for at in range(start, end, self._cluster):
            stop = min(at + self._cluster, end)
            is_data = not is_zero(buffer.data, at, stop)
            if found and found[-1][2] == is_data:
                found[-1] = found[-1][0], stop, is_data
            else:
                found.append((at, stop, is_data))
        return found

    async def _write_zeroes(self, offset: int, count: int) -> None:
        if self._is_zero:
            return
        await self._admit(count)
        await self._target.pwrite_zeroes(offset, count, may_unmap=True)

    async def _admit(self, count: int) -> None:
        if self._throttle is not None and self._member is not None:
            await self._throttle.admit(self._member, WRITE, count)


def _unit(source: BlockBackend) -> int:
    """Bytes that are best read as a whole."""
    info = source.node.info()
    alignment = align_up(source.limits.request_alignment, SECTOR_SIZE)
    return max(alignment, align_down(info.cluster_size, SECTOR_SIZE) if info else 0)
