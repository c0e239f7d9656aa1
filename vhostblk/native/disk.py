"""What engine threads know of a disk: `struct vb_disk`, and the extents of its map.

Knows nothing of the block layer: an extent is a range of a file here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from vhostblk.native.binding import address_of, check, engine, ffi, lib, pointer_of
from vhostblk.native.constants import Op
from vhostblk.native.dirty import DirtyMap

__all__ = ["Disk", "Extents", "extents"]

_EXTENT = struct.Struct("=QQQiIII")


class Disk:
    """What engine threads know of an export.

    Args:
        disk_id: echoed in messages.
        capacity: bytes, a multiple of 512.
        read_only: requests that modify fail.
        max_segments: of a DISCARD or WRITE_ZEROES.
        serial: at most 20 bytes, for GET_ID.
        max_extents: bound of each thread's extent map (48 bytes an entry).
        ask_after_errors: requests that control decides about (`RequestFlag.FAILED`) when their I/O has failed.

    Context: the control thread. Owns: one reference; threads it is attached to hold others.
    """

    def __init__(
        self,
        *,
        disk_id: int,
        capacity: int,
        read_only: bool = False,
        max_segments: int = 1,
        serial: bytes = b"",
        max_extents: int = 65536,
        ask_after_errors: Iterable[Op] = (),
    ) -> None:
        lib = engine()
        if len(serial) > 20:
            raise ValueError(f"a serial has at most 20 bytes, not {len(serial)}")
        config = ffi.new("struct vb_disk_config *")
        config.id = disk_id
        config.capacity = capacity
        config.read_only = read_only
        config.max_segments = max_segments
        config.max_extents = max_extents
        config.ask_after_errors = sum(1 << op for op in set(ask_after_errors))
        ffi.memmove(config.serial, serial, len(serial))
        ret = ffi.new("struct vb_disk **")
        check(lib.vb_disk_create(config, ret), f"disk of {capacity} bytes")
        self._disk = ret[0]
        self._dirty: DirtyMap | None = None
        self.id = disk_id

    @property
    def pointer(self) -> int:
        """For messages."""
        return pointer_of(self._disk)

    @property
    def write_gen(self) -> int:
        """How many writes of the engine's have ended, also those that failed."""
        return int(lib.vb_disk_write_gen(self._disk))

    def take_highest_write(self) -> int:
        """Where the write that reached furthest since this was last asked has ended, bytes; 0: none did."""
        return int(lib.vb_disk_take_highest_write(self._disk))

    def set_dirty_map(self, dirty: DirtyMap | None) -> None:
        """Have writes marked from now on; the map is kept until another one is set."""
        lib.vb_disk_set_dirty_map(self._disk, ffi.NULL if dirty is None else dirty.struct)
        self._dirty = dirty

    @property
    def flush_failed(self) -> int:
        """The errno of an fdatasync of the engine that has failed, ever; or 0."""
        return int(lib.vb_disk_flush_failed(self._disk))

    def set_capacity(self, capacity: int) -> None:
        """Bytes; requests that start later see it. Shrinking: then revoke what is gone."""
        lib.vb_disk_set_capacity(self._disk, capacity)

    def set_write_through(self, write_through: bool) -> None:
        """Whether every write that starts later is durable when it completes."""
        lib.vb_disk_set_write_through(self._disk, write_through)

    def close(self) -> None:
        """Give up the reference. Idempotent."""
        disk, self._disk = self._disk, ffi.NULL
        lib.vb_disk_unref(disk)


class Extents:
    """A `struct vb_extent` array; keep it until VB_MAP is acknowledged."""

    def __init__(self, buffer: bytes, count: int) -> None:
        self._buffer = buffer
        self.count = count
        self.pointer = address_of(buffer)
        """For VB_MAP."""


def extents(entries: Iterable[tuple[int, int, int, int, int, int, int]]) -> Extents:
    """Build the argument of VB_MAP.

    Args:
        entries: offset, length, host offset, fd, flags, request alignment, memory alignment.
    """
    engine()
    packed = [_EXTENT.pack(*entry) for entry in entries]
    return Extents(b"".join(packed), len(packed))
