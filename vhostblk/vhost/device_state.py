"""What a back-end tells the next one about its device, in bytes.

vhost-user, "Migrating back-end state", SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE.

The front-end restores memory, features, rings and, in a region of their own, requests in flight. Two
things it does not know. The write cache that the driver believes in: a driver that was told, or has
said, that writes are durable when they complete sends no flushes, and must find the same again. And
how large the disk is that it has seen.

The format is ours: a header, the fields, a checksum over both. Versions that are not known are
refused, as is whatever is longer or shorter than it says.

Knows nothing about fds.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Self

from vhostblk.errors import PeerError

__all__ = ["STATE_SIZE", "DeviceState"]

_MAGIC = b"vhostblk"
_VERSION = 1
_LAYOUT = struct.Struct("<8sIIQ")
"""Magic, version, flags, capacity; always little-endian: it travels between machines."""
_CHECKSUM = struct.Struct("<I")
_WRITEBACK = 1
_IS_DRIVERS = 2

STATE_SIZE = _LAYOUT.size + _CHECKSUM.size
"""Bytes."""


@dataclass(frozen=True)
class DeviceState:
    """What is handed over.

    Attributes:
        capacity: bytes of the disk.
        writeback: the mode of the write cache that the driver believes in.
        is_drivers: it has chosen that mode; otherwise it was told.
    """

    capacity: int
    writeback: bool
    is_drivers: bool

    @property
    def is_binding(self) -> bool:
        """Whether the next device must have this mode, whatever it was configured to.

        A driver that knows of a write cache flushes it, which hurts no device that has none. The
        other way round it would lose what it believes to be safe.
        """
        return self.is_drivers or not self.writeback

    def pack(self) -> bytes:
        """Encode."""
        flags = (_WRITEBACK if self.writeback else 0) | (_IS_DRIVERS if self.is_drivers else 0)
        data = _LAYOUT.pack(_MAGIC, _VERSION, flags, self.capacity)
        return data + _CHECKSUM.pack(zlib.crc32(data))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Decode exactly `data`.

        Raises:
            PeerError: it is not a state, not whole, or of a version that is not known.
        """
        if data[: len(_MAGIC)] != _MAGIC:
            raise PeerError("device state: not one of vhostblk's")
        if len(data) < len(_MAGIC) + 4:
            raise PeerError(f"device state: ends after {len(data)} bytes")
        version = int.from_bytes(data[len(_MAGIC) : len(_MAGIC) + 4], "little")
        if version != _VERSION:
            raise PeerError(f"device state: version {version}, {_VERSION} is known")
        if len(data) != STATE_SIZE:
            raise PeerError(f"device state: {len(data)} bytes where {STATE_SIZE} belong")
        body = data[: _LAYOUT.size]
        if data[_LAYOUT.size :] != _CHECKSUM.pack(zlib.crc32(body)):
            raise PeerError("device state: its checksum is wrong")
        _, _, flags, capacity = _LAYOUT.unpack(body)
        if flags & ~(_WRITEBACK | _IS_DRIVERS):
            raise PeerError(f"device state: flags {flags:#x}")
        return cls(capacity, bool(flags & _WRITEBACK), bool(flags & _IS_DRIVERS))
