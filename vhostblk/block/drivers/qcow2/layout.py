"""Where things are in an image that is new, and how many clusters that takes (qcow2 specification, "General").

Numbers in, numbers and tables out. A new image has, one after the other: the header, the reference count table, its
blocks, the L1 table, the keys of an encrypted one; and if clusters are preallocated, all L2 tables, then the data.
Whoever wants to know how large an image gets (`measure`) counts the same things. Knows nothing about files.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from vhostblk.block.drivers.qcow2.entries import COPIED
from vhostblk.block.drivers.qcow2.tables import OFFSETS, Table
from vhostblk.block.lean_dataclass import lean_dataclass

_PIECE = 1 << 20
_ENTRY = 8


def refcount_clusters(clusters: int, cluster_size: int, refcount_order: int) -> tuple[int, int]:
    """How many blocks, and clusters of the table, count these clusters and themselves."""
    per_block = cluster_size * 8 >> refcount_order
    per_table_cluster = cluster_size // _ENTRY
    table = blocks = 0
    while True:
        total = clusters + table + blocks
        new_blocks = max(-(-total // per_block), 1)
        new_table = -(-new_blocks // per_table_cluster)
        if (new_blocks, new_table) == (blocks, table):
            return blocks, table
        blocks, table = new_blocks, new_table


@lean_dataclass(frozen=True, slots=True)
class Layout:
    """A new image.

    Attributes:
        size: of the disk, in bytes.
        l2_entry_size: bytes.
        preallocated: every guest cluster has a place.
        external: guest data are in a file of their own.
        crypt_bytes: of the encryption's header.
    """

    size: int
    cluster_size: int
    refcount_order: int
    l2_entry_size: int
    preallocated: bool = False
    external: bool = False
    crypt_bytes: int = 0

    # ------------------------------------------------------------------ how much, in clusters

    @property
    def guest_clusters(self) -> int:
        """Of the disk."""
        return -(-self.size // self.cluster_size)

    @property
    def l1_entries(self) -> int:
        """Of the L1 table; one for each L2 table that there could be."""
        return -(-self.guest_clusters // (self.cluster_size // self.l2_entry_size))

    @property
    def l1_clusters(self) -> int:
        """Of the L1 table."""
        return -(-self.l1_entries * _ENTRY // self.cluster_size)

    @property
    def crypt_clusters(self) -> int:
        """Of the encryption's header."""
        return -(-self.crypt_bytes // self.cluster_size)

    @property
    def l2_clusters(self) -> int:
        """Of all L2 tables that there are."""
        return self.l1_entries if self.preallocated else 0

    @property
    def data_clusters(self) -> int:
        """Of guest data in the image file."""
        return self.guest_clusters if self.preallocated and not self.external else 0

    @property
    def _counts(self) -> tuple[int, int]:
        counted = 1 + self.l1_clusters + self.crypt_clusters
        counted += self.l2_clusters + self.data_clusters
        return refcount_clusters(counted, self.cluster_size, self.refcount_order)

    @property
    def refcount_blocks(self) -> int:
        """Of reference counts, a cluster each."""
        return self._counts[0]

    @property
    def refcount_table_clusters(self) -> int:
        """Of the table that names them."""
        return self._counts[1]

    @property
    def clusters(self) -> int:
        """Of everything."""
        return self.data_offset // self.cluster_size + self.data_clusters

    # ------------------------------------------------------------------ where, in bytes

    @property
    def refcount_table_offset(self) -> int:
        """Behind the header."""
        return self.cluster_size

    @property
    def blocks_offset(self) -> int:
        """Of the reference count blocks."""
        return self.cluster_size * (1 + self.refcount_table_clusters)

    @property
    def l1_offset(self) -> int:
        """Of the L1 table; 0: there is none."""
        blocks, table = self._counts
        return self.cluster_size * (1 + table + blocks) if self.l1_entries else 0

    @property
    def crypt_offset(self) -> int:
        """Of the encryption's header."""
        blocks, table = self._counts
        return self.cluster_size * (1 + table + blocks + self.l1_clusters)

    @property
    def l2_offset(self) -> int:
        """Of the L2 tables."""
        return self.crypt_offset + self.cluster_size * self.crypt_clusters

    @property
    def data_offset(self) -> int:
        """Of guest data."""
        return self.l2_offset + self.cluster_size * self.l2_clusters

    @property
    def end(self) -> int:
        """How long the file is."""
        if self.preallocated:
            return self.cluster_size * self.clusters
        if self.crypt_bytes:
            return self.l2_offset
        blocks, table = self._counts
        return self.cluster_size * (1 + table + blocks) + self.l1_entries * _ENTRY

    # ------------------------------------------------------------------ tables

    def refcount_tables(self) -> Iterator[tuple[int, bytes]]:
        """The reference count table, then its blocks: offsets and bytes."""
        size, (blocks, table) = self.cluster_size, self._counts
        start = self.blocks_offset
        entries = array("Q", range(start, start + blocks * size, size))
        entries.extend([0] * (table * size // _ENTRY - blocks))
        yield self.refcount_table_offset, OFFSETS.encode(entries)
        per_block = size * 8 >> self.refcount_order
        full = _ones(per_block, self.refcount_order, size)
        left = self.clusters
        for index in range(blocks):
            whole = left >= per_block
            data = full if whole else _ones(max(left, 0), self.refcount_order, size)
            yield start + index * size, data
            left -= per_block

    def mapping_tables(self) -> Iterator[tuple[int, bytes]]:
        """The L1 table, and the L2 tables, in pieces: offsets and bytes; nothing where they are all zero."""
        if not self.preallocated:
            return
        size, start = self.cluster_size, COPIED + self.l2_offset
        tables = array("Q", range(start, start + self.l2_clusters * size, size))
        yield self.l1_offset, OFFSETS.encode(tables)
        per_piece = _PIECE // self.l2_entry_size
        for first in range(0, self.guest_clusters, per_piece):
            count = min(per_piece, self.guest_clusters - first)
            place = COPIED + first * size + (0 if self.external else self.data_offset)
            entries = array("Q", range(place, place + count * size, size))
            yield (
                self.l2_offset + first * self.l2_entry_size,
                OFFSETS.encode(self._extended(entries)),
            )

    def _extended(self, entries: Table) -> Table:
        """With bitmaps that say that nothing was written yet, where there are any."""
        if self.l2_entry_size == _ENTRY:
            return entries
        both = array("Q", bytes(self.l2_entry_size * len(entries)))
        both[::2] = entries
        return both


def _ones(count: int, order: int, size: int) -> bytes:
    """A block that says that the first `count` clusters are used once."""
    if order >= 3:
        return ((1).to_bytes(1 << order - 3) * count).ljust(size, b"\0")
    bits = 1 << order
    pattern = sum(1 << shift for shift in range(0, 8, bits))
    whole, rest = divmod(count * bits, 8)
    last = bytes([pattern & (1 << rest) - 1]) if rest else b""
    return (bytes([pattern]) * whole + last).ljust(size, b"\0")
