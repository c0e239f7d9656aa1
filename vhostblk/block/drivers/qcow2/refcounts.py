"""Who uses which cluster of the file (qcow2 specification, "Host cluster management").

Theory of operation: changes are made in memory and written by `metadata.py`. On the disk a cluster never counts as less
used than it is: what is taken is written before anybody refers to it, and what is given up (`give_up`) counts as used
until nobody on the disk refers to it any more (`settle`), so that it cannot be taken again before. A crash leaves
clusters that nobody uses, at worst.

Context: the control loop.
"""

from __future__ import annotations

import asyncio
import errno
import sys
from array import array
from collections import OrderedDict
from dataclasses import dataclass

from vhostblk.block.drivers.qcow2.header import MAX_REFCOUNT_TABLE_BYTES, Header
from vhostblk.block.drivers.qcow2.overlaps import TablePlaces
from vhostblk.block.drivers.qcow2.snapshots import load_snapshots
from vhostblk.block.drivers.qcow2.tables import Table, read_bytes, read_table
from vhostblk.block.edge import Edge
from vhostblk.errors import BlockError, ImageError

# Offsets in tables have 56 bits.
_MAX_OFFSET = 1 << 56
_TYPES = {3: "B", 4: "H", 5: "I", 6: "Q"}


class Codec:
    """Blocks of reference counts, as bytes and as numbers."""

    def __init__(self, order: int) -> None:
        self._order = order
        self.largest = (1 << (1 << order)) - 1

    def decode(self, data: bytes | bytearray) -> Table:
        """Bytes to numbers."""
        if self._order >= 3:
            block = array(_TYPES[self._order])
            block.frombytes(data)
            return _native(block)
        bits, mask = 1 << self._order, self.largest
        block = array("B")
        for byte in data:
            block.extend(byte >> shift & mask for shift in range(0, 8, bits))
        return block

    def encode(self, block: Table) -> bytes:
        """Numbers to bytes."""
        if self._order >= 3:
            return _native(block[:]).tobytes()
        bits = 1 << self._order
        each = 8 // bits
        return bytes(
            sum(block[at + n] << n * bits for n in range(each)) for at in range(0, len(block), each)
        )


def _native(block: Table) -> Table:
    if sys.byteorder == "little":
        block.byteswap()
    return block


@dataclass(slots=True, eq=False)
class Block:
    """Reference counts of as many clusters as fit into one cluster."""

    offset: int
    counts: Table
    is_dirty: bool = False
    pins: int = 0


@dataclass(slots=True)
class RefcountWrites:
    """What has to be written, in this order: blocks, then the entries of the table that name them.

    Attributes: moved: the table's new offset and size in clusters, if it has moved: for the header.
    """

    blocks: list[tuple[int, bytes]]
    table: list[tuple[int, bytes]]
    moved: tuple[int, int] | None
    taken: list[Block]


class Refcounts:
    """Reference counts of one image.

    Args:
        blocks: how many blocks to keep in memory.
        places: of all tables but L2 tables; kept up to date for what is changed here.
    """

    def __init__(
        self, file: Edge, header: Header, table: Table, blocks: int, places: TablePlaces
    ) -> None:
        self._file = file
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._codec = Codec(header.refcount_order)
        self._per_block = header.cluster_size * 8 >> header.refcount_order
        self._table = table
        self._table_offset = header.refcount_table_offset
        self._most = max(blocks, 4)
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._dirty: dict[int, Block] = {}
        self._dirty_entries: set[int] = set()
        self._moved = False
        self._hint = 0
        self._given_up: list[int] = []
        self._lock = asyncio.Lock()
        self.places = places

    @classmethod
    async def load(cls, file: Edge, header: Header, cache_bytes: int) -> Refcounts:
        """Read the table.

        Raises:
            BlockError: the child's errno.
            ImageError: an entry makes no sense.
        """
        length = header.refcount_table_clusters * header.cluster_size
        table = await read_table(file, header.refcount_table_offset, length // 8)
        places = TablePlaces(header.cluster_bits)
        places.add_alone("Header", 0)
        places.add_alone("Active L1 table", header.l1_offset, header.l1_entries * 8)
        places.add_alone("Reference count table", header.refcount_table_offset, length)
        blocks = [entry for entry in table if entry]
        for entry in blocks:
            if entry & (header.cluster_size - 1) or entry >= _MAX_OFFSET:
                raise ImageError(f"Reference count block offset {entry:#x} is wrong")
            places.check("Reference count block", entry)
        if len(set(blocks)) < len(blocks):
            raise ImageError("Two reference count blocks are at the same place")
        places.add_all(blocks)
        for offset, size in (await load_snapshots(file, header)).places():
            places.check("Table of a snapshot", offset, size)
            places.add_all(range(offset, offset + size, header.cluster_size))
        return cls(file, header, table, cache_bytes // header.cluster_size, places)

    # ------------------------------------------------------------------ taking and giving up

    @property
    def is_dirty(self) -> bool:
        """Whether something has to be written, or settled."""
        return bool(self._dirty or self._dirty_entries or self._given_up)

    @property
    def is_full(self) -> bool:
        """Whether so much waits to be written that it is time."""
        return 2 * len(self._dirty) >= self._most or len(self._given_up) > 1 << 16

    async def allocate(self, count: int) -> tuple[int, int]:
        """Take free clusters that are next to each other.

        Args:
            count: how many there should be.

        Returns: the offset of the first, and how many they are: at least one.

        Raises:
            BlockError: EFBIG: the image cannot grow; or the child's errno.
            ImageError: free clusters turn out to be tables.
        """
        async with self._lock:
            cluster = self._hint
            while True:
                index, at = divmod(cluster, self._per_block)
                block = await self._existing_block(index)
                if block is None:
                    block = await self._new_block(index)
                first = _find_free(block.counts, at)
                if first is not None:
                    break
                cluster = (index + 1) * self._per_block
            got = 0
            for place in range(first, min(first + count, self._per_block)):
                if block.counts[place]:
                    break
                got += 1
            offset = (index * self._per_block + first) << self._cluster_bits
            # If they are, counts are wrong.
            self.places.check("Preventing invalid allocation", offset, got << self._cluster_bits)
            for place in range(first, first + got):
                block.counts[place] = 1
            self._changed(index, block)
            self._hint = index * self._per_block + first + got
            return offset, got

    def skip(self, offset: int, clusters: int) -> None:
        """Do not look for free clusters before the end of this range any more, for now."""
        self._hint = max(self._hint, (offset >> self._cluster_bits) + clusters)

    async def count(self, offset: int) -> int:
        """How many use the cluster at this offset.

        Raises:
            BlockError: the child's errno.
        """
        async with self._lock:
            index, at = divmod(offset >> self._cluster_bits, self._per_block)
            block = await self._existing_block(index)
            return block.counts[at] if block is not None else 0

    def give_up(self, offset: int, length: int = 1) -> None:
        """One user less of the clusters that the range touches, when nobody on the disk refers to them any more."""
        last = offset + length - 1 >> self._cluster_bits
        self._given_up.extend(range(offset >> self._cluster_bits, last + 1))

    async def release(self, offset: int, clusters: int) -> None:
        """Undo `allocate`: nobody has referred to them.

        Raises:
            BlockError: the child's errno.
        """
        first = offset >> self._cluster_bits
        await self._decrement(range(first, first + clusters))

    def take_given_up(self) -> list[int]:
        """What was given up so far, for `settle` once that is known to the disk."""
        taken, self._given_up = self._given_up, []
        return taken

    def not_settled(self, clusters: list[int]) -> None:
        """It is not known to the disk."""
        self._given_up[:0] = clusters

    async def settle(self, clusters: list[int]) -> None:
        """Nobody on the disk refers to these any more.

        Raises:
            BlockError: the child's errno, EIO if a count was 0 already.
        """
        await self._decrement(clusters)

    async def _decrement(self, clusters: list[int] | range) -> None:
        async with self._lock:
            for cluster in clusters:
                index, at = divmod(cluster, self._per_block)
                block = await self._existing_block(index)
                if block is None or not block.counts[at]:
                    raise BlockError(
                        errno.EIO, f"reference count of cluster {cluster} is 0 already"
                    )
                block.counts[at] -= 1
                self._changed(index, block)
                if not block.counts[at]:
                    self._hint = min(self._hint, cluster)

    # ------------------------------------------------------------------ what is written

    def take_writes(self) -> RefcountWrites:
        """What has to be written now; stays in memory until `written` or `not_written`."""
        taken = list(self._dirty.values())
        self._dirty.clear()
        for block in taken:
            block.is_dirty = False
            block.pins += 1
        blocks = [(block.offset, self._codec.encode(block.counts)) for block in taken]
        moved = None
        if self._moved:
            whole = _native(self._table[:]).tobytes()
            table = [(self._table_offset, whole)]
            moved = self._table_offset, len(whole) >> self._cluster_bits
        else:
            table = [
                (self._table_offset + 8 * index, self._table[index].to_bytes(8))
                for index in sorted(self._dirty_entries)
            ]
        self._moved = False
        self._dirty_entries.clear()
        return RefcountWrites(blocks, table, moved, taken)

    def written(self, writes: RefcountWrites) -> None:
        """They are on the disk."""
        for block in writes.taken:
            block.pins -= 1

    def not_written(self, writes: RefcountWrites) -> None:
        """They are not; they still have to be."""
        for block in writes.taken:
            block.pins -= 1
            block.is_dirty = True
            self._dirty[block.offset] = block
        self._moved |= writes.moved is not None
        if not writes.moved:
            self._dirty_entries.update((at - self._table_offset) // 8 for at, _ in writes.table)

    # ------------------------------------------------------------------ blocks

    def _changed(self, index: int, block: Block) -> None:
        block.is_dirty = True
        self._dirty[block.offset] = block
        self._blocks[index] = block

    async def _existing_block(self, index: int) -> Block | None:
        block = self._blocks.get(index)
        if block is not None:
            self._blocks.move_to_end(index)
            return block
        offset = self._table[index] if index < len(self._table) else 0
        if not offset:
            return None
        data = await read_bytes(self._file, offset, self._cluster_size)
        block = Block(offset, self._codec.decode(data))
        self._keep(index, block)
        return block

    def _keep(self, index: int, block: Block) -> None:
        while len(self._blocks) >= self._most:
            for other, old in self._blocks.items():
                if not old.is_dirty and not old.pins:
                    del self._blocks[other]
                    break
            else:
                break
        self._blocks[index] = block

    async def _new_block(self, index: int) -> Block:
        """A block for clusters that none is for yet: it is in the first of them."""
        if index >= len(self._table):
            return self._grow_table(index)
        block = self._make_block(index, index * self._per_block)
        block.counts[0] = 1
        return block

    def _make_block(self, index: int, cluster: int) -> Block:
        offset = cluster << self._cluster_bits
        if offset >= _MAX_OFFSET:
            raise BlockError(errno.EFBIG, "the image file cannot grow any more")
        self.places.add_alone("Reference count block that is missing", offset)
        counts = self._codec.decode(bytes(self._cluster_size))
        block = Block(offset, counts)
        self._keep(index, block)
        self._changed(index, block)
        self._table[index] = offset
        self._dirty_entries.add(index)
        return block

    def _grow_table(self, index: int) -> Block:
        """A larger table, in clusters that the new blocks are for, with these blocks before it."""
        clusters = -(-(index + 1) * 12 // self._cluster_size) + 1  # half as large again
        blocks = 1
        while blocks * self._per_block < blocks + clusters:
            blocks += 1
        clusters = max(clusters, -(-(index + blocks) * 8 // self._cluster_size))
        while blocks * self._per_block < blocks + clusters:
            blocks += 1
        if clusters * self._cluster_size > MAX_REFCOUNT_TABLE_BYTES:
            raise BlockError(errno.EFBIG, "the reference count table cannot grow any more")
        first = index * self._per_block
        place, size = first << self._cluster_bits, (blocks + clusters) << self._cluster_bits
        if place + size > _MAX_OFFSET:
            raise BlockError(errno.EFBIG, "the image file cannot grow any more")
        self.places.check("Preventing invalid allocation", place, size)
        self.give_up(self._table_offset, len(self._table) * 8)
        self.places.remove(self._table_offset, len(self._table) * 8)
        self._table.extend([0] * (clusters * self._cluster_size // 8 - len(self._table)))
        made = [self._make_block(index + n, first + n) for n in range(blocks)]
        self._table_offset = (first + blocks) << self._cluster_bits
        self.places.add_alone("Reference count table", self._table_offset, len(self._table) * 8)
        self._moved = True
        for used in range(blocks + clusters):
            made[used // self._per_block].counts[used % self._per_block] = 1
        return made[0]


def _find_free(counts: Table, start: int) -> int | None:
    try:
        return counts.index(0, start)
    except ValueError:
        return None
