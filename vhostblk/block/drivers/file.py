"""`file` and `host_device`: a regular file or a block device of the host, opened and locked."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any

from vhostblk.block.drivers import host_file
from vhostblk.block.drivers.locking import ImageLock
from vhostblk.block.drivers.new_file import (
    DeviceCreateOptions,
    FileCreateOptions,
    check_device,
    make_file,
    remove,
)
from vhostblk.block.drivers.posix import PosixNode
from vhostblk.block.extent import FlushTarget
from vhostblk.block.filename import protocol_prefix
from vhostblk.block.flags import Preallocation
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.node import OpenContext
from vhostblk.block.options import STRING, NodeOptions, choice, option
from vhostblk.block.permissions import Perm
from vhostblk.errors import ConfigError

if TYPE_CHECKING:
    from vhostblk.block.creation import Creation
    from vhostblk.block.reopen import Reopen

# By the file's mode, by its attributes, by its file system.
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)

# By users in this process with other processes, whatever they share among themselves.
_NEVER_SHARED = Perm.WRITE | Perm.RESIZE


@lean_dataclass(frozen=True, slots=True)
class FileOptions:
    """QEMU's options for file and host_device."""

    filename: str = option(
        STRING,
        about="path of the file or block device",
        strong=True,
        missing="The 'file' block driver requires a file name",
    )
    aio: str | None = option(
        choice("threads", "io_uring"), None, about="how to do I/O; the fastest that works if absent"
    )
    locking: str = option(
        choice("auto", "on", "off"), "auto", about="lock the image against other processes"
    )


@lean_dataclass(frozen=True, slots=True)
class _Opened:
    """An open file, and how it is open."""

    fd: int
    direct: bool
    read_only: bool
    file: host_file.HostFile


class FileNode(PosixNode):
    """One open file.

    Owns: the fd, and with it the image locks.
    """

    driver_name = "file"
    protocol_name = "file"
    options_type = FileOptions
    options: FileOptions
    _lock: ImageLock | None = None
    _next: _Opened | None = None  # while the file is reopened
    _next_lock: ImageLock | None = None
    _old_fd = -1  # until it is closed after that

    # ------------------------------------------------------------------ life

    @classmethod
    def create_options_type(cls) -> type[Any] | None:
        """Of a file."""
        return FileCreateOptions

    @classmethod
    async def create(cls, creation: Creation, options: FileCreateOptions) -> None:
        """Make the file, or empty the one that there is; see `new_file.py`."""
        io = creation.host_io()
        new = await io.call(make_file, options, undo=remove)
        creation.on_failure(lambda: io.call(remove, new))

    async def open(self, context: OpenContext) -> None:
        """Open the file, find out what it is and can do.

        Raises:
            ConfigError: it cannot be opened, or is not a regular file or block device.
        """
        if not self.options.filename:
            raise ConfigError(f"The '{self.driver_name}' block driver requires a file name")
        self._io = context.host_io(self.options.aio)
        opened = await self._open(self.options.filename, self.common, self.read_only)
        self._pool = self.options.aio == "threads"
        if self.options.aio is None and opened.file.may_hang:
            self._pool, self._io = True, context.host_io("threads")
        self._use(opened)
        if self.options.locking != "off":
            self._lock = self._new_lock(self._fd)

    def _use(self, opened: _Opened) -> None:
        self._fd, self._direct, self.read_only = opened.fd, opened.direct, opened.read_only
        self._adopt(opened.file)

    def _new_lock(self, fd: int) -> ImageLock:
        required = self.options.locking == "on"
        return ImageLock(fd, self.options.filename, required=required)

    async def _open(self, path: str, common: NodeOptions, read_only: bool) -> _Opened:
        try:
            return await self._io.call(
                self._open_file, path, common, read_only, undo=lambda opened: os.close(opened.fd)
            )
        except OSError as error:
            raise ConfigError(
                f"Could not open '{self.options.filename}': {error.strerror}{_hint(error, common)}",
                error.errno or errno.EIO,
                qemu_text=f"Could not open '{self.options.filename}': {_reason(error, common)}",
            ) from None

    def _open_file(self, path: str, common: NodeOptions, read_only: bool) -> _Opened:
        """Blocking. Context: a worker thread; it touches nothing that others change."""
        # Looked at first, because opening a FIFO or a tape does more than opening.
        self._check_kind(os.stat(path).st_mode)
        direct = common.cache_direct
        flags = os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        try:
            fd = os.open(path, flags | (os.O_RDONLY if read_only else os.O_RDWR))
        except OSError as error:
            if read_only or not common.auto_read_only or error.errno not in _NOT_WRITABLE:
                raise
            fd = os.open(path, flags | os.O_RDONLY)
            read_only = True
        try:
            self._check_kind(os.fstat(fd).st_mode)
            found = host_file.inspect(fd, direct=direct, writable=not read_only)
        except BaseException:
            os.close(fd)
            raise
        return _Opened(fd, direct, read_only, found)

    def _check_kind(self, mode: int) -> None:
        if stat.S_ISDIR(mode) and not self.common.read_only:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ConfigError(
                f"Could not open '{self.options.filename}': neither a regular file nor a block "
                "device",
                qemu_text=f"'{self.driver_name}' driver requires '{self.options.filename}' to be a regular file",
            )

    async def driver_truncate(self, length: int, preallocation: Preallocation) -> None:
        """Change the size; a file that was empty has its first block then."""
        was_empty = not self._size
        await super().driver_truncate(length, preallocation)
        if was_empty and preallocation is Preallocation.OFF:
            await self._call(host_file.allocate_first_block, length)

    def exact_filename(self) -> str:
        """The path; written so that nobody takes a part of it for a protocol."""
        name = self.options.filename
        return name if protocol_prefix(name) is None else f"./{name}"

    # ------------------------------------------------------------------ reopen

    async def reopen_prepare(self, reopen: Reopen) -> None:
        """Open the file once more if the new modes need it: this file, whatever its name stands for by now.

        Raises:
            ConfigError: it cannot be opened so.
        """
        if (reopen.common.cache_direct, reopen.read_only) != (self._direct, self.read_only):
            path = f"/proc/self/fd/{self._fd}"
            self._next = await self._open(path, reopen.common, reopen.read_only)
            reopen.read_only = self._next.read_only

    def reopen_commit(self, reopen: Reopen) -> None:
        """Use the new fd; its locks are taken already."""
        if self._next is not None:
            self._old_fd, opened = self._fd, self._next
            self._next = None
            self._use(opened)
            if self._lock is not None:
                assert self._next_lock is not None
                self._lock, self._next_lock = self._next_lock, None

    async def reopen_done(self, reopen: Reopen) -> None:
        """Close the old fd."""
        old, self._old_fd = self._old_fd, -1
        if old >= 0:
            await self._io.call(os.close, old)

    async def reopen_abort(self, reopen: Reopen) -> None:
        """Close the new fd, and with it its locks."""
        if self._next is not None:
            opened, self._next, self._next_lock = self._next, None, None
            await self._io.call(os.close, opened.fd)

    # ------------------------------------------------------------------ locks

    def check_perm(self, perm: Perm, shared: Perm) -> None:
        """Take the image locks that this needs.

        Raises:
            ConfigError: another process has the image.
        """
        if self._lock is not None:
            self._lock.prepare(*self._towards_processes(perm, shared))
            if self._next is not None:
                self._next_lock = self._new_lock(self._next.fd)
                self._next_lock.follow(self._lock)

    def set_perm(self, perm: Perm, shared: Perm) -> None:
        """Give back the locks that nobody needs any more."""
        if self._lock is not None:
            self._lock.commit(*self._towards_processes(perm, shared))

    def _towards_processes(self, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """Users in this process may share all; their revocations and flushes do not reach other processes."""
        if self.inactive:
            return Perm.NONE, Perm.ALL
        is_shared = self.force_share or (self.looks_only and not perm & _NEVER_SHARED)
        return perm, shared if is_shared or not perm else shared & ~_NEVER_SHARED

    def abort_perm(self) -> None:
        """Back to the old locks."""
        if self._lock is not None:
            self._lock.abort()


class HostDeviceNode(FileNode):
    """A device, and nothing else. Character devices have no bytes to show, as in QEMU."""

    _is_character = False
    driver_name = "host_device"
    protocol_name = "host_device"

    @classmethod
    def create_options_type(cls) -> type[Any] | None:
        """Of a device that is there."""
        return DeviceCreateOptions

    @classmethod
    async def create(cls, creation: Creation, options: Any) -> None:
        """The device is there; it has to be large enough."""
        await creation.host_io().call(check_device, options)

    @classmethod
    def probe_device(cls, filename: str) -> int:
        """Whether the file is a block device now."""
        try:
            return 100 if stat.S_ISBLK(os.stat(filename).st_mode) else 0
        except (OSError, ValueError):
            return 0

    def _check_kind(self, mode: int) -> None:
        if stat.S_ISDIR(mode) and not self.common.read_only:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISBLK(mode) and not stat.S_ISCHR(mode):
            raise ConfigError(
                f"'{self.driver_name}' driver requires '{self.options.filename}' to be either a character or block "
                "device"
            )
        self._is_character = stat.S_ISCHR(mode)

    async def driver_flush_to_disk(self) -> None:
        """There is nothing of a character device to be made durable, and the kernel refuses."""
        if not self._is_character:
            await super().driver_flush_to_disk()

    def flush_target(self) -> int | FlushTarget:
        """The same."""
        return FlushTarget.NOTHING if self._is_character else super().flush_target()


class HostCdromNode(HostDeviceNode):
    """A drive with a medium in it; it is never ejected, nor locked."""

    driver_name = "host_cdrom"
    protocol_name = "host_cdrom"

    @classmethod
    def create_options_type(cls) -> type[Any] | None:
        """Nothing can be made there."""
        return None

    @classmethod
    def probe_device(cls, filename: str) -> int:
        """Only who asks for it by name gets it."""
        return 0


def _reason(error: OSError, common: NodeOptions) -> str:
    """What QEMU says."""
    if error.errno == errno.EINVAL and common.cache_direct:
        return "filesystem does not support O_DIRECT"
    return os.strerror(error.errno or errno.EIO)


def _hint(error: OSError, common: NodeOptions) -> str:
    if error.errno == errno.EINVAL and common.cache_direct:
        return " (the file system may not support O_DIRECT: cache.direct=off goes without)"
    if error.errno in _NOT_WRITABLE and not common.read_only:
        return " (read-only=on needs less)"
    return ""
