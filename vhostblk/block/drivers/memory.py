"""`memory`: a sparse RAM disk. It is a memfd, so that whoever does file I/O can do its I/O too.

Theory of operation: it is mapped, too, because a system call costs several times as much as to copy a few KiB. But a
page that is not there would come into being by being read, and with no memory left for it the process would die. So a
page is touched only after it was written by system call, which can fail, and until a hole is punched where it is. Pages
that others write, the engine, say, are not known here, which costs time and nothing else.
"""

from __future__ import annotations

import errno
import mmap
import os
from dataclasses import dataclass

from vhostblk.block.drivers import host_file
from vhostblk.block.drivers.posix import PosixNode
from vhostblk.block.eager import DONE, Request
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import SECTOR_SIZE, align_up
from vhostblk.block.node import OpenContext
from vhostblk.block.options import SIZE, NodeOptions, option
from vhostblk.errors import BlockError, ConfigError

# Number of a page, and what rounds up.
_SHIFT = mmap.PAGESIZE.bit_length() - 1
_REST = mmap.PAGESIZE - 1
# More is copied as fast by the kernel, and other threads may run meanwhile.
_COPY = 64 << 10
# Of a larger disk most is a hole.
_MAPPED = 1 << 40
# Pages that are forgotten at a time.
_FORGET = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """Options of the RAM disk."""

    size: int = option(SIZE, about="bytes; rounded up to a multiple of 512", strong=True)


class MemoryNode(PosixNode):
    """A RAM disk; gone when it is closed. What is never written, or is zeroed, takes no memory."""

    driver_name = "memory"
    options_type = MemoryOptions
    options: MemoryOptions

    _mapped = 0  # so many bytes of the file, from its beginning on
    _map: mmap.mmap
    _content: memoryview  # of that: to fill a slice of a mapping itself, the bytes have to be copied first
    _known: mmap.mmap  # for each page of them a byte: 1 if it is there

    async def open(self, context: OpenContext) -> None:
        """Make the memfd.

        Raises:
            ConfigError: the system does not allow a file of this size.
        """
        size = align_up(self.options.size, SECTOR_SIZE)
        self._io = context.host_io(None)
        try:
            self._fd = os.memfd_create(f"vhostblk-{self.node_name}", os.MFD_CLOEXEC)
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise ConfigError(f"Parameter 'size': {size}: {error.strerror}") from None
        self._adopt(host_file.inspect(self._fd, direct=False, writable=not self.read_only))
        self._map_content()

    async def close(self) -> None:
        """It is gone."""
        self._unmap_content()
        await super().close()

    def set_modes(self, common: NodeOptions) -> None:
        """There is no disk that a flush could reach."""
        super().set_modes(common)
        self.no_flush = True

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        """A hole: nobody asks a RAM disk to keep what it frees."""
        if not await self._punch(offset, length):
            raise BlockError(errno.ENOTSUP)

    async def _punch(self, offset: int, length: int) -> bool:
        self._forget(offset, length)
        try:
            return await super()._punch(offset, length)
        finally:
            self._forget(offset, length)  # what was written meanwhile

    async def _truncate_file(self, size: int) -> None:
        self._unmap_content()
        try:
            await super()._truncate_file(size)
        finally:
            self._map_content()

    # ------------------------------------------------------------------ without system calls

    def driver_preadv(self, offset: int, length: int, iov: IoVec) -> Request:
        """Read."""
        end = offset + length
        if (
            0 < iov.piece <= _COPY
            and end <= self._mapped
            and 0 not in self._known[offset >> _SHIFT : end + _REST >> _SHIFT]
        ):
            iov.views[0][:] = self._content[offset:end]
            return DONE
        return super().driver_preadv(offset, length, iov)

    def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> Request:
        """Write."""
        end = offset + length
        if (
            0 < iov.piece <= _COPY
            and end <= self._mapped
            and 0 not in self._known[offset >> _SHIFT : end + _REST >> _SHIFT]
        ):
            self._content[offset:end] = iov.views[0]
            return DONE
        request = super().driver_pwritev(offset, length, iov, flags)
        if request is DONE and end <= self._mapped:
            first, behind = offset >> _SHIFT, end + _REST >> _SHIFT
            self._known[first:behind] = b"\1" * (behind - first)
        return request

    def _map_content(self) -> None:
        """From now on pages may be touched that are known to be there: none, so far."""
        if not 0 < self._size <= _MAPPED:
            return
        try:
            self._map = mmap.mmap(self._fd, self._size)
        except OSError:
            return  # no room among the addresses of this process: everything goes by system call
        self._map.madvise(mmap.MADV_DONTDUMP)
        self._content = memoryview(self._map)
        # As sparse as the disk.
        pages = self._size + _REST >> _SHIFT
        self._known = mmap.mmap(-1, pages, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._mapped = self._size

    def _unmap_content(self) -> None:
        if self._mapped:
            self._mapped = 0
            self._content.release()
            self._map.close()
            self._known.close()

    def _forget(self, offset: int, length: int) -> None:
        """A hole is made here: these pages are not known to be there any more."""
        first, behind = offset >> _SHIFT, min(offset + length, self._mapped) + _REST >> _SHIFT
        for start in range(first, behind, _FORGET):
            count = min(_FORGET, behind - start)
            if self._known.find(b"\1", start, start + count) >= 0:
                self._known[start : start + count] = bytes(count)
