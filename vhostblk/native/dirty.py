"""A map that engine threads mark where they write: `struct vb_dirty_map`.

Knows nothing of dirty bitmaps.
"""

from __future__ import annotations

import mmap
import struct
from typing import Any

from vhostblk.native.binding import address_of, engine, ffi, lib

__all__ = ["DirtyMap"]

_RANGE = struct.Struct("=QQ")
_BATCH = 4096


class DirtyMap:
    """One bit for each granule of a disk.

    Args:
        length: bytes that it is about; what is written beyond is not marked.
        granularity: bytes of a granule, a power of two.

    Raises:
        OSError: out of memory.

    Context: the control thread. Must live until every thread of its disk has answered a command that was sent after
    another map was set.
    """

    def __init__(self, length: int, granularity: int) -> None:
        engine()
        self.length = length
        self.granularity = granularity
        bits = -(-length // granularity)
        # Pages that nobody writes to cost nothing.
        self._words = mmap.mmap(
            -1, max(-(-bits // 64) * 8, 8), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        self.struct: Any = ffi.new("struct vb_dirty_map *")
        self.struct.words = address_of(self._words)
        self.struct.bits = bits
        self.struct.shift = granularity.bit_length() - 1

    def take(self) -> list[tuple[int, int]]:
        """What was marked since the last time: offset and length in bytes, in order.

        The last may end beyond `length`.
        """
        found: list[tuple[int, int]] = []
        word = ffi.new("uint64_t *")
        buffer = bytearray(_BATCH * _RANGE.size)
        ranges = ffi.from_buffer("struct vb_range[]", buffer)
        while count := lib.vb_dirty_map_take(self.struct, word, ranges, _BATCH):
            found.extend(_RANGE.iter_unpack(memoryview(buffer)[: count * _RANGE.size]))
        return found
