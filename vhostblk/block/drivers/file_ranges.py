"""Ranges of an open host file: zeroes, holes, and where they are.

What the file system cannot do is found out by trying, and remembered. So is the range of data that was found last: to
find the end of it a file system may have to look at every page of what has not been written back. Whatever makes holes
through this node ends that; to take somebody else's hole for data does no harm.

Knows nothing about reads and writes of data, which are in `posix.py`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, TypeVar

from vhostblk.block.drivers import host_file
from vhostblk.block.flags import StatusFlag
from vhostblk.block.host_io import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    HostIO,
    fallocate,
)
from vhostblk.block.node import BlockNode, Req
from vhostblk.block.status import BlockStatus, StatusRun, StatusRuns
from vhostblk.errors import BlockError

T = TypeVar("T")

_MAY_UNMAP = int(Req.MAY_UNMAP)

_IS_DATA = int(StatusFlag.DATA | StatusFlag.OFFSET_VALID)
_IS_ZERO = int(StatusFlag.ZERO | StatusFlag.OFFSET_VALID)

_PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_ZERO = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
_ALLOCATE = FALLOC_FL_KEEP_SIZE

# A kernel, file system or device that does not have an operation says one of these.
_MISSING = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY)
# Runs of data and of holes that are asked for at once.
_MOST_RUNS = 512
# Freeing so much memory at once is not noticed; more is given to a thread.
_INLINE_FALLOCATE = 1 << 20


class FileRanges(BlockNode):
    """The part of `PosixNode` that is about ranges."""

    supported_zero_flags = _MAY_UNMAP | int(Req.NO_FALLBACK)

    _fd: int
    _io: HostIO
    _file: host_file.HostFile
    _size: int
    _inline: bool
    _writes_inline: bool
    _has_punch = True
    _has_zero_range = True
    _has_allocate = True
    # Known to be data, and how often there may have been new holes.
    _data_start = _data_end = 0
    _changes = 0

    def _check_presence(self) -> None:
        """Whether there still is such a device.

        Raises:
            BlockError: EIO.
        """

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        """Holes if they are allowed, else a zero-range, else a hole that is allocated again; else ENOTSUP."""
        if self._file.is_device:
            await self._zero_device(offset, length, flags)
            return
        if not (flags & _MAY_UNMAP and await self._punch(offset, length)):
            if self._has_zero_range:
                grows = offset + length > self._size
                mode = FALLOC_FL_ZERO_RANGE if grows else _ZERO
                self._has_zero_range = await self._fallocate(mode, offset, length)
                if self._has_zero_range:
                    self._size = max(self._size, offset + length)
            if not self._has_zero_range:
                if not (self._has_allocate and await self._punch(offset, length)):
                    raise BlockError(errno.ENOTSUP)
                self._has_allocate = await self._fallocate(_ALLOCATE, offset, length)
                if not self._has_allocate:
                    raise BlockError(errno.ENOTSUP)
        end = offset + length
        if end > self._size:
            # Not ftruncate: another write may have made the file longer meanwhile.
            if not await self._fallocate(0, end - 1, 1):
                raise BlockError(errno.ENOTSUP)
            self._size = max(self._size, end)

    async def _zero_device(self, offset: int, length: int, flags: int) -> None:
        if (offset | length) % self._file.sizes.logical:
            raise BlockError(errno.ENOTSUP)
        # Unlike BLKDISCARD, a hole in a device is one that reads as zeroes.
        if flags & _MAY_UNMAP and await self._punch(offset, length):
            return
        if not self._has_zero_range or not await self._device_range(
            host_file.BLKZEROOUT, offset, length
        ):
            self._has_zero_range = False
            raise BlockError(errno.ENOTSUP)

    async def driver_pdiscard(self, offset: int, length: int) -> None:
        """Punch a hole, or tell the device."""
        if not self._file.is_device:
            done = await self._punch(offset, length)
        elif (offset | length) % self._file.sizes.logical:
            done = False
        else:
            done = await self._device_range(host_file.BLKDISCARD, offset, length)
        if not done:
            raise BlockError(errno.ENOTSUP)

    async def driver_block_status(self, offset: int, length: int, precise: bool) -> BlockStatus:
        """Where the file has holes (SEEK_DATA, SEEK_HOLE); all of it is data where only allocation matters."""
        if not precise:
            return BlockStatus(_IS_DATA, length, map=offset)
        ((flags, count, place),) = await self._runs(offset, length, most=1)
        return BlockStatus(flags, count, self, place)

    async def driver_block_statuses(self, offset: int, length: int) -> StatusRuns:
        """The same for many runs, with one visit to a thread."""
        return StatusRuns(await self._runs(offset, length, most=_MOST_RUNS), self)

    async def _runs(self, offset: int, length: int, most: int) -> list[StatusRun]:
        self._check_presence()
        if self._data_start <= offset < self._data_end:
            return [(_IS_DATA, min(length, self._data_end - offset), offset)]
        where = offset, length, self.limits.request_alignment, most
        changes, end = self._changes, offset + length
        if self._inline:
            runs = host_file.find_runs(self._fd, *where)
        else:
            runs = await self._call(host_file.find_runs, *where)
        found: list[StatusRun] = []
        for is_data, count in runs:
            if is_data and changes == self._changes:
                self._data_start, self._data_end = offset, offset + count
            found.append((_IS_DATA if is_data else _IS_ZERO, min(count, end - offset), offset))
            offset += count
        return found

    def _changed_ranges(self) -> None:
        """There may be holes where there were data."""
        self._data_start = self._data_end = 0
        self._changes += 1

    def has_zero_init(self) -> bool:
        """What a file grows by reads as zeroes; a device has whatever was on it."""
        return not self._file.is_device

    def can_discard(self) -> bool:
        """As probed when the file was opened."""
        return self._file.can_discard

    async def _punch(self, offset: int, length: int) -> bool:
        if self._has_punch:
            self._has_punch = await self._fallocate(_PUNCH, offset, length)
        return self._has_punch

    async def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """fallocate; False if the file system does not have it."""
        self._check_presence()
        try:
            if self._writes_inline and length <= _INLINE_FALLOCATE:
                fallocate(self._fd, mode, offset, length)
            else:
                await self._io.fallocate(self._fd, mode, offset, length)
        except BlockError as error:
            if error.errno in _MISSING:
                return False
            raise
        finally:
            self._changed_ranges()
        return True

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Have a thread do something that may wait for the file, which it is given first."""
        return await self._io.call(function, self._fd, *arguments, file=self._fd)

    async def _device_range(self, request: int, offset: int, length: int) -> bool:
        self._check_presence()
        try:
            await self._call(host_file.device_range, request, offset, length)
        except BlockError as error:
            if error.errno in _MISSING:
                return False
            raise
        finally:
            self._changed_ranges()
        return True
