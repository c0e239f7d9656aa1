"""Both halves of one virtqueue over one buffer, for tests that play driver and device in turn."""

from __future__ import annotations

from typing import Generic, TypeVar

from vhostblk.virtio.driver import Buffer, DriverQueue
from vhostblk.virtio.memory import FlatMemory
from vhostblk.virtio.packed import PackedVirtqueue
from vhostblk.virtio.packed_driver import PackedDriverQueue
from vhostblk.virtio.split import SplitVirtqueue

__all__ = ["BASE", "PackedRingPair", "RingPair"]

BASE = 0x4000_0000
"""Guest physical address of the first byte, far from 0 so that an offset is never an address."""

_Driver = TypeVar("_Driver", bound=DriverQueue | PackedDriverQueue)
_Device = TypeVar("_Device", bound=SplitVirtqueue | PackedVirtqueue)


class _Pair(Generic[_Driver, _Device]):
    """A driver and a device that share `data_size` bytes of buffers and one virtqueue.

    Args:
        size: entries of the queue.
        data_size: bytes the driver can place buffers in, starting at `data_gpa`.
        start: both free-running indices at the beginning; packed: both places.
    """

    _driver_kind: type[_Driver]
    _device_kind: type[_Device]

    def __init__(
        self,
        size: int = 8,
        *,
        data_size: int = 1 << 16,
        event_idx: bool = False,
        indirect: bool = False,
        indirect_entries: int = 0,
        start: int = 0,
    ) -> None:
        kind = self._driver_kind
        rings = -(-kind.area_size(size, indirect_entries) // 4096) * 4096
        self.buffer = memoryview(bytearray(rings + data_size))
        self.memory = FlatMemory(BASE, self.buffer)
        self.data_gpa = BASE + rings
        self.end = BASE + len(self.buffer)
        self.driver = kind(
            self.buffer[:rings],
            BASE,
            size,
            event_idx=event_idx,
            indirect_entries=indirect_entries,
        )
        self._go_to(start)
        self.event_idx = event_idx
        self.indirect = indirect
        self.device = self.start_device(self.driver.base)

    def _go_to(self, start: int) -> None:
        """Continue the idle ring there."""
        raise NotImplementedError

    def start_device(self, base: int) -> _Device:
        """Make a device half that continues at `base`, as a restart of the ring does."""
        driver = self.driver
        self.device = self._device_kind(
            self.memory,
            driver.size,
            BASE + driver.desc_offset,
            BASE + driver.avail_offset,
            BASE + driver.used_offset,
            base=base,
            event_idx=self.event_idx,
            indirect=self.indirect,
        )
        return self.device

    def data(self, offset: int, length: int) -> Buffer:
        """Name a piece of the data area."""
        return Buffer(self.data_gpa + offset, length)

    def bytes_at(self, buffer: Buffer) -> memoryview:
        """Give the memory of a buffer."""
        return self.buffer[buffer.gpa - BASE : buffer.gpa - BASE + buffer.length]


class RingPair(_Pair[DriverQueue, SplitVirtqueue]):
    """A split ring: see `_Pair`."""

    _driver_kind = DriverQueue
    _device_kind = SplitVirtqueue

    def _go_to(self, start: int) -> None:
        self.driver.set_indices(start)

    def offer(self, head: int) -> None:
        """Publish `head` behind the driver's back: one raw entry, one more in avail.idx."""
        position = self.device.base
        self.driver.write_avail(position, head)
        self.driver.write_avail_idx(position + 1)


class PackedRingPair(_Pair[PackedDriverQueue, PackedVirtqueue]):
    """A packed ring: see `_Pair`."""

    _driver_kind = PackedDriverQueue
    _device_kind = PackedVirtqueue

    def _go_to(self, start: int) -> None:
        self.driver.set_place(start)
