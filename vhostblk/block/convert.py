"""Copying disks into another one: what `qemu-img convert` does (and a job may).

Theory of operation: the sources are one disk, which `convert_chunks.py` cuts into chunks. Several workers take one
after the other: read, look for zeroes, wait until those before have written (`in_order`), write. So there are as many
buffers as workers, and as many requests in flight. Where both sides may be used past the pipeline
(`extent_io.py`) a chunk has many short runs, which are read at once, and written at once.

What is zeroes is not written to a target that reads as zeroes anyway, and is made zeroes cheaply in one that does not.
What the target's backing file shows is left to it. Chunks are larger than qemu-img's, because each costs us more, but
the target is allocated in the same places, and failures are told of as if they were its: a chunk of several runs that
fails is done once more, run by run.

Context: the control loop. Knows nothing about files, formats and messages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from vhostblk.block.backend import BlockBackend
from vhostblk.block.convert_chunks import Buffer, Chunks, Part
from vhostblk.block.convert_options import (
    LARGEST_BUFFER,
    MOST_WORKERS,
    ConvertOptions,
    Listener,
    What,
)
from vhostblk.block.convert_runs import Kind, Sources
from vhostblk.block.copy_range import copy_range
from vhostblk.block.extent import Writer
from vhostblk.block.extent_io import ExtentIO, Piece
from vhostblk.block.flags import Req
from vhostblk.block.host_io import create_host_io
from vhostblk.block.iov import IoVec
from vhostblk.block.leaky_bucket import ThrottleLimits
from vhostblk.block.limits import SECTOR_SIZE
from vhostblk.block.throttle_group import WRITE, ThrottleGroup
from vhostblk.errors import BlockError

__all__ = [
    "LARGEST_BUFFER",
    "MOST_WORKERS",
    "Conversion",
    "ConvertOptions",
    "Listener",
    "What",
]


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
        self._sources = Sources(sources)
        self._target = target
        self._options = options
        self._listener = listener
        self.total = self._sources.total
        """Bytes of all sources."""
        self._chunks = Chunks(self._sources, target, options, listener)
        self._offloads = options.offload
        self._throttle = (
            ThrottleGroup("convert", ThrottleLimits(bps_write=options.rate))
            if options.rate
            else None
        )
        self._member = self._throttle.join() if self._throttle else None
        self._to_do = self._done = 0
        self._error: BlockError | None = None
        self._claiming = asyncio.Lock()
        self._turn: asyncio.Future[None] | None = None
        # Past the pipeline, while it runs.
        self._readers: list[ExtentIO] = []
        self._writer: ExtentIO | None = None

    async def run(self) -> None:
        """Copy all.

        Raises:
            BlockError: the first failure; the listener knows of all of them. The target is of no use then.
        """
        self._to_do = await self._chunks.count()
        if self._chunks.has_many:
            await self._copy_past()
        else:
            await self._copy_all()
        if self._error is not None:
            raise self._error
        if self._chunks.compressed:
            # Nothing more comes.
            await self._target.pwritev(0, IoVec([]), int(Req.WRITE_COMPRESSED))

    async def _copy_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self._chunks.workers):
                group.create_task(self._work())

    async def _copy_past(self) -> None:
        """The same, past the pipeline where that is possible."""
        io = create_host_io("threads")
        self._readers = [ExtentIO(user, io) for user in self._sources.users]
        writer = Writer.MAKER if self._options.is_new else Writer.ONCE
        self._writer = ExtentIO(self._target, io, writer)
        try:
            await self._copy_all()
        finally:
            for user in (*self._readers, self._writer):
                user.close()
            self._readers, self._writer = [], None
            await io.close()

    # ------------------------------------------------------------------ copying

    async def _work(self) -> None:
        """Chunk after chunk, until there are no more, or anything has failed."""
        buffer = None
        while True:
            async with self._claiming:
                if self._error is not None:
                    return
                try:
                    parts = await self._chunks.claim()
                except BlockError as error:
                    self._error = self._error or error
                    return
                if not parts:
                    return
                before, mine = self._turn, asyncio.get_running_loop().create_future()
                self._turn = mine
            for part in parts:
                if self._chunks.is_copied(part.kind):
                    self._report(part.count)
                    if buffer is None:
                        buffer = Buffer(self._chunks.size, self._chunks.alignment)
            try:
                await self._copy(parts, buffer, before)
            finally:
                if not mine.done():
                    mine.set_result(None)
            # Whoever waits for this turn writes before we read.
            await asyncio.sleep(0)

    async def _copy(
        self, parts: list[Part], buffer: Buffer | None, before: asyncio.Future[None] | None
    ) -> None:
        """Copy a chunk, when those before it are written."""
        offloads = self._offloads and parts[0].kind is Kind.DATA
        if not offloads and buffer is not None and not await self._load(parts, buffer):
            return
        if self._options.in_order and before is not None:
            await before
        if self._error is not None:
            return
        if offloads:
            for part in parts:
                try:
                    await self._copy_range(part.offset, part.count)
                except BlockError:
                    self._offloads = False
                    break
            else:
                return
            assert buffer is not None
            if not await self._load(parts, buffer):
                return
        await self._store(parts, buffer)

    def _report(self, count: int) -> None:
        """So much more is being copied."""
        while count > 0:
            self._done += min(count, self._chunks.step)
            count -= self._chunks.step
            self._listener.progress(self._done / self._to_do)

    # ------------------------------------------------------------------ reading

    async def _load(self, parts: list[Part], buffer: Buffer) -> bool:
        """Have the data in the buffer, if any are needed; False: that has failed."""
        wanted = [part for part in parts if part.kind is Kind.DATA]
        for part in parts:
            if part.kind is not Kind.DATA and self._chunks.is_copied(part.kind):
                IoVec([buffer.view]).zero(part.place, part.count)
        failed = None
        if self._readers:
            try:
                await self._read_past(wanted, buffer)
                return True
            except BlockError as error:
                failed = error  # whose is it?
        for part in wanted:
            try:
                await self._read(part.offset, part.count, buffer, part.place)
            except BlockError as error:
                await self._failed_to_read(part, buffer, error)
                return False
        if failed is not None:
            await self._failed_to_read(wanted[0], buffer, failed)
        return failed is None

    async def _failed_to_read(self, part: Part, buffer: Buffer, error: BlockError) -> None:
        """Say where."""
        self._error = self._error or error
        failed = False
        if part.count > self._chunks.step:
            for at in range(part.offset, part.end, self._chunks.step):
                try:
                    await self._read(at, min(self._chunks.step, part.end - at), buffer, part.place)
                except BlockError as again:
                    self._listener.failed(What.READ, at, again)
                    failed = True
        if not failed:
            self._listener.failed(What.READ, part.offset, error)

    async def _read_past(self, parts: list[Part], buffer: Buffer) -> None:
        """Many at once."""
        wanted: list[list[Piece]] = [[] for _ in self._readers]
        for part in parts:
            offset, place = part.offset, part.place
            while offset < part.end:
                which, start = self._sources.at(offset)
                source = self._sources.users[which]
                count = min(part.end, start + source.length) - offset
                wanted[which].append((offset - start, buffer.view[place : place + count]))
                offset += count
                place += count
        for reader, some in zip(self._readers, wanted, strict=True):
            if some:
                await reader.read(some)

    async def _read(self, offset: int, count: int, buffer: Buffer, place: int) -> None:
        done = 0
        singly_until = 0
        while done < count:
            which, start = self._sources.at(offset + done)
            source, at = self._sources.users[which], offset + done - start
            length = min(count - done, source.length - at)
            if at < singly_until:
                length = SECTOR_SIZE
            part = IoVec([buffer.view[place + done : place + done + length]])
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

    # ------------------------------------------------------------------ writing

    async def _copy_range(self, offset: int, count: int) -> None:
        end = offset + count
        while offset < end:
            which, start = self._sources.at(offset)
            source = self._sources.users[which]
            length = min(end - offset, start + source.length - offset)
            await self._admit(length)
            await copy_range(source.root, offset - start, self._target.root, offset, length, 0)
            offset += length

    async def _store(self, parts: list[Part], buffer: Buffer | None) -> None:
        failed = None
        if self._writer is not None:
            try:
                await self._write_past(self._writer, parts, buffer)
                return
            except BlockError as error:
                failed = error  # whose is it? What can be written once can be written again
        for part in parts:
            try:
                await self._write(part, buffer)
            except BlockError as error:
                await self._failed_to_write(part, buffer, error)
                return
        if failed is not None:
            await self._failed_to_write(parts[0], buffer, failed)

    async def _failed_to_write(self, part: Part, buffer: Buffer | None, error: BlockError) -> None:
        """Say where; what can be written once can be written again."""
        self._error = self._error or error
        offset = part.offset
        if part.count > self._chunks.step and self._chunks.is_copied(part.kind):
            for at in range(offset, part.end, self._chunks.step):
                try:
                    length = min(self._chunks.step, part.end - at)
                    place = part.place + at - part.offset
                    await self._write(Part(at, length, part.kind, place), buffer)
                except BlockError as again:
                    offset, error = at, again
                    break
        self._listener.failed(What.WRITE, offset, error)

    async def _write_past(self, writer: ExtentIO, parts: list[Part], buffer: Buffer | None) -> None:
        """Many at once."""
        wanted: list[Piece] = []
        for part in parts:
            if not self._chunks.is_copied(part.kind):
                await self._write_zeroes(part.offset, part.count)
                continue
            assert buffer is not None
            for offset, view, is_data in self._chunks.pieces(buffer, part):
                if is_data:
                    wanted.append((offset, view))
                else:
                    await self._write_zeroes(offset, len(view))
        if wanted:
            await writer.write(wanted)

    async def _write(self, part: Part, buffer: Buffer | None) -> None:
        if not self._chunks.is_copied(part.kind):
            await self._write_zeroes(part.offset, part.count)
            return
        assert buffer is not None
        flags = int(Req.WRITE_COMPRESSED) if self._chunks.compressed else 0
        for offset, view, is_data in self._chunks.pieces(buffer, part):
            if not is_data:
                await self._write_zeroes(offset, len(view))
                continue
            await self._admit(len(view))
            await self._target.begin_pwritev(offset, IoVec([view]), flags)

    async def _write_zeroes(self, offset: int, count: int) -> None:
        if self._chunks.is_zero:
            return
        await self._admit(count)
        await self._target.pwrite_zeroes(offset, count, may_unmap=True)

    async def _admit(self, count: int) -> None:
        if self._throttle is not None and self._member is not None:
            await self._throttle.admit(self._member, WRITE, count)
