"""The block device's formats: configuration space, request header, segments and their numbers.

VIRTIO 1.2 §5.2.4 (configuration) and §5.2.6 (requests); the zoned fields at the end are those of
VIRTIO 1.3. What a device answers in them is decided elsewhere.
"""

from __future__ import annotations

import dataclasses
import enum
import struct

from vhostblk.errors import GuestError

__all__ = [
    "CONFIG_SIZE",
    "HEADER",
    "ID_BYTES",
    "SECTOR",
    "SEGMENT",
    "SEGMENT_F_UNMAP",
    "WRITEBACK_OFFSET",
    "BlkConfig",
    "RequestType",
    "Status",
]

SECTOR = 512
"""Bytes of a sector: the unit of the protocol, whatever the block size is."""
ID_BYTES = 20
"""Bytes of the answer to VIRTIO_BLK_T_GET_ID."""

HEADER = struct.Struct("<IIQ")
"""struct virtio_blk_req up to its data: type, reserved, sector."""
SEGMENT = struct.Struct("<QII")
"""struct virtio_blk_discard_write_zeroes: sector, num_sectors, flags."""
SEGMENT_F_UNMAP = 1


class RequestType(enum.IntEnum):
    """VIRTIO_BLK_T_*."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    GET_LIFETIME = 10
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14


class Status(enum.IntEnum):
    """VIRTIO_BLK_S_*."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


# struct virtio_blk_config, packed, little-endian; padding is written as zeroes (§5.2.5.2).
_CONFIG = struct.Struct("<QII HBB I BBHI BxH III IIB3x III IIIIIB3x")
CONFIG_SIZE = _CONFIG.size
"""Bytes of the whole configuration space, zoned fields included."""
WRITEBACK_OFFSET = 32
"""Where the one byte is that the driver may write."""


@dataclasses.dataclass(frozen=True, slots=True)
class BlkConfig:
    """struct virtio_blk_config, every field in its own unit (VIRTIO 1.2 §5.2.4).

    Fields whose feature is not offered stay 0.
    """

    capacity: int = 0
    """Sectors of 512 bytes."""
    size_max: int = 0
    """Bytes of the longest segment; VIRTIO_BLK_F_SIZE_MAX."""
    seg_max: int = 0
    """Data segments of a request; VIRTIO_BLK_F_SEG_MAX."""
    cylinders: int = 0
    heads: int = 0
    sectors: int = 0
    blk_size: int = 0
    """Bytes of a logical block; VIRTIO_BLK_F_BLK_SIZE."""
    physical_block_exp: int = 0
    """Log2 of logical blocks per physical block; this and the next three: VIRTIO_BLK_F_TOPOLOGY."""
    alignment_offset: int = 0
    """First aligned logical block."""
    min_io_size: int = 0
    """Logical blocks."""
    opt_io_size: int = 0
    """Logical blocks."""
    writeback: int = 0
    """1: completed writes are volatile until a flush; VIRTIO_BLK_F_CONFIG_WCE."""
    num_queues: int = 0
    max_discard_sectors: int = 0
    max_discard_seg: int = 0
    discard_sector_alignment: int = 0
    """Sectors of 512 bytes."""
    max_write_zeroes_sectors: int = 0
    max_write_zeroes_seg: int = 0
    write_zeroes_may_unmap: int = 0
    max_secure_erase_sectors: int = 0
    max_secure_erase_seg: int = 0
    secure_erase_sector_alignment: int = 0
    zone_sectors: int = 0
    max_open_zones: int = 0
    max_active_zones: int = 0
    max_append_sectors: int = 0
    write_granularity: int = 0
    """Bytes."""
    zone_model: int = 0

    def to_bytes(self) -> bytes:
        """Encode the whole space, `CONFIG_SIZE` bytes."""
        return _CONFIG.pack(*(getattr(self, field.name) for field in dataclasses.fields(self)))

    @classmethod
    def from_bytes(cls, data: bytes) -> BlkConfig:
        """Decode a space of any length; what is beyond its end is 0."""
        return cls(*_CONFIG.unpack(data[:CONFIG_SIZE].ljust(CONFIG_SIZE, b"\0")))

    def read(self, offset: int, length: int) -> bytes:
        """Give `length` bytes from `offset`; bytes beyond the space are 0."""
        return self.to_bytes()[offset : offset + length].ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> BlkConfig:
        """Give what the space is after the driver has written `data` at `offset`.

        Only `writeback` is the driver's to change (VIRTIO 1.2 §5.2.5); writing other fields to what
        they are is harmless.

        Raises:
            GuestError: outside the space, another field would change, or a cache mode that is none.
        """
        space = bytearray(self.to_bytes())
        if offset < 0 or offset + len(data) > len(space):
            raise GuestError(f"config write [{offset}, +{len(data)}) is outside the space")
        space[offset : offset + len(data)] = data
        written = dataclasses.replace(self, writeback=space[WRITEBACK_OFFSET])
        if written.writeback > 1 or space != written.to_bytes():
            raise GuestError(f"config write [{offset}, +{len(data)}): only writeback is writable")
        return written
