"""A node whose bytes are those of an open host file: requests, flushes, extents; its length.

Reads that the page cache can serve, and everything on tmpfs, are done at once in the control loop;
the rest goes to `host_io.py`. Zeroes and holes are in `file_ranges.py`.

The end of a file is where the kernel said it was: `length` is that rounded up to whole sectors, the
rest of the last sector reads as zeroes, and a read that comes back short before the end means that
somebody has cut the file: EIO. A device that has been removed keeps its length, because nothing has
become of the disk that its users could follow; every request fails with EIO, whatever the kernel
would say of it (ENOSPC to writes, which may pause a guest until there is room).

Knows nothing about how the file was opened, nor about locks.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os

from vhostblk.block.copy_range import copy_range_to
from vhostblk.block.driver import NodeInfo
from vhostblk.block.drivers import host_file
from vhostblk.block.drivers.file_ranges import FileRanges
from vhostblk.block.eager import DONE, Request
from vhostblk.block.flags import Preallocation
from vhostblk.block.host_io import HostIO, block_error, read_all, write_all
from vhostblk.block.host_needs import HostNeeds
from vhostblk.block.iov import IoVec
from vhostblk.block.length import has_become
from vhostblk.block.limits import SECTOR_SIZE, align_down, align_up
from vhostblk.block.node import BlockNode, ExtentFlag, FlushTarget, HostExtent, Req
from vhostblk.errors import BlockError

log = logging.getLogger(__name__)

_FUA = int(Req.FUA)

_NO_NOWAIT = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
# Copying so many bytes takes longer than waking a thread that does it while the loop goes on.
_LARGE = 2 << 20


class PosixNode(FileRanges):
    """Base of the nodes that are a file. `open()` of the derived class sets `_fd` and `_io`, then calls `_adopt()`.

    Owns: the fd.
    """

    is_protocol = True

    _fd = -1
    _io: HostIO
    _file: host_file.HostFile
    _size = 0  # bytes of content, which `length` rounds up
    _direct = False  # O_DIRECT
    _pool = False  # aio=threads
    _inline = False  # nothing ever blocks
    _writes_inline = False  # nor do writes and the like, or nobody else has to go on meanwhile
    _at_once: int | None = None  # flags of a read that does not wait; None: reads do
    _is_removed = False
    # After a failed fdatasync the kernel forgets which pages were lost, and the next one succeeds.
    # Ours must not.
    _flush_error = 0
    _flushing = False  # an fdatasync of ours is in flight, or about to begin

    def _adopt(self, file: host_file.HostFile) -> None:
        """Serve this file, opened as `_fd`."""
        self._file = file
        self._size = file.size
        self.length = align_up(file.size, SECTOR_SIZE)
        self.block_sizes = file.sizes
        self.device_number = file.device
        self._inline = file.in_memory
        self._writes_inline = file.in_memory or (self._io.may_block and not self._direct)
        # Where there is writeback RWF_DSYNC may take the error of a write that another flush would have to tell of, so
        # there a durable write is one with a flush behind it: see `driver_flush_to_disk`.
        self.supported_write_flags = _FUA if self._direct else 0
        self._at_once = None if self._direct else 0 if file.in_memory else os.RWF_NOWAIT
        self._has_punch = file.can_discard
        self._changed_ranges()

    async def close(self) -> None:
        """Close the file, which drops the locks."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            await self._io.call(os.close, fd)

    def host_needs(self) -> HostNeeds:
        """The file, for reopening it with other flags."""
        return HostNeeds(files=(self._fd,) if self._fd >= 0 else ())

    def refresh_limits(self) -> None:
        """Alignments as probed; devices also want whole blocks for zeroes and discards."""
        file, limits = self._file, self.limits
        limits.request_alignment = file.request_alignment
        limits.min_mem_alignment = file.memory_alignment
        limits.opt_mem_alignment = max(limits.opt_mem_alignment, file.memory_alignment)
        if file.is_device:
            limits.pwrite_zeroes_alignment = file.sizes.logical
            limits.pdiscard_alignment = file.sizes.logical

    async def refresh_length(self) -> None:
        """Ask the kernel.

        Raises:
            BlockError: it does not say.
        """
        if self._is_removed:
            return
        while True:
            before = self._size
            try:
                size, is_there = await self._call(host_file.look)
            except OSError as error:
                raise block_error(error) from None
            if self._size == before:
                break
            # A write of ours has made it longer meanwhile; the answer may be from before that.
        if not is_there:
            await self._lose_device()
            return
        self._size = size
        await has_become(self, align_up(size, SECTOR_SIZE))

    async def _lose_device(self) -> None:
        if self._is_removed:
            return  # somebody else has looked at the same time
        self._is_removed = True
        self._at_once = None
        log.error("%s: the device has been removed: requests fail from now on", self.node_name)
        await self.revoke(0, self.length)
        await self.revoke_flush()

    def _check_presence(self) -> None:
        if self._is_removed:
            raise BlockError(errno.EIO, f"{self.node_name}: the device has been removed")

    # ------------------------------------------------------------------ requests

    def driver_preadv(self, offset: int, length: int, iov: IoVec) -> Request:
        """Read; zeroes behind the end of the content, EIO if the content ends early."""
        got = 0
        if self._at_once is not None:
            if length >= _LARGE:
                return self._read_large(offset, length, iov)
            try:
                got = os.preadv(self._fd, iov.views, offset, self._at_once)
            except OSError as error:
                self._not_at_once(error)
        return DONE if got == length else self._read_rest(offset, length, iov, got)

    async def _read_large(self, offset: int, length: int, iov: IoVec) -> None:
        # Not by io_uring, which would copy what is in the page cache before it returns to us.
        got = await self._call(read_all, offset, iov)
        if got < length:
            await self._read_rest(offset, length, iov, got)

    def _not_at_once(self, error: OSError) -> None:
        """It failed; or it would have to wait, or the kernel cannot tell."""
        if self._inline or error.errno not in (*_NO_NOWAIT, errno.EAGAIN):
            raise block_error(error) from None
        if error.errno in _NO_NOWAIT:
            self._at_once = None

    async def _read_rest(self, offset: int, length: int, iov: IoVec, got: int) -> None:
        self._check_presence()
        expected = min(length, self._size - offset)
        if got < expected:
            rest = iov.slice(got, length - got)
            if not self._inline:
                got += await self._io.preadv(self._fd, offset + got, rest)
            elif got:
                got += read_all(self._fd, offset + got, rest)
        if got < expected:
            raise BlockError(
                errno.EIO, f"{self.node_name}: the file ends at {offset + got}, not at {self._size}"
            )
        if got < length:
            iov.zero(got, length - got)

    def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> Request:
        """Write; FUA, where it is supported, is RWF_DSYNC."""
        if not self._writes_inline:
            return self._write(offset, length, iov, bool(flags & _FUA and not self.no_flush))
        if length >= _LARGE:
            return self._write_large(offset, length, iov)
        try:
            if len(iov.views) == 1:
                # As most have; without a vector there is less to look at, here and in the kernel.
                done = os.pwrite(self._fd, iov.views[0], offset)
            else:
                done = os.pwritev(self._fd, iov.views, offset)
        except OSError as error:
            raise block_error(error) from None
        if done < length:
            write_all(self._fd, offset + done, iov.slice(done, length - done))
        if offset + length > self._size:
            self._size = offset + length
        return DONE

    async def _write_large(self, offset: int, length: int, iov: IoVec) -> None:
        await self._call(write_all, offset, iov)
        self._size = max(self._size, offset + length)

    async def _write(self, offset: int, length: int, iov: IoVec, dsync: bool) -> None:
        self._check_presence()
        await self._io.pwritev(self._fd, offset, iov, dsync)
        self._size = max(self._size, offset + length)

    def driver_plug(self) -> None:
        """Whoever does the I/O may wait for more."""
        self._io.plug()

    def driver_unplug(self) -> None:
        """Now it may not."""
        self._io.unplug()

    async def driver_cut_padding(self, end: int) -> None:
        """O_DIRECT wrote a whole block at the end; the file must not seem to have grown.

        Unless something else is in flight, which may have made it longer: at once, so that nothing begins meanwhile.
        """
        if not self._file.is_device and self._size > end and self.in_flight == 1:
            try:
                os.ftruncate(self._fd, end)
            except OSError as error:
                raise block_error(error) from None
            self._changed_ranges()
            self._size = end

    async def driver_copy_range_from(
        self, offset: int, target: BlockNode, target_offset: int, length: int, flags: int
    ) -> None:
        """The bytes are here."""
        await copy_range_to(self, offset, target, target_offset, length, flags)

    async def driver_copy_range_to(
        self, source: BlockNode, source_offset: int, offset: int, length: int, flags: int
    ) -> None:
        """copy_file_range(2), which shares the blocks where the file system can."""
        whole = (
            isinstance(source, PosixNode)
            and source_offset + length <= source._size
            and not (self._file.is_device or source._file.is_device)
        )
        if not whole:
            raise BlockError(errno.ENOTSUP)
        assert isinstance(source, PosixNode)
        try:
            where = source._fd, source_offset, self._fd, offset, length
            await self._io.call(host_file.copy_range, *where, file=self._fd)
        finally:
            self._changed_ranges()
        self._size = max(self._size, offset + length)

    async def driver_flush_to_disk(self) -> None:
        """fdatasync. Once it has failed it fails for ever, unless there is no page cache in between.

        The kernel tells of a write that it lost to one fdatasync of an open file, once; of two that overlap one may
        fail and the other succeed. So there is only one at a time. Here: the pipeline flushes a node once at a time.
        In the engine: see native/src/flush.c. Between the two: `flush_target` gives nothing out while we are here, what
        was given out before is taken back, and whether that has failed is known when it is.
        """
        self._flushing = True
        try:
            await self.revoke_flush()
            self._check_presence()
            if self._flush_error:
                raise BlockError(
                    self._flush_error, f"{self.node_name}: an earlier flush has lost data already"
                )
            await self._io.fdatasync(self._fd)
        except (BlockError, asyncio.CancelledError) as error:
            failure = error if isinstance(error, BlockError) else error.__cause__
            if isinstance(failure, BlockError):
                self.flush_failed(failure.errno or errno.EIO)
            raise
        finally:
            self._flushing = False

    def flush_failed(self, error: int) -> None:
        """Somebody's fdatasync failed: see `_flush_error`."""
        if not self._direct:
            # More room would not bring back what was lost for the want of it.
            self._flush_error = errno.EIO if error == errno.ENOSPC else error

    async def driver_truncate(self, length: int, preallocation: Preallocation) -> None:
        """Change the size of the file; devices have the size they have (row B31.4)."""
        if self._file.is_device:
            raise BlockError(errno.ENOTSUP, f"{self.node_name}: a device cannot be resized")
        if preallocation is Preallocation.METADATA:
            raise BlockError(errno.ENOTSUP, "Unsupported preallocation mode: metadata")
        before = self._size
        if preallocation is Preallocation.OFF or length <= before:
            try:
                await self._truncate_file(length)
            except BlockError as error:
                what = f"Could not resize file: {error.strerror}"
                raise BlockError(error.errno or errno.EIO, what) from None
            return
        try:
            if preallocation is Preallocation.FALLOC:
                await self._io.fallocate(self._fd, 0, before, length - before)
            else:
                await self._call(host_file.write_zeroes, before, length, self._direct)
        except BlockError:
            # What was allocated so far would look like a longer disk.
            await self._truncate_file(before)
            raise
        self._size = length

    def info(self) -> NodeInfo:
        """Nothing special."""
        return NodeInfo()

    async def driver_allocated_size(self) -> int:
        """What the file system says; 0 for a device."""
        status = await self._call(os.fstat)
        return status.st_blocks * 512

    async def _truncate_file(self, size: int) -> None:
        try:
            await self._call(os.ftruncate, size)
        except OSError as error:
            raise block_error(error) from None
        finally:
            self._changed_ranges()
        self._size = size

    # ------------------------------------------------------------------ what may be done without
    # asking

    async def host_extent(self, offset: int, length: int) -> HostExtent | None:
        """The whole file, except a last block that the file does not fill."""
        file = self._file
        if self._is_removed:
            return None
        block = max(SECTOR_SIZE, file.request_alignment)
        usable = align_down(min(self._size, self.length), block)
        if offset >= usable:
            return None
        flags = ExtentFlag.READ
        if not self.read_only:
            flags |= ExtentFlag.WRITE
        if file.in_memory:
            flags |= ExtentFlag.INLINE
        elif self._direct:
            flags |= ExtentFlag.FIXED
        else:
            flags |= ExtentFlag.CACHED
        if self._pool:
            flags |= ExtentFlag.POOL
        return HostExtent(
            0, usable, self._fd, 0, flags, file.request_alignment, file.memory_alignment
        )

    def flush_target(self) -> int | FlushTarget:
        """The file, unless flushes are off, have failed before, are being done here, or belong into our own threads
        (aio=threads)."""
        if self.no_flush:
            return FlushTarget.NOTHING
        ask = self._flush_error or self._flushing or self._pool or self._is_removed
        return FlushTarget.ASK if ask else self._fd
