"""`memory`: a sparse RAM disk. It is a memfd, so that whoever does file I/O can do its I/O too."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from vhostblk.block.drivers import host_file
from vhostblk.block.drivers.posix import PosixNode
from vhostblk.block.limits import SECTOR_SIZE, align_up
from vhostblk.block.node import OpenContext
from vhostblk.block.options import SIZE, NodeOptions, option
from vhostblk.errors import BlockError, ConfigError


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """Options of the RAM disk."""

    size: int = option(SIZE, about="bytes; rounded up to a multiple of 512", strong=True)


class MemoryNode(PosixNode):
    """A RAM disk; gone when it is closed. What is never written, or is zeroed, takes no memory."""

    driver_name = "memory"
    options_type = MemoryOptions
    options: MemoryOptions

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

    def set_modes(self, common: NodeOptions) -> None:
        """There is no disk that a flush could reach."""
        super().set_modes(common)
        self.no_flush = True

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        """A hole: nobody asks a RAM disk to keep what it frees."""
        if not await self._punch(offset, length):
            raise BlockError(errno.ENOTSUP)
