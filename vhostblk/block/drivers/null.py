"""`null-co`: a disk that forgets. Answers at once, or after a fixed time; for measuring everything else."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vhostblk.block.flags import Preallocation, StatusFlag
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import SECTOR_SIZE, align_up
from vhostblk.block.node import (
    BlockNode,
    ExtentFlag,
    FlushTarget,
    HostExtent,
    OpenContext,
    Req,
)
from vhostblk.block.options import BOOLEAN, INTEGER, SIZE, option
from vhostblk.block.status import BlockStatus
from vhostblk.errors import ConfigError

if TYPE_CHECKING:
    from vhostblk.block.registry import DriverRegistry


@dataclass(frozen=True, slots=True)
class NullOptions:
    """QEMU's options for null-co."""

    size: int = option(SIZE, 1 << 30, about="bytes; rounded up to a multiple of 512", strong=True)
    latency_ns: int = option(
        INTEGER, 0, about="how long a request takes, in nanoseconds", strong=True
    )
    read_zeroes: bool = option(
        BOOLEAN,
        False,
        about="reads give zeroes; otherwise they leave the buffer as it is",
        strong=True,
    )


class NullNode(BlockNode):
    """Nothing is kept, so every write is as durable as it will ever be."""

    driver_name = "null-co"
    options_type = NullOptions
    options: NullOptions
    is_protocol = True
    protocol_name = "null-co"
    supported_write_flags = int(Req.FUA | Req.WRITE_UNCHANGED)
    supported_zero_flags = int(Req.FUA | Req.MAY_UNMAP | Req.WRITE_UNCHANGED | Req.NO_FALLBACK)

    @classmethod
    def parse_filename(cls, filename: str, drivers: DriverRegistry) -> dict[str, Any]:
        """There is nothing that a name could say.

        Raises:
            ConfigError: it says something.
        """
        if filename != "null-co://":
            raise ConfigError("The only allowed filename for this driver is 'null-co://'")
        return {}

    def exact_filename(self) -> str:
        """There is a name for the default only."""
        return "" if self.naming_options() else "null-co://"

    async def open(self, context: OpenContext) -> None:
        """Nothing can fail."""
        self.length = align_up(self.options.size, SECTOR_SIZE)

    def refresh_limits(self) -> None:
        """Any memory will do."""
        self.limits.min_mem_alignment = 1

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        """Zeroes, or nothing at all."""
        await self._take_time()
        if self.options.read_zeroes:
            iov.zero(0, length)

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        """Forget it."""
        await self._take_time()

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        """Forget it."""
        await self._take_time()

    async def driver_flush_to_disk(self) -> None:
        """Takes its time like the others."""
        await self._take_time()

    async def driver_block_status(self, offset: int, length: int, precise: bool) -> BlockStatus:
        """There is room for everything, and nothing in it."""
        flags = StatusFlag.OFFSET_VALID
        if self.options.read_zeroes:
            flags |= StatusFlag.ZERO
        return BlockStatus(flags, length, map=offset)

    async def driver_allocated_size(self) -> int:
        """Nothing."""
        return 0

    async def driver_truncate(self, length: int, preallocation: Preallocation) -> None:
        """Any length is fine."""
        self.set_length(align_up(length, SECTOR_SIZE))

    async def host_extent(self, offset: int, length: int) -> HostExtent | None:
        """Everything, unless requests must take their time."""
        if self.options.latency_ns or offset >= self.length:
            return None
        flags = ExtentFlag.READ | ExtentFlag.WRITE | ExtentFlag.NULL
        if self.options.read_zeroes:
            flags |= ExtentFlag.ZERO
        return HostExtent(0, self.length, None, 0, flags)

    def flush_target(self) -> int | FlushTarget:
        """There is nothing to flush."""
        return FlushTarget.ASK if self.options.latency_ns else FlushTarget.NOTHING

    async def _take_time(self) -> None:
        if self.options.latency_ns:
            await asyncio.sleep(self.options.latency_ns / 1e9)
