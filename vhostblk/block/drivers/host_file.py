"""What there is to know about an open file of the host: kind, size, alignments, block sizes.

System calls only, all of them blocking: the file driver runs them in a thread. Knows nothing about
nodes.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import sys

from vhostblk.block.host_io import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.limits import SECTOR_SIZE, align_down, align_up
from vhostblk.block.node import BlockSizes
from vhostblk.errors import BlockError

# linux/fs.h
_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268
_BLKIOMIN = 0x1278
_BLKIOOPT = 0x1279
_BLKPBSZGET = 0x127B
_BLKGETDISKSEQ = 0x80081280
BLKDISCARD = 0x1277
BLKZEROOUT = 0x127F

# linux/magic.h: file systems whose I/O never waits for a device.
_IN_MEMORY = (0x01021994, 0x858458F6)  # tmpfs, ramfs
# Those that wait for another process or machine. Some do so while a request is only being submitted to io_uring (seen
# with FUSE): whoever submits would hang with them.
_MAY_HANG = (
    *(0x65735546, 0x6969, 0xFF534D42, 0xFE534D42, 0x00C36400),  # FUSE, NFS, CIFS, SMB2, Ceph
    *(0x01021997, 0x5346414F, 0x6B414653, 0x0BD00BD0),  # 9p, AFS (twice), Lustre
)

# statx(2): the mask bit, and where struct statx has stx_mask and stx_dio_mem_align,
# stx_dio_offset_align.
_STATX_DIOALIGN = 0x2000
_STATX_DIO_OFFSET = 152
_AT_EMPTY_PATH = 0x1000

_DEVICES = "/sys/dev/block"

_FAR = 1 << 62  # behind any file's end

_PROBED = (1, 512, 1024, 2048, 4096)
_FALLBACK_ALIGNMENT = 4096
_FIRST_BLOCK = 4096
_ZEROES = 1 << 20


@lean_dataclass(frozen=True, slots=True)
class HostFile:
    """Facts about an open file, in bytes.

    Attributes: size: of the content, as the kernel says; any number for a regular file.
        request_alignment, memory_alignment: what requests and their memory must be aligned to; 1
        through the page cache. in_memory: its I/O never blocks. may_hang: it depends on another
        process or machine. can_discard: holes can be punched, or the device takes discards.
        device: number of the block device that it is; None: a regular file.
    """

    size: int
    request_alignment: int
    memory_alignment: int
    sizes: BlockSizes
    in_memory: bool
    may_hang: bool
    can_discard: bool
    device: int | None = None

    @property
    def is_device(self) -> bool:
        """Whether it is a block device."""
        return self.device is not None


def inspect(fd: int, *, direct: bool, writable: bool) -> HostFile:
    """Find out about an open regular file or block device.

    Args:
        direct: it was opened with O_DIRECT.

    Raises:
        OSError: the kernel's.
    """
    status = os.fstat(fd)
    is_device = stat.S_ISBLK(status.st_mode)
    size = file_size(fd)
    kind = _file_system(fd)
    logical = _ioctl_int(fd, _BLKSSZGET) if is_device else SECTOR_SIZE
    request_alignment = memory_alignment = 1
    if direct:
        request_alignment, memory_alignment = _direct_alignment(fd, logical if is_device else 0)
    if is_device:
        sizes = BlockSizes(
            logical,
            _ioctl_int(fd, _BLKPBSZGET),
            _ioctl_int(fd, _BLKIOMIN),
            _ioctl_int(fd, _BLKIOOPT),
        )
    else:
        # A guest's partition table may rely on 512, so what the file prefers is told as the
        # physical size.
        physical = max(SECTOR_SIZE, request_alignment, _power_of_two(status.st_blksize))
        sizes = BlockSizes(SECTOR_SIZE, physical, physical, 0)
    return HostFile(
        size=size,
        request_alignment=request_alignment,
        memory_alignment=memory_alignment,
        sizes=sizes,
        in_memory=not is_device and not direct and kind in _IN_MEMORY,
        may_hang=not is_device and kind in _MAY_HANG,
        can_discard=writable
        and (_device_discards(status.st_rdev) if is_device else _can_punch(fd, size)),
        device=status.st_rdev if is_device else None,
    )


def copy_range(source: int, source_offset: int, target: int, offset: int, length: int) -> None:
    """copy_file_range(2) until all is copied.

    Raises:
        BlockError: ENOTSUP: these files cannot; else the kernel's errno. Part may have been copied then.
    """
    try:
        while length:
            count = os.copy_file_range(source, target, length, source_offset, offset)
            if not count:
                raise BlockError(errno.EIO, "copy_file_range: the source ends early")
            source_offset += count
            offset += count
            length -= count
    except BlockError:
        raise
    except OSError as error:
        missing = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
        raise BlockError(
            errno.ENOTSUP if error.errno in missing else error.errno or errno.EIO
        ) from None


def find_run(fd: int, offset: int) -> tuple[bool, int]:
    """Whether there is data at `offset`, or a hole, and where that ends (lseek(2), SEEK_DATA).

    A file system that does not know says that all is data.

    Raises:
        BlockError: the kernel's errno.
    """
    try:
        try:
            data = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return False, _FAR
            raise
        if data > offset:
            return False, data
        return True, os.lseek(fd, offset, os.SEEK_HOLE)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENXIO):
            return True, _FAR
        raise BlockError(error.errno or errno.EIO) from None


def find_runs(fd: int, offset: int, length: int, align: int, most: int) -> list[tuple[bool, int]]:
    """Data and holes one behind the other from `offset` on, in whole blocks of `align`: whether it is data, and bytes.

    Data are told of up to their end, be that behind the range.

    Args:
        most: runs, of which the last may end before the range does.

    Raises:
        BlockError: the kernel's errno.
    """
    found: list[tuple[bool, int]] = []
    stop = offset + length
    while offset < stop and len(found) < most:
        is_data, end = find_run(fd, offset)
        run = 0 if is_data else align_down(min(end, stop) - offset, align)
        if not run:
            # A hole that is shorter than a block has data behind it in the same block.
            end = end if is_data else offset + align
            run, is_data = align_up(end - offset, align), True
        found.append((is_data, run))
        offset += run
    return found


def file_size(fd: int) -> int:
    """Bytes of a regular file or a block device, now.

    Raises:
        OSError: the kernel's.
    """
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return status.st_size
    size = bytearray(8)
    fcntl.ioctl(fd, _BLKGETSIZE64, size)
    return int(struct.unpack("Q", size)[0])


def look(fd: int) -> tuple[int, bool]:
    """The size of a file or device, and whether it still is one of the system's.

    Raises:
        OSError: the kernel's.
    """
    return file_size(fd), is_there(fd)


def is_there(fd: int) -> bool:
    """False if it was a block device that is known to have been removed.

    Another may have its number by now; but that has another sequence number (Linux 5.15). Where sysfs is not to be seen
    nobody knows.
    """
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode) or not os.path.isdir(_DEVICES):
        return True
    folders = _in_sysfs(status.st_rdev)
    if not os.path.exists(folders[0]):
        return False
    number = bytearray(8)
    try:
        fcntl.ioctl(fd, _BLKGETDISKSEQ, number)
    except OSError as error:
        return error.errno not in (errno.ENXIO, errno.ENODEV)
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            return _number(f"{folder}/diskseq") == int.from_bytes(number, sys.byteorder)
    return True


def _in_sysfs(device: int) -> tuple[str, str]:
    """The folders that tell of a device: its own, and the one above, which for a partition is that of its disk."""
    own = f"{_DEVICES}/{os.major(device)}:{os.minor(device)}"
    return own, os.path.dirname(os.path.realpath(own))


def _number(path: str) -> int:
    with open(path) as file:
        return int(file.read())


def write_zeroes(fd: int, start: int, end: int, direct: bool) -> None:
    """Write zeroes at the end of a file, which has `start` bytes, until it has `end`.

    Raises:
        BlockError: the kernel's errno.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        if direct:
            # The ends need not be aligned, and nobody uses the file meanwhile.
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        while start < end:
            start += os.pwrite(fd, bytes(min(end - start, _ZEROES)), start)
        os.fsync(fd)
    except OSError as error:
        raise BlockError(error.errno or errno.EIO) from None
    finally:
        if direct:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def allocate_first_block(fd: int, size: int) -> None:
    """As QEMU does with a file that was empty: who looks for its alignment by reading there finds a block."""
    with contextlib.suppress(OSError):
        os.pwrite(fd, bytes(_FIRST_BLOCK if size >= _FIRST_BLOCK else min(size, SECTOR_SIZE)), 0)


def device_range(fd: int, request: int, offset: int, length: int) -> None:
    """BLKDISCARD or BLKZEROOUT on a range of a block device.

    Raises:
        BlockError: the kernel's errno.
    """
    try:
        fcntl.ioctl(fd, request, struct.pack("QQ", offset, length))
    except OSError as error:
        raise BlockError(error.errno or errno.EIO) from None


def _ioctl_int(fd: int, request: int) -> int:
    # Unsigned: some bridges report optimal sizes just below 4 GiB.
    value = array.array("I", [0])
    fcntl.ioctl(fd, request, value)
    return value[0]


def _power_of_two(value: int) -> int:
    return value if value and not value & (value - 1) and value <= 65536 else 4096


def _file_system(fd: int) -> int:
    """f_type of statfs(2), because os.statvfs has none; 0 where it cannot be told."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(256)
    if libc.fstatfs(fd, buffer) != 0:
        return 0
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFF_FFFF


def _direct_alignment(fd: int, logical: int) -> tuple[int, int]:
    """Alignment of offsets and lengths, and of memory, for O_DIRECT: asked for, else tried, else assumed.

    Args:
        logical: the device's logical block size; 0 for a file.
    """
    asked = _ask_direct_alignment(fd)
    if asked is not None:
        memory, request = asked
    else:
        request, memory = _try_direct_alignment(fd)
    request = max(request, logical)
    # Kernels want the length of every element in whole blocks, whatever they say about addresses.
    return request, max(memory, request)


def _ask_direct_alignment(fd: int) -> tuple[int, int] | None:
    """STATX_DIOALIGN (Linux 6.1): (memory, offset) alignment, or None where the kernel does not say."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "statx"):
        return None
    buffer = ctypes.create_string_buffer(256)
    if libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer) != 0:
        return None
    (mask,) = struct.unpack_from("=I", buffer, 0)
    memory, offset = struct.unpack_from("=II", buffer, _STATX_DIO_OFFSET)
    if not mask & _STATX_DIOALIGN or not memory or not offset:
        return None
    return memory, offset


def _try_direct_alignment(fd: int) -> tuple[int, int]:
    """(offset, memory) alignment found by reading: the smallest that the kernel does not refuse."""
    memory = memoryview(mmap.mmap(-1, 2 * _PROBED[-1]))

    def works(length: int, shift: int) -> bool:
        try:
            os.preadv(fd, [memory[shift : shift + length]], 0)
        except OSError as error:
            # Anything else is not about alignment.
            return error.errno != errno.EINVAL
        return True

    request = next((align for align in _PROBED if works(align, 0)), 0)
    # A read of one byte that succeeds only says that nothing was read: the file is empty, or nobody
    # checks.
    if request <= 1:
        return _FALLBACK_ALIGNMENT, _FALLBACK_ALIGNMENT
    shift = next((align for align in _PROBED if works(request, align)), 0)
    return request, shift if shift > 1 else _FALLBACK_ALIGNMENT


def _can_punch(fd: int, size: int) -> bool:
    """Try it where there is nothing to lose: behind the end."""
    try:
        start = align_up(size, 1 << 20) + (1 << 20)
        fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, 4096)
    except BlockError as error:
        return error.errno == errno.EFBIG
    return True


def _device_discards(device: int) -> bool:
    """What sysfs says."""
    for folder in _in_sysfs(device):
        with contextlib.suppress(OSError, ValueError):
            return _number(f"{folder}/queue/discard_max_bytes") > 0
    return False
