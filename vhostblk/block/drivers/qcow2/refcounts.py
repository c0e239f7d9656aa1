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
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from vhostblk.block.drivers.qcow2.bitmaps import add_bitmap_places
from vhostblk.block.drivers.qcow2.cache import Slice, TableCache
from vhostblk.block.drivers.qcow2.free_clusters import find_free, free_at_the_end
from vhostblk.block.drivers.qcow2.header import MAX_OFFSET, MAX_REFCOUNT_TABLE_BYTES, Header
from vhostblk.block.drivers.qcow2.overlaps import TablePlaces
from vhostblk.block.drivers.qcow2.snapshots import inactive_tables, load_snapshots
from vhostblk.block.drivers.qcow2.tables import (
    OFFSETS,
    Codec,
    Table,
    entry_writes,
    read_table,
)
from vhostblk.block.edge import Edge
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError, ImageError


@dataclass(slots=True)
class RefcountWrites:
    """What has to be written, in this order: blocks, then the entries of the table that name them.

    Attributes: moved: the table's new offset and size in clusters, if it has moved: for the header.
    """

    blocks: list[tuple[int, bytes]]
    table: list[tuple[int, bytes]]
    moved: tuple[int, int] | None
    taken: list[Slice]


class Refcounts:
    """Reference counts of one image.

    Args:
        cache_bytes: of blocks to keep in memory.
        places: of all tables but L2 tables; kept up to date for what is changed here.

    Attributes: per_block: clusters that a block of counts is for. inactive: places of L2 tables that snapshots use, if
        somebody wants to know.
    """

    def __init__(
        self, file: Edge, header: Header, table: Table, cache_bytes: int, places: TablePlaces
    ) -> None:
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self.per_block = header.cluster_size * 8 >> header.refcount_order
        self._table = table
        self._table_offset = header.refcount_table_offset
        self._file = file
        codec = Codec(header.refcount_order)
        self._most_users = codec.largest
        size = header.cluster_size
        self._blocks = TableCache(file, codec, size, cache_bytes, "refblock_load")
        self._dirty_entries: set[int] = set()
        self._moved = False
        self._hint = 0
        # Behind the compressed cluster that was last. If a cluster of the file begins there, there is no room.
        self._free_byte = 0
        self._given_up: list[int] = []
        self._lock = asyncio.Lock()
        self.places = places
        self.inactive = TablePlaces(header.cluster_bits)

    @classmethod
    async def load(
        cls, file: Edge, header: Header, cache_bytes: int, *, protects_inactive: bool = False
    ) -> Refcounts:
        """Read the table.

        Args:
            protects_inactive: look where the snapshots' L2 tables are, too.

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
        # Those that make no sense are found by who needs them.
        blocks = [entry for entry in table if entry and _may_be_block(entry, header.cluster_size)]
        for entry in blocks:
            places.check("Reference count block", entry)
        if len(set(blocks)) < len(blocks):
            raise ImageError("Two reference count blocks are at the same place")
        places.add_all(blocks)
        snapshots = await load_snapshots(file, header)
        for offset, size in snapshots.places():
            places.check("Table of a snapshot", offset, size)
            places.add_all(range(offset, offset + size, header.cluster_size))
        await add_bitmap_places(file, header, places)
        refcounts = cls(file, header, table, cache_bytes, places)
        if protects_inactive:
            refcounts.inactive.add_all(await inactive_tables(file, header))
        return refcounts

    # ------------------------------------------------------------------ taking and giving up

    @property
    def has_writes(self) -> bool:
        """Whether something has to be written."""
        return bool(self._blocks.is_dirty or self._dirty_entries)

    @property
    def has_given_up(self) -> bool:
        """Whether something has to be settled."""
        return bool(self._given_up)

    @property
    def is_full(self) -> bool:
        """Whether so much waits to be written that it is time."""
        return self._blocks.is_full or len(self._given_up) > 1 << 16

    async def allocate(
        self,
        count: int,
        *,
        behind: int = 0,
        together: bool = False,
        what: str = "data cluster",
    ) -> tuple[int, int]:
        """Take free clusters that are next to each other.

        Args:
            count: how many there should be.
            behind: none before this offset; a multiple of the cluster size.
            together: pass over gaps that have not so many, as QEMU does.
            what: they are for, for messages.

        Returns: the offset of the first, and how many they are: at least one.

        Raises:
            BlockError: EFBIG: the image cannot grow; or the child's errno.
            ImageError: free clusters turn out to be tables.
        """
        await self._file.debug_event("cluster_alloc")
        async with self._lock:
            return await self._allocate(count, behind, count if together else 1, what)

    async def _allocate(
        self, count: int, behind: int = 0, least: int = 1, what: str = "data cluster"
    ) -> tuple[int, int]:
        cluster = max(self._hint, behind >> self._cluster_bits)
        while True:
            index, at = divmod(cluster, self.per_block)
            block = await self._existing_block(index)
            if block is None:
                block = await self._new_block(index)
            first = find_free(block.table, at, least)
            if first is None and least > 1 and not self._has_block(index + 1):
                # What is free at the end is not next to anything: the new block comes first in what it is for.
                first = free_at_the_end(block.table, at)
            if first is not None:
                break
            cluster = (index + 1) * self.per_block
        got = 0
        for place in range(first, min(first + count, self.per_block)):
            if block.table[place]:
                break
            got += 1
        offset = (index * self.per_block + first) << self._cluster_bits
        # If they are, counts are wrong.
        if not offset and self.places.has(0):
            raise ImageError(f"Preventing invalid allocation of {what} at offset 0")
        for places in (self.places, self.inactive):
            places.check("Preventing invalid allocation", offset, got << self._cluster_bits)
        for place in range(first, first + got):
            block.table[place] = 1
        self._blocks.changed(block)
        if not behind:
            self._hint = index * self.per_block + first + got
        return offset, got

    async def allocate_bytes(self, length: int) -> int:
        """Take room for a compressed cluster, behind the one before if there is some; not more than a cluster.

        Whatever has bytes in a cluster of the file uses it once more.

        Returns: its offset.

        Raises:
            BlockError, ImageError: as `allocate`.
        """
        await self._file.debug_event("cluster_alloc_bytes")
        async with self._lock:
            new = None
            if length > -self._free_byte % self._cluster_size:
                new, _ = await self._allocate(1)
            place = self._free_byte
            room = -place % self._cluster_size
            if room and (new is None or new == place + room):
                index, at = divmod(place >> self._cluster_bits, self.per_block)
                block = await self._existing_block(index)
                # It may have been given up while we waited.
                is_ours = block is not None and self._free_byte == place
                if block is not None and is_ours and block.table[at] < self._most_users:
                    block.table[at] += 1
                    self._blocks.changed(block)
                    self._free_byte = place + length
                    return place
            if new is None:
                new, _ = await self._allocate(1)
            self._free_byte = new + length
            return new

    def skip(self, offset: int, clusters: int) -> None:
        """Do not look for free clusters before the end of this range any more, for now."""
        self._hint = max(self._hint, (offset >> self._cluster_bits) + clusters)

    async def count(self, offset: int) -> int:
        """How many use the cluster at this offset.

        Raises:
            BlockError: the child's errno.
        """
        async with self._lock:
            index, at = divmod(offset >> self._cluster_bits, self.per_block)
            block = await self._existing_block(index)
            return block.table[at] if block is not None else 0

    async def counts(self, first: int, count: int) -> list[int]:
        """How many use each of these clusters, by number.

        Raises:
            BlockError: the child's errno.
        """
        found: list[int] = []
        async with self._lock:
            while len(found) < count:
                index, at = divmod(first + len(found), self.per_block)
                block = await self._existing_block(index)
                length = min(count - len(found), self.per_block - at)
                found += block.table[at : at + length] if block is not None else [0] * length
        return found

    def block_offsets(self) -> list[int]:
        """Where blocks are."""
        return [offset for offset in self._table if offset]

    def give_up(self, offset: int, length: int = 1) -> None:
        """One user less of the clusters that the range touches, when nobody on the disk refers to them any more."""
        clusters = self._touched(offset, length)
        self._given_up.extend(clusters)
        if self._free_byte >> self._cluster_bits in clusters:
            self._free_byte = 0  # the host may be given its room as soon as nobody else is in it

    async def release(self, offset: int, length: int) -> None:
        """Undo `allocate`, or `allocate_bytes`: nobody has referred to these bytes.

        Raises:
            BlockError: the child's errno; those that are left are given up.
        """
        await self._decrement(self._touched(offset, length))

    def _touched(self, offset: int, length: int) -> range:
        last = offset + length - 1 >> self._cluster_bits
        return range(offset >> self._cluster_bits, last + 1)

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
            BlockError: the child's errno; those that are left are given up again.
            ImageError: a count was 0 already: all counts may be wrong.
        """
        await self._decrement(clusters)

    async def _decrement(self, clusters: list[int] | range) -> None:
        free: int | None = None
        if clusters:
            await self._file.debug_event("cluster_free")
        async with self._lock:
            for done, cluster in enumerate(clusters):
                index, at = divmod(cluster, self.per_block)
                try:
                    block = await self._existing_block(index)
                except BaseException:
                    self._given_up.extend(clusters[done:])
                    self._free_byte = 0  # as in `give_up`
                    raise
                if block is None or not block.table[at]:
                    free = cluster
                    continue
                block.table[at] -= 1
                self._blocks.changed(block)
                if not block.table[at]:
                    self._hint = min(self._hint, cluster)
                    if self._free_byte >> self._cluster_bits == cluster:
                        self._free_byte = 0
        if free is not None:
            raise ImageError(f"Cluster {free} was in use, but its reference count is 0")

    # ------------------------------------------------------------------ getting smaller

    async def drop_empty_blocks(self) -> bool:
        """Forget the blocks that count nothing but themselves, here and on the disk; nobody takes clusters meanwhile.

        Returns: whether there were any.

        Raises:
            BlockError: the child's errno.
        """
        async with self._lock:
            found = []
            for index, offset in enumerate(self._table):
                if not offset or self._moved or not _may_be_block(offset, self._cluster_size):
                    continue
                block = await self._blocks.get(offset)
                used = len(block.table) - block.table.count(0)
                here = (offset >> self._cluster_bits) - index * self.per_block
                in_itself = 0 <= here < self.per_block
                if used == in_itself and (not in_itself or block.table[here] == 1):
                    found.append((index, offset, in_itself))
            try:
                for index, _, _ in found:
                    await self._file.pwritev(self._table_offset + 8 * index, IoVec.of(bytes(8)))
                if found:
                    await self._file.flush()
            except BaseException:
                self._dirty_entries.update(index for index, _, _ in found)
                raise
            for index, offset, in_itself in found:
                self._table[index] = 0
                self._dirty_entries.discard(index)
                self._blocks.forget(offset)
                self.places.remove(offset)
                if not in_itself:
                    self.give_up(offset)
            return bool(found)

    @asynccontextmanager
    async def end(self) -> AsyncIterator[int]:
        """Where the last cluster that is used ends; nobody takes another one inside `async with`.

        Raises:
            BlockError: the child's errno.
        """
        async with self._lock:
            for index in reversed(range(len(self._table))):
                block = await self._existing_block(index)
                if block is not None:
                    used = -(-len(block.table.tobytes().rstrip(b"\0")) // block.table.itemsize)
                    if used:
                        yield (index * self.per_block + used) << self._cluster_bits
                        return
            yield 0

    # ------------------------------------------------------------------ what is written

    def take_writes(self) -> RefcountWrites:
        """What has to be written now; stays in memory until `written` or `not_written`."""
        taken = self._blocks.take_dirty()
        blocks = self._blocks.writes(taken)
        moved = None
        if self._moved:
            whole = OFFSETS.encode(self._table)
            table = [(self._table_offset, whole)]
            moved = self._table_offset, len(whole) >> self._cluster_bits
        else:
            table = entry_writes(self._table_offset, self._table, self._dirty_entries)
        self._moved = False
        self._dirty_entries.clear()
        return RefcountWrites(blocks, table, moved, taken)

    @staticmethod
    def no_writes() -> RefcountWrites:
        """What has to be written if nothing is: it is put off."""
        return RefcountWrites([], [], None, [])

    def written(self, writes: RefcountWrites) -> None:
        """They are on the disk."""
        self._blocks.written(writes.taken)

    def not_written(self, writes: RefcountWrites) -> None:
        """They are not; they still have to be."""
        self._blocks.not_written(writes.taken)
        self._moved |= writes.moved is not None
        if not writes.moved:
            self._dirty_entries.update((at - self._table_offset) // 8 for at, _ in writes.table)

    # ------------------------------------------------------------------ blocks

    async def _existing_block(self, index: int) -> Slice | None:
        offset = self._table[index] if index < len(self._table) else 0
        if not _may_be_block(offset, self._cluster_size):
            raise ImageError(f"Refblock offset {offset:#x} unaligned (reftable index: {index:#x})")
        return await self._blocks.get(offset) if offset else None

    def _has_block(self, index: int) -> bool:
        return index < len(self._table) and bool(self._table[index])

    async def _new_block(self, index: int) -> Slice:
        """A block for clusters that none is for yet: it is in the first of them."""
        if index >= len(self._table):
            return self._grow_table(index)
        block = self._make_block(index, index * self.per_block)
        block.table[0] = 1
        return block

    def _make_block(self, index: int, cluster: int) -> Slice:
        offset = cluster << self._cluster_bits
        if offset >= MAX_OFFSET:
            raise BlockError(errno.EFBIG, "the image file cannot grow any more")
        self.places.add_alone("Reference count block that is missing", offset)
        block = self._blocks.add(offset)
        self._table[index] = offset
        self._dirty_entries.add(index)
        return block

    def _grow_table(self, index: int) -> Slice:
        """A larger table, in clusters that the new blocks are for, with these blocks before it."""
        clusters = -(-(index + 1) * 12 // self._cluster_size) + 1  # half as large again
        blocks = 1
        while blocks * self.per_block < blocks + clusters:
            blocks += 1
        clusters = max(clusters, -(-(index + blocks) * 8 // self._cluster_size))
        while blocks * self.per_block < blocks + clusters:
            blocks += 1
        if clusters * self._cluster_size > MAX_REFCOUNT_TABLE_BYTES:
            raise BlockError(errno.EFBIG, "the reference count table cannot grow any more")
        first = index * self.per_block
        place, size = first << self._cluster_bits, (blocks + clusters) << self._cluster_bits
        if place + size > MAX_OFFSET:
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
            made[used // self.per_block].table[used % self.per_block] = 1
        return made[0]


def _may_be_block(entry: int, cluster_size: int) -> bool:
    """Whether this can be a place in the file."""
    return not entry % cluster_size and entry < MAX_OFFSET
