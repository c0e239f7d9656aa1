"""`file` and `host_device`: a regular file or a block device of the host, opened and locked."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from vhostblk.block.drivers import host_file
from vhostblk.block.drivers.locking import ImageLock
from vhostblk.block.drivers.posix import PosixNode
from vhostblk.block.node import OpenContext
from vhostblk.block.options import STRING, choice, option
from vhostblk.block.permissions import Perm
from vhostblk.errors import ConfigError

# By users in this process with other processes, whatever they share among themselves.
_NEVER_SHARED = Perm.WRITE | Perm.RESIZE


@dataclass(frozen=True, slots=True)
class FileOptions:
    """QEMU's options for file and host_device."""

    filename: str = option(STRING, about="path of the file or block device", strong=True)
    aio: str | None = option(
        choice("threads", "io_uring"), None, about="how to do I/O; the fastest that works if absent"
    )
    locking: str = option(
        choice("auto", "on", "off"), "auto", about="lock the image against other processes"
    )


class FileNode(PosixNode):
    """One open file.

    Owns: the fd, and with it the image locks.
    """

    driver_name = "file"
    protocol_name = "file"
    options_type = FileOptions
    options: FileOptions
    _lock: ImageLock | None = None
    _found: host_file.HostFile

    # ------------------------------------------------------------------ life

    async def open(self, context: OpenContext) -> None:
        """Open the file, find out what it is and can do.

        Raises:
            ConfigError: it cannot be opened, or is not a regular file or block device.
        """
        self._io = context.host_io(self.options.aio)
        self._direct = self.common.cache_direct
        try:
            await self._io.call(self._open_file)
        except OSError as error:
            raise ConfigError(
                f"Could not open '{self.options.filename}': {error.strerror}{self._hint(error)}",
                error.errno or errno.EIO,
            ) from None
        self._pool = self.options.aio == "threads"
        self._adopt(self._found)
        if self.options.locking != "off":
            self._lock = ImageLock(
                self._fd, self.options.filename, required=self.options.locking == "on"
            )

    def _open_file(self) -> None:
        """Blocking. Context: a worker thread, while nobody else knows the node."""
        path = self.options.filename
        # Looked at first, because opening a FIFO or a tape does more than opening.
        self._check_kind(os.stat(path).st_mode)
        flags = os.O_CLOEXEC | (os.O_DIRECT if self._direct else 0)
        try:
            self._fd = os.open(path, flags | (os.O_RDONLY if self.read_only else os.O_RDWR))
        except OSError as error:
            if (
                self.read_only
                or not self.common.auto_read_only
                or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS)
            ):
                raise
            self._fd = os.open(path, flags | os.O_RDONLY)
            self.read_only = True
        self._check_kind(os.fstat(self._fd).st_mode)
        self._found = host_file.inspect(self._fd, direct=self._direct, writable=not self.read_only)

    def _check_kind(self, mode: int) -> None:
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ConfigError(
                f"Could not open '{self.options.filename}': neither a regular file nor a block "
                "device"
            )

    def _hint(self, error: OSError) -> str:
        if error.errno == errno.EINVAL and self._direct:
            return " (the file system may not support O_DIRECT: cache.direct=off goes without)"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not self.read_only:
            return " (read-only=on needs less)"
        return ""

    # ------------------------------------------------------------------ locks

    def check_perm(self, perm: Perm, shared: Perm) -> None:
        """Take the image locks that this needs.

        Raises:
            ConfigError: another process has the image.
        """
        if self._lock is not None:
            self._lock.prepare(perm, self._share_with_processes(perm, shared))

    def set_perm(self, perm: Perm, shared: Perm) -> None:
        """Give back the locks that nobody needs any more."""
        if self._lock is not None:
            self._lock.commit(perm, self._share_with_processes(perm, shared))

    def _share_with_processes(self, perm: Perm, shared: Perm) -> Perm:
        """Users in this process may share all; their revocations and flushes do not reach other processes."""
        return shared & ~_NEVER_SHARED if perm and not self.force_share else shared

    def abort_perm(self) -> None:
        """Back to the old locks."""
        if self._lock is not None:
            self._lock.abort()


class HostDeviceNode(FileNode):
    """A block device, and nothing else."""

    driver_name = "host_device"
    protocol_name = "host_device"

    @classmethod
    def probe_device(cls, filename: str) -> int:
        """Whether the file is a block device now."""
        try:
            return 100 if stat.S_ISBLK(os.stat(filename).st_mode) else 0
        except (OSError, ValueError):
            return 0

    def _check_kind(self, mode: int) -> None:
        if not stat.S_ISBLK(mode):
            raise ConfigError(
                f"'host_device' driver requires '{self.options.filename}' to be a block device"
            )
