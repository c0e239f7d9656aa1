"""Which parts of a node were written: the map under dirty bitmaps (block layer rows B16.12 and B29.7).

Theory of operation: a map that is attached to a node (`record`) is marked by the pipeline when a write, zero-write or
discard ends, however it ended. What somebody above writes through extents he remembers by himself: an extent of a node
with maps says how finely (`HostExtent.record`), and `collect` brings what he has remembered into the maps.

Knows nothing about names and states of bitmaps, nor about the engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from vhostblk.block.extent import ExtentFlag, HostExtent
from vhostblk.block.limits import SECTOR_SIZE

if TYPE_CHECKING:
    from vhostblk.block.node import BlockNode

_DIRTY = re.compile(rb"[^\0]+")


class DirtyMap:
    """Which granules of a range of bytes are dirty.

    Args:
        length: bytes that it is about; what is marked beyond is left out.
        granularity: bytes of a granule, a power of two of at least a sector (row B29.1).
    """

    def __init__(self, length: int, granularity: int) -> None:
        assert granularity >= SECTOR_SIZE, granularity
        assert granularity & (granularity - 1) == 0, granularity
        self.length = length
        self.granularity = granularity
        self._shift = granularity.bit_length() - 1
        self._bits = bytearray(self._size(length))

    def _size(self, length: int) -> int:
        granules = -(-length >> self._shift) if length else 0
        return -(-granules // 8)

    def mark(self, offset: int, length: int) -> None:
        """Every granule that the range touches is dirty."""
        end = min(offset + length, self.length)
        if offset >= end:
            return
        first, last = offset >> self._shift, (end - 1) >> self._shift
        low, high = 0xFF << (first & 7) & 0xFF, 0xFF >> (7 - (last & 7))
        start, stop = first >> 3, last >> 3
        if start == stop:
            self._bits[start] |= low & high
            return
        self._bits[start] |= low
        self._bits[stop] |= high
        self._bits[start + 1 : stop] = b"\xff" * (stop - start - 1)

    def unmark(self, offset: int, length: int) -> None:
        """Every granule that is wholly in the range, as far as the map goes, is clean."""
        end = min(offset + length, self.length)
        last = self._granules if end == self.length else end >> self._shift
        first = -(-offset >> self._shift)
        if first >= last:
            return
        start, stop = first >> 3, (last - 1) >> 3
        low, high = 0xFF << (first & 7) & 0xFF, 0xFF >> (7 - (last - 1 & 7))
        if start == stop:
            self._bits[start] &= ~(low & high)
            return
        self._bits[start] &= ~low
        self._bits[stop] &= ~high
        self._bits[start + 1 : stop] = bytes(stop - start - 1)

    @property
    def _granules(self) -> int:
        return -(-self.length >> self._shift)

    def is_dirty(self, offset: int) -> bool:
        """Whether the granule that has this byte is."""
        if not 0 <= offset < self.length:
            return False
        index = offset >> self._shift
        return bool(self._bits[index >> 3] >> (index & 7) & 1)

    def count(self) -> int:
        """Bytes in granules that are dirty; the last one counts as a whole."""
        return int.from_bytes(self._bits).bit_count() << self._shift

    def merge(self, other: DirtyMap) -> None:
        """What is dirty there is dirty here, too."""
        if other.granularity == self.granularity and other.length == self.length:
            both = int.from_bytes(self._bits) | int.from_bytes(other._bits)
            self._bits[:] = both.to_bytes(len(self._bits))
            return
        for offset, length in other.ranges():
            self.mark(offset, length)

    def to_bytes(self) -> bytes:
        """A bit for each granule, the first one in the lowest bit of the first byte, as qcow2 has it."""
        return bytes(self._bits)

    def load(self, bits: bytes | bytearray) -> None:
        """The reverse of `to_bytes`; bits that are missing are 0, bits beyond the end are left out."""
        self._bits[:] = bits[: len(self._bits)].ljust(len(self._bits), b"\0")
        self._cut()

    def ranges(self) -> Iterator[tuple[int, int]]:
        """What is dirty: offset and length in bytes, in order, as long as possible. The last may end in a granule."""
        begin = end = 0
        for found in _DIRTY.finditer(self._bits):
            for index in range(found.start(), found.end()):
                byte = self._bits[index]
                for bit in range(8):
                    if not byte >> bit & 1:
                        continue
                    at = (index * 8 + bit) << self._shift
                    if at != end:
                        if end > begin:
                            yield begin, end - begin
                        begin = at
                    end = at + self.granularity
        end = min(end, self.length)
        if end > begin:
            yield begin, end - begin

    def take(self) -> list[tuple[int, int]]:
        """What is dirty, as `ranges`; nothing is, when this returns."""
        taken = list(self.ranges())
        self._bits = bytearray(len(self._bits))
        return taken

    def resize(self, length: int) -> None:
        """The node's length has changed: what is new is not dirty."""
        self.length = length
        size = self._size(length)
        del self._bits[size:]
        self._bits += bytes(size - len(self._bits))
        self._cut()

    def _cut(self) -> None:
        unused = len(self._bits) * 8 - self._granules
        if unused:
            self._bits[-1] &= 0xFF >> unused


async def record(node: BlockNode, dirty: DirtyMap) -> None:
    """From when this returns, whatever changes the node is marked."""
    collect(node)  # what happened before is no business of this map
    node.write_log.dirty_maps.append(dirty)
    await node.revoke(0, node.length)


async def stop_recording(node: BlockNode, dirty: DirtyMap) -> None:
    """Undo `record`: the map has everything that ended before the call."""
    collect(node)
    node.write_log.dirty_maps.remove(dirty)
    await node.revoke(0, node.length)


def collect(node: BlockNode) -> None:
    """Bring what was written through extents into the maps of the node, and of all nodes around it."""
    node.collect_writes(ranges=True)


def recorded(node: BlockNode, extent: HostExtent) -> HostExtent:
    """A writable extent of a node, with what its user has to remember; not writable if that helps nobody below."""
    if extent.record and all(
        node.child_range(edge, extent.offset) is None for edge in node.children.values()
    ):
        return extent.without(ExtentFlag.WRITE)
    wanted = [dirty.granularity for dirty in node.write_log.dirty_maps]
    if extent.record:
        wanted.append(extent.record)
    return replace(extent, record=min(wanted))
