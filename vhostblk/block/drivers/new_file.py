"""Making the files that images are in (block layer row B35.1).

A file that is there already is emptied only when nobody else uses it: it is opened as it is, then locked, as QEMU does.
System calls only, all of them blocking: the file driver runs them in a thread.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import logging
import os
import stat
import struct

from vhostblk.block.drivers import host_file
from vhostblk.block.drivers.locking import ImageLock
from vhostblk.block.host_io import fallocate
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.limits import SECTOR_SIZE
from vhostblk.block.options import BOOLEAN, SIZE, STRING, OptionType, option
from vhostblk.block.permissions import Perm
from vhostblk.errors import BlockError, ConfigError

log = logging.getLogger(__name__)

# linux/fs.h
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000
_FS_IOC_FSGETXATTR = 0x801C581F
_FS_IOC_FSSETXATTR = 0x401C5820
_FS_XFLAG_EXTSIZE = 0x00000800
# struct fsxattr: flags, extent size, number of extents, project, extent size of copies, padding
_FSXATTR = struct.Struct("=IIIII8s")

_MODE = 0o644
_CHANGES = Perm.WRITE | Perm.RESIZE


_MOST_HINT = (1 << 32) - 1
_DEFAULT_HINT = 1 << 20


def to_preallocation(name: str, value: object) -> str:
    """Whether a new file gets its room now."""
    if value in ("off", "falloc", "full"):
        return str(value)
    if value == "metadata":
        raise ConfigError(f"Unsupported preallocation mode: {value}", errno.ENOTSUP)
    raise ConfigError(
        f"Parameter '{name}' does not accept value '{value}' (allowed: off, falloc, full)",
        qemu_text=f"invalid parameter value: {value}",
    )


PREALLOCATION = OptionType(to_preallocation, "off|falloc|full")


@lean_dataclass(frozen=True, slots=True)
class FileCreateOptions:
    """QEMU's options for new files; the words are those of image tools."""

    filename: str = option(STRING, about="path of the file", listed=False)
    size: int = option(SIZE, 0, about="Virtual disk size", tacit=True)
    nocow: bool = option(
        BOOLEAN, False, about="Turn off copy-on-write (valid only on btrfs)", tacit=True
    )
    preallocation: str = option(
        PREALLOCATION,
        "off",
        about="Preallocation mode (allowed values: off, falloc, full)",
        tacit=True,
    )
    extent_size_hint: int | None = option(
        SIZE,
        None,
        name="extent_size_hint",
        about="Extent size hint for the image file, 0 to disable",
    )

    def __post_init__(self) -> None:
        if (self.extent_size_hint or 0) > _MOST_HINT:
            raise ConfigError("Extent size hint is too large")


@lean_dataclass(frozen=True, slots=True)
class DeviceCreateOptions:
    """What can be asked of a device that is there."""

    filename: str = option(STRING, about="path of the block device", listed=False)
    size: int = option(SIZE, 0, about="Virtual disk size", tacit=True)


@lean_dataclass(frozen=True, slots=True)
class NewFile:
    """A file that was not there before: which one it is."""

    path: str
    device: int
    inode: int


def make_file(options: FileCreateOptions) -> NewFile | None:
    """Make a file, or empty the one that there is.

    Returns: the file, if it is new.

    Raises:
        ConfigError: it cannot be opened; somebody uses it.
        BlockError: there is no room.
    """
    fd, new = _open(options.filename)
    try:
        try:
            _fill(fd, options)
        finally:
            os.close(fd)  # and with it its locks
    except BaseException:
        remove(new)
        raise
    return new


def _fill(fd: int, options: FileCreateOptions) -> None:
    _lock(fd, options.filename)
    try:
        os.ftruncate(fd, 0)
        if options.nocow:
            _set_nocow(fd)
        _set_extent_size(fd, options.extent_size_hint)
        if options.preallocation == "falloc" and options.size:
            fallocate(fd, 0, 0, options.size)
        elif options.preallocation == "full":
            host_file.write_zeroes(fd, 0, options.size, direct=False)
        else:
            os.ftruncate(fd, options.size)
            host_file.allocate_first_block(fd, options.size)
    except OSError as error:
        what = f"Could not resize file: {error.strerror}"
        raise BlockError(error.errno or errno.EIO, what) from None


_NO_NEW_DEVICES = (
    "Protocol driver 'host_device' does not support image creation, and opening the image failed"
)


def check_device(options: DeviceCreateOptions) -> None:
    """A device has the size it has; what began on it begins no more.

    Raises:
        ConfigError: it cannot be opened, or is too small; somebody uses it.
        BlockError: the kernel's errno.
    """
    path = options.filename
    try:
        if not stat.S_ISBLK(os.stat(path).st_mode):
            what = "to be either a character or block device"
            raise ConfigError(f"{_NO_NEW_DEVICES}: 'host_device' driver requires '{path}' {what}")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        why = os.strerror(error.errno or errno.EIO)
        raise ConfigError(
            f"{_NO_NEW_DEVICES}: Could not open '{path}': {why}", error.errno or errno.EIO
        ) from None
    try:
        _lock(fd, path)
        size = host_file.file_size(fd)
        if size < options.size:
            raise ConfigError(
                f"Device '{path}' is too small: {size} bytes, not {options.size}", errno.ENOSPC
            )
        os.pwrite(fd, bytes(SECTOR_SIZE), 0)
        os.fsync(fd)
    except OSError as error:
        raise BlockError(error.errno or errno.EIO) from None
    finally:
        os.close(fd)


def remove(new: NewFile | None) -> None:
    """The file is not going to be an image: as if it had never been there, unless somebody else uses it by now."""
    if new is None:
        return
    with contextlib.suppress(OSError, ConfigError):
        fd = os.open(new.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) == (new.device, new.inode):
                _lock(fd, new.path)
                os.unlink(new.path)
        finally:
            os.close(fd)


def _open(path: str) -> tuple[int, NewFile | None]:
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        try:
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, _MODE)
        except FileExistsError:
            # Looked at first, because opening a FIFO does more than opening. A link to nothing is made a file by QEMU;
            # here it is an error.
            mode = os.stat(path).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)) from None
            if not stat.S_ISREG(mode):
                raise ConfigError(f"Could not create '{path}': it is no regular file") from None
            return os.open(path, flags), None
    except OSError as error:
        raise _cannot(path, error) from None
    status = os.fstat(fd)
    return fd, NewFile(path, status.st_dev, status.st_ino)


def _cannot(path: str, error: OSError) -> ConfigError:
    return ConfigError(f"Could not create '{path}': {error.strerror}", error.errno or errno.EIO)


def _lock(fd: int, path: str) -> None:
    """Take the locks of somebody who changes the whole file; they go when the file is closed."""
    ImageLock(fd, path, required=False).prepare(_CHANGES, Perm.NONE)


def _set_extent_size(fd: int, hint: int | None) -> None:
    """How much XFS allocates at a time. Failure is worth a warning to whoever has asked for it."""
    size = _DEFAULT_HINT if hint is None else hint
    attributes = bytearray(_FSXATTR.size)
    try:
        fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, attributes)
        flags, _, *rest = _FSXATTR.unpack(attributes)
        fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, _FSXATTR.pack(flags | _FS_XFLAG_EXTSIZE, size, *rest))
    except OSError as error:
        if hint:
            warning = f"Failed to set extent size hint: {error.strerror}"
            log.warning("%s", warning, extra={"qemu_warns": warning})


def _set_nocow(fd: int) -> None:
    """Only a new, empty file can be so; where there is no such thing, it makes no difference."""
    with contextlib.suppress(OSError):
        value = array.array("l", [0])
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, value)
        value[0] |= _FS_NOCOW_FL
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, value)
