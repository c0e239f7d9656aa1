"""What an entry of an L2 table says about a cluster (qcow2 specification, "Cluster mapping" and "Extended L2 Entries").

Numbers in, facts out. An entry is one number, or two where the image has subclusters. Knows nothing about files.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vhostblk.block.drivers.qcow2.header import SUBCLUSTERS, Header
from vhostblk.errors import ImageError

COPIED = 1 << 63
COMPRESSED = 1 << 62
_ZERO = 1
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
# Bits of an L1 entry, and of a standard descriptor, that have no meaning yet.
L1_RESERVED = 0x7F00_0000_0000_01FF
_SECTOR = 512
_ALL = (1 << SUBCLUSTERS) - 1


class Kind(enum.Enum):
    """Where the bytes of a subcluster come from; without subclusters a cluster is one."""

    UNALLOCATED = "unallocated"  # the backing file, or zeroes
    ZERO = "zero"
    NORMAL = "normal"
    COMPRESSED = "compressed"


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of the disk that come from the same place, in one piece.

    Attributes:
        start, end: on the disk.
        host: where `start` is in the file that has the data; 0 where there is no such place. NORMAL always has one; the
            others have one if room was allocated for them.
        copied: nobody else uses the host cluster, so it may be written.
        compressed: how many bytes from `host` on have the compressed cluster, at most.
    """

    kind: Kind
    start: int
    end: int
    host: int = 0
    has_host: bool = False
    compressed: int = 0
    copied: bool = False


class EntryReader:
    """Reads entries of one image."""

    def __init__(self, header: Header) -> None:
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._extended = header.has_subclusters
        self._subcluster_size = header.subcluster_size
        self._has_data_file = header.has_data_file
        self._has_zeroes = header.version >= 3 and not header.has_subclusters
        # "Compressed Clusters Descriptor".
        self._offset_bits = 62 - (header.cluster_bits - 8)

    def run_at(
        self, table: Sequence[int], base: int, offset: int, limit: int, since: int = 0
    ) -> Run:
        """The longest run around `offset`, within what the table covers.

        Args:
            table: entries; those with subclusters take two numbers each.
            base: what the first entry is for: bytes on the disk.
            limit: no need to look behind this; the run may end there.
            since: no need to look before this.

        Raises:
            ImageError: the entry at `offset` is wrong.
        """
        found = self.part_at(table, base, offset)
        if found.kind is Kind.COMPRESSED:
            return found
        end_of_table = base + len(table) // (2 if self._extended else 1) * self._cluster_size
        start, end, last = found.start, found.end, found
        while end < min(limit, end_of_table):
            following = self._neighbour(table, base, end)
            if following is None or not _continues(last, following):
                break
            last, end = following, following.end
        host = found.host
        while start > max(base, since):
            before = self._neighbour(table, base, start - 1)
            if before is None or not _continues(before, found):
                break
            found, start, host = before, before.start, before.host
        return Run(found.kind, start, end, host, found.has_host, copied=found.copied)

    def _neighbour(self, table: Sequence[int], base: int, offset: int) -> Run | None:
        """None if the entry is wrong: that is the business of whoever reads there."""
        try:
            return self.part_at(table, base, offset)
        except ImageError:
            return None

    def part_at(self, table: Sequence[int], base: int, offset: int) -> Run:
        """What one entry says of the subclusters around `offset` that are alike.

        Raises:
            ImageError: it is wrong.
        """
        index = (offset - base) >> self._cluster_bits
        start = base + (index << self._cluster_bits)
        entry = table[2 * index] if self._extended else table[index]
        if entry & COMPRESSED:
            return self._compressed(entry, start)
        host = entry & OFFSET_MASK
        copied = bool(entry & COPIED)
        has_host = bool(host or (self._has_data_file and copied))
        copied = copied and has_host
        if host & (self._cluster_size - 1):
            raise ImageError(
                f"Cluster allocation offset {host:#x} unaligned (guest offset {start:#x})"
            )
        if self._has_data_file and has_host and host != start:
            raise ImageError(
                f"External data file host cluster offset {host:#x} does not match guest cluster offset: {start:#x}"
            )
        if self._extended:
            run = self._subclusters(table[2 * index + 1], start, offset, host, has_host)
            return replace(run, copied=copied)
        if entry & _ZERO and self._has_zeroes:
            kind = Kind.ZERO
        elif entry & _ZERO:
            raise ImageError(f"Zero cluster in a version 2 image (guest offset {start:#x})")
        else:
            kind = Kind.NORMAL if has_host else Kind.UNALLOCATED
        return Run(kind, start, start + self._cluster_size, host, has_host, copied=copied)

    def _subclusters(self, bitmap: int, start: int, offset: int, host: int, has_host: bool) -> Run:
        allocated, zero = bitmap & _ALL, bitmap >> SUBCLUSTERS
        if allocated & zero:
            raise ImageError(f"Invalid subcluster bitmap {bitmap:#x} (guest offset {start:#x})")
        if allocated and not has_host:
            raise ImageError(f"Subclusters without a host cluster (guest offset {start:#x})")
        first = (offset - start) // self._subcluster_size
        if allocated >> first & 1:
            kind, alike = Kind.NORMAL, allocated
        elif zero >> first & 1:
            kind, alike = Kind.ZERO, zero
        else:
            kind, alike = Kind.UNALLOCATED, ~(allocated | zero) & _ALL
        last = first + 1
        while last < SUBCLUSTERS and alike >> last & 1:
            last += 1
        while first and alike >> first - 1 & 1:
            first -= 1
        skip = first * self._subcluster_size
        return Run(
            kind,
            start + skip,
            start + last * self._subcluster_size,
            host + skip if has_host else 0,
            has_host,
        )

    def compressed_place(self, entry: int) -> tuple[int, int]:
        """Where the data of a compressed cluster are, and how many bytes they are at most."""
        descriptor = entry & (COMPRESSED - 1)
        host = descriptor & ((1 << self._offset_bits) - 1)
        sectors = (descriptor >> self._offset_bits) + 1
        return host, sectors * _SECTOR - host % _SECTOR

    def _compressed(self, entry: int, start: int) -> Run:
        if self._has_data_file:
            raise ImageError(
                f"Compressed cluster with an external data file (guest offset {start:#x})"
            )
        host, length = self.compressed_place(entry)
        return Run(
            Kind.COMPRESSED,
            start,
            start + self._cluster_size,
            host,
            has_host=True,
            compressed=length,
        )


def _continues(one: Run, other: Run) -> bool:
    """Whether the other, which begins where the first ends, is more of the same."""
    return (
        one.kind is other.kind
        and one.kind is not Kind.COMPRESSED
        and one.has_host == other.has_host
        and one.copied == other.copied
        and (not one.has_host or one.host + one.end - one.start == other.host)
    )
