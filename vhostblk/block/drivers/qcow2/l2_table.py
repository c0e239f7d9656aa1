"""One L2 table of a survey, and which of its entries can be looked at together.

Knows nothing about what is right and what is wrong.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from vhostblk.block.drivers.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK
from vhostblk.block.drivers.qcow2.header import Header
from vhostblk.block.drivers.qcow2.tables import OFFSETS, Table, count_alike
from vhostblk.block.lean_dataclass import lean_dataclass

_ZERO = 1
# Neighbours that are looked at to see how long runs are.
_SAMPLES = 64


@lean_dataclass(slots=True)
class L2Table:
    """One that was read.

    Attributes: bitmaps: of subclusters, if there are any. times: who refers to it. active: how many of those are in the
        active L1 table.
    """

    offset: int
    entries: Table
    bitmaps: Table | None
    times: int
    active: int

    def to_bytes(self, first: int, end: int) -> bytes:
        """These entries as they are in the file."""
        if self.bitmaps is None:
            return OFFSETS.encode(self.entries[first:end])
        pairs = array("Q", [0]) * (2 * (end - first))
        pairs[::2] = self.entries[first:end]
        pairs[1::2] = self.bitmaps[first:end]
        return OFFSETS.encode(pairs)


class L2Entries:
    """What entries are like in an image with this header."""

    def __init__(self, header: Header) -> None:
        self._extended, self._has_data_file = header.has_subclusters, header.has_data_file
        self._size = header.cluster_size

    def is_scattered(self, table: L2Table) -> bool:
        """Whether runs of clusters are so short that it is faster to look at each; a guess."""
        if self._extended or self._has_data_file:
            return False
        entries, size = table.entries, self._size
        step = max(len(entries) // _SAMPLES, 1)
        pairs = zip(entries[:-1:step], entries[1::step], strict=True)
        breaks = sum([after - one not in (0, size) for one, after in pairs])
        return breaks > _SAMPLES // 8

    def has_place(self, entry: int) -> bool:
        """Whether an entry, not of a compressed cluster, names a place of a cluster."""
        if entry & OFFSET_MASK:
            return True
        if not self._has_data_file:
            return False
        is_zero = entry & _ZERO and not self._extended
        return bool(entry & COPIED) and not is_zero

    def runs(self, table: L2Table) -> Iterator[tuple[int, int, int, int]]:
        """Entries that can be looked at together: index, how many, the first, its bitmap.

        They have all the same bits, and either no place or consecutive ones.
        """
        entries, bitmaps = table.entries, table.bitmaps
        at, end = 0, len(entries)
        while at < end:
            entry = entries[at]
            bitmap = bitmaps[at] if bitmaps is not None else 0
            step = self._size if entry & OFFSET_MASK else 0
            count = 1
            is_plain = not entry & COMPRESSED and not entry & OFFSET_MASK & (self._size - 1)
            if at + 1 < end and entries[at + 1] != entry + step:
                pass  # most runs of one are seen at once
            elif is_plain and (entry & OFFSET_MASK) + (end - at) * step <= OFFSET_MASK:
                count = count_alike(entries, at, entry, step)
                if bitmaps is not None:
                    count = min(count, count_alike(bitmaps, at, bitmap, 0))
            yield at, count, entry, bitmap
            at += count
