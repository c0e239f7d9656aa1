"""What vhost-user messages carry: one frozen dataclass per payload, its fields in wire order.

vhost-user, "Payload". All numbers are in the machine's native byte order, struct's "=".
`unpack` checks syntax only, `pack` only that the numbers fit: tests send nonsense on purpose.

Knows nothing about which request a payload belongs to.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from typing import ClassVar, Self

from vhostblk.errors import PeerError

__all__ = [
    "MAX_CONFIG_SIZE",
    "MAX_TABLE_REGIONS",
    "ConfigSpace",
    "DeviceStateTransfer",
    "Empty",
    "InflightDescription",
    "LogArea",
    "Malformed",
    "MemoryRegion",
    "MemoryTable",
    "Payload",
    "Raw",
    "SingleRegion",
    "U64",
    "VringAddress",
    "VringFile",
    "VringState",
]

MAX_TABLE_REGIONS = 8
"""SET_MEM_TABLE has room for so many; more need ADD_MEM_REG."""
MAX_CONFIG_SIZE = 256
"""Bytes of configuration space one message may carry (QEMU's VHOST_USER_MAX_CONFIG_SIZE)."""


class Payload:
    """What follows a header. Subclasses are frozen dataclasses with the fields in wire order."""

    def pack(self) -> bytes:
        """Encode. Raises `struct.error` for values that do not fit their fields."""
        raise NotImplementedError

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Decode exactly `data`.

        Raises:
            PeerError: the size or the layout is wrong.
        """
        raise NotImplementedError


def _unpack(layout: struct.Struct, data: bytes) -> tuple[int, ...]:
    if len(data) != layout.size:
        raise PeerError(f"payload of {len(data)} bytes where {layout.size} belong")
    return layout.unpack(data)


@dataclass(frozen=True)
class Empty(Payload):
    """No payload."""

    def pack(self) -> bytes:
        return b""

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if data:
            raise PeerError(f"payload of {len(data)} bytes where none belongs")
        return cls()


@dataclass(frozen=True)
class U64(Payload):
    """A single 64-bit integer."""

    value: int
    _layout: ClassVar[struct.Struct] = struct.Struct("=Q")

    def pack(self) -> bytes:
        return self._layout.pack(self.value)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*_unpack(cls._layout, data))


@dataclass(frozen=True)
class VringState(Payload):
    """A vring and a number about it: its size, its base, whether it is enabled."""

    index: int
    num: int
    _layout: ClassVar[struct.Struct] = struct.Struct("=II")

    def pack(self) -> bytes:
        return self._layout.pack(self.index, self.num)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*_unpack(cls._layout, data))


@dataclass(frozen=True)
class VringAddress(Payload):
    """Where a vring is, in the front-end's address space (uva)."""

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int
    _layout: ClassVar[struct.Struct] = struct.Struct("=IIQQQQ")

    def pack(self) -> bytes:
        return self._layout.pack(self.index, self.flags, self.desc, self.used, self.avail, self.log)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*_unpack(cls._layout, data))


@dataclass(frozen=True)
class VringFile(Payload):
    """A vring whose kick, call or error fd comes along, unless `has_fd` is false (bit 8)."""

    index: int
    has_fd: bool = True
    _layout: ClassVar[struct.Struct] = struct.Struct("=Q")

    def pack(self) -> bytes:
        return self._layout.pack(self.index | (0 if self.has_fd else 0x100))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        (value,) = _unpack(cls._layout, data)
        if value >> 9:
            raise PeerError(f"vring number with unknown bits: {value:#x}")
        return cls(value & 0xFF, not value & 0x100)


@dataclass(frozen=True)
class LogArea(Payload):
    """Where the log of dirty pages is in the file that comes along; its first bit is guest address 0's."""

    size: int
    offset: int
    _layout: ClassVar[struct.Struct] = struct.Struct("=QQ")

    def pack(self) -> bytes:
        return self._layout.pack(self.size, self.offset)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*_unpack(cls._layout, data))


@dataclass(frozen=True)
class MemoryRegion:
    """One region of guest memory; it begins `mmap_offset` bytes into the file that comes along."""

    gpa: int
    size: int
    uva: int
    mmap_offset: int
    layout: ClassVar[struct.Struct] = struct.Struct("=QQQQ")

    def pack(self) -> bytes:
        return self.layout.pack(self.gpa, self.size, self.uva, self.mmap_offset)

    def __str__(self) -> str:
        return f"region gpa {self.gpa:#x} uva {self.uva:#x} size {self.size:#x}"


@dataclass(frozen=True)
class MemoryTable(Payload):
    """All regions at once (SET_MEM_TABLE)."""

    regions: tuple[MemoryRegion, ...]

    def pack(self) -> bytes:
        return struct.pack("=II", len(self.regions), 0) + b"".join(r.pack() for r in self.regions)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        entry = MemoryRegion.layout.size
        if len(data) < 8 or (len(data) - 8) % entry or len(data) > 8 + MAX_TABLE_REGIONS * entry:
            raise PeerError(f"memory table of {len(data)} bytes")
        count = int.from_bytes(data[:4], sys.byteorder)
        present = (len(data) - 8) // entry
        # The specification draws a table of eight entries; QEMU sends as many as it uses.
        if count > present:
            raise PeerError(f"memory table says {count} regions and has {present}")
        return cls(
            tuple(
                MemoryRegion(*MemoryRegion.layout.unpack_from(data, 8 + i * entry))
                for i in range(count)
            )
        )


@dataclass(frozen=True)
class SingleRegion(Payload):
    """One region to add or to remove."""

    region: MemoryRegion

    def pack(self) -> bytes:
        return bytes(8) + self.region.pack()

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if len(data) != 40:
            raise PeerError(f"memory region of {len(data)} bytes where 40 belong")
        return cls(MemoryRegion(*MemoryRegion.layout.unpack_from(data, 8)))


@dataclass(frozen=True)
class ConfigSpace(Payload):
    """A piece of the device's configuration space.

    `data` is empty, in requests to read only, where the front-end sent no buffer along.
    """

    offset: int
    size: int
    flags: int
    data: bytes
    _layout: ClassVar[struct.Struct] = struct.Struct("=III")

    def pack(self) -> bytes:
        return self._layout.pack(self.offset, self.size, self.flags) + self.data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        head = cls._layout.size
        offset, size, flags = _unpack(cls._layout, data[:head])
        if not 1 <= size <= MAX_CONFIG_SIZE:
            raise PeerError(
                f"{size} bytes of configuration space, allowed are 1..{MAX_CONFIG_SIZE}"
            )
        if len(data) - head not in (0, size):
            raise PeerError(f"{len(data) - head} bytes of configuration space instead of {size}")
        return cls(offset, size, flags, data[head:])


@dataclass(frozen=True)
class InflightDescription(Payload):
    """Where in a file, and for which queues, requests in flight are tracked.

    The text has 20 bytes. Front-ends and back-ends send a C structure of 24, the last four of which
    mean nothing; a request of either size is understood, and answered in its own.
    """

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int
    is_padded: bool = True
    _layout: ClassVar[struct.Struct] = struct.Struct("=QQHH")
    _PADDING: ClassVar[bytes] = bytes(4)

    def pack(self) -> bytes:
        fields = (self.mmap_size, self.mmap_offset, self.num_queues, self.queue_size)
        return self._layout.pack(*fields) + (self._PADDING if self.is_padded else b"")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        is_padded = len(data) == cls._layout.size + len(cls._PADDING)
        fields = _unpack(cls._layout, data[: cls._layout.size] if is_padded else data)
        mmap_size, mmap_offset, num_queues, queue_size = fields
        return cls(mmap_size, mmap_offset, num_queues, queue_size, is_padded)


@dataclass(frozen=True)
class DeviceStateTransfer(Payload):
    """Which way the device's state goes (0: out of the back-end, 1: into it), and when (0: suspended)."""

    direction: int
    phase: int
    _layout: ClassVar[struct.Struct] = struct.Struct("=II")

    def pack(self) -> bytes:
        return self._layout.pack(self.direction, self.phase)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*_unpack(cls._layout, data))


@dataclass(frozen=True)
class Raw(Payload):
    """Bytes of a request this module has no row for, or bytes to be sent as they are."""

    data: bytes

    def pack(self) -> bytes:
        return self.data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(data)


@dataclass(frozen=True)
class Malformed(Payload):
    """A payload that does not have the layout of its request."""

    reason: str

    def pack(self) -> bytes:
        raise TypeError("a malformed payload is only ever received")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        raise TypeError("a malformed payload has no layout")
