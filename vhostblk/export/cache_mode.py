"""The mode of the write cache while a front-end is connected: who changes it, and who remembers it.

VIRTIO 1.2 §5.2.6.2. The driver sets it, and believes in it from then on, whatever becomes of the daemon. So it is noted
where requests in flight are tracked (vhost/device_note.py), in memory that the front-end gives to the next daemon. A
daemon that is killed between the note and the change must not have noted what is less safe: write-through is noted
before it is in force, write-back afterwards.

Knows nothing about messages.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from vhostblk.errors import BlockError, PeerError
from vhostblk.export.blk_device import BlkDevice
from vhostblk.export.data_path import DataPath
from vhostblk.export.error_log import ErrorLog
from vhostblk.vhost.device_note import DeviceNote
from vhostblk.vhost.device_state import DeviceState

__all__ = ["CacheMode"]


class CacheMode:
    """See the module.

    Args:
        device, path: whose mode it is, and who must know.
        offences: where changes are told, because a guest can make them all day.

    Context: the control loop. Owns: the view of the note.
    """

    def __init__(self, device: BlkDevice, path: DataPath, offences: ErrorLog) -> None:
        self._device = device
        self._path = path
        self._offences = offences
        self._note: DeviceNote | None = None
        self._is_set = False  # since this front-end has connected

    def state(self) -> DeviceState:
        """What the next back-end has to know."""
        device = self._device
        return DeviceState(device.capacity, device.writeback, device.is_drivers_mode)

    async def change(self, change: Callable[[], None]) -> None:
        """Do something that may change the mode; it is in force when this returns.

        Raises:
            PeerError: what had completed cannot be made durable. And what `change` raises.
        """
        before = self._device.write_through
        change()
        self._is_set = True
        if not self._device.writeback:
            self.remember()
        after = self._device.write_through
        if after != before:
            mode = "write through" if after else "write back"
            self._offences.record(f"the guest made its write cache {mode}", level=logging.INFO)
            await self._path.set_write_through(after)
            if after:
                await self._make_durable()
        self.remember()

    async def take_over(self, state: DeviceState) -> bool:
        """Have the mode that the driver believes in; says whether the disk has another size than it has seen."""
        device = self._device
        if state.is_binding and state.writeback != device.writeback:
            await self.change(lambda: device.take_over(writeback=state.writeback))
        return state.capacity != device.capacity

    async def use_note(self, note: DeviceNote | None) -> bool:
        """Look at what was noted, and note there from now on; says the same.

        What the driver has set here already is newer than any note.
        """
        if self._note is not None:
            self._note.close()
        self._note = note
        state = note.read() if note is not None else None
        other_size = False
        if state is not None and not self._is_set:
            other_size = await self.take_over(state)
        self.remember()
        return other_size

    def remember(self) -> None:
        """Note what is so now."""
        if self._note is not None:
            self._note.write(self.state())

    async def _make_durable(self) -> None:
        """Everything that completed while the guest had a write cache is on the disk when this returns."""
        try:
            # Only ours: a guest that does this all day must not hold up the node's other users.
            await self._device.backend.settle()
            await self._device.backend.flush()
        except BlockError as exc:
            raise PeerError(f"the flush that ends write-back failed: {exc}") from None
