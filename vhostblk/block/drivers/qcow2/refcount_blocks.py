"""Blocks of reference counts, and the table that names them: where they are, and where new ones go.

Theory of operation: a cluster that no block is for is free, and gets one when it is taken. New blocks and larger
tables are where QEMU puts them, so that a file has the same in the same places: a block is behind what is being taken,
and counts itself or is counted by another one; a larger table is behind everything, with blocks that count it.

Context: the control loop; whoever calls holds the lock, so that nobody else takes anything meanwhile. Knows nothing
about what clusters are for.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from vhostblk.block.drivers.qcow2.cache import Slice, TableCache
from vhostblk.block.drivers.qcow2.free_clusters import free_run, leading_zeroes
from vhostblk.block.drivers.qcow2.header import MAX_OFFSET, Header
from vhostblk.block.drivers.qcow2.overlaps import TablePlaces
from vhostblk.block.drivers.qcow2.refcount_table import (
    RefcountTable,
    RefcountWrites,
    larger_table,
    may_be_block,
)
from vhostblk.block.drivers.qcow2.tables import Codec, Table
from vhostblk.block.edge import Edge
from vhostblk.errors import BlockError, ImageError

_TOO_LONG = "the image file cannot grow any more"


class RefcountBlocks:
    """The blocks of one image.

    Args:
        cache_bytes: of blocks to keep in memory.
        places: of all tables but L2 tables; kept up to date for what is changed here.

    Attributes: per_block: clusters that a block of counts is for.
    """

    def __init__(
        self, file: Edge, header: Header, table: Table, cache_bytes: int, places: TablePlaces
    ) -> None:
        self._cluster_bits = header.cluster_bits
        self.per_block = header.cluster_size * 8 >> header.refcount_order
        covers = self.per_block << header.cluster_bits
        self._table = RefcountTable(table, header.refcount_table_offset, covers)
        self._file = file
        codec = Codec(header.refcount_order)
        self._most_users = codec.largest
        size = header.cluster_size
        self._blocks = TableCache(file, codec, size, cache_bytes)
        self._lock = asyncio.Lock()
        self._given_up: list[int] = []
        self.places = places

    def give_up(self, offset: int, length: int = 1, *, frees: bool = False) -> None:
        """See `Refcounts`."""
        raise NotImplementedError

    @asynccontextmanager
    async def end(self) -> AsyncIterator[int]:
        """Where the last cluster that is used ends; nobody takes another one inside `async with`.

        Raises:
            BlockError: the child's errno.
        """
        async with self._lock:
            for index in reversed(range(len(self._table.entries))):
                block = await self.existing_block(index)
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
        table, moved = self._table.take_writes()
        place = (self._table.offset, self._table.length >> self._cluster_bits) if moved else None
        return RefcountWrites(blocks, table, place, taken)

    def written(self, writes: RefcountWrites) -> None:
        """They are on the disk."""
        self._blocks.written(writes.taken)

    def not_written(self, writes: RefcountWrites) -> None:
        """They are not; they still have to be."""
        self._blocks.not_written(writes.taken)
        self._table.not_written(writes.table, moved=writes.moved is not None)

    # ------------------------------------------------------------------ looking for clusters

    async def existing_block(self, index: int) -> Slice | None:
        """The block of this number, if there is one.

        Raises:
            BlockError: the child's errno.
            ImageError: its place makes no sense.
        """
        offset = self._table.get(index)
        if not may_be_block(offset, 1 << self._cluster_bits):
            raise ImageError(f"Refblock offset {offset:#x} unaligned (reftable index: {index:#x})")
        return await self._blocks.get(offset) if offset else None

    async def find_free(self, start: int, count: int, least: int) -> tuple[int, int]:
        """The first run of at least `least` free clusters, by number, from `start` on.

        Returns: its first cluster, and how many there are, at most `count`.

        Raises:
            BlockError: EFBIG: the file would be too long; the child's errno.
            ImageError: the place of a block makes no sense.
        """
        first, got, at = start, 0, start
        while got < count:
            index, place = divmod(at, self.per_block)
            block = await self.existing_block(index)
            counts = None if block is None else block.table
            there = leading_zeroes(counts, place, count - got) if counts else self.per_block - place
            if not got:
                first = at
            got = min(got + there, count)
            at += there
            if at % self.per_block or not there:
                # A cluster that is used.
                if got >= least:
                    break
                got = 0
                assert counts is not None
                place = free_run(counts, at % self.per_block, least)
                at = index * self.per_block + place
        if (first + got) << self._cluster_bits > MAX_OFFSET:
            raise BlockError(errno.EFBIG, _TOO_LONG)
        return first, got

    async def first_missing(self, first: int, count: int) -> int | None:
        """The first block that is not there, of those for these clusters."""
        for index in range(first // self.per_block, (first + count - 1) // self.per_block + 1):
            if await self.existing_block(index) is None:
                return index
        return None

    async def count_new(self, first: int, count: int) -> None:
        """Clusters that were free have one user now; there are blocks for all of them.

        Raises:
            BlockError: the child's errno; then they are as before.
        """
        done = 0
        try:
            while done < count:
                index, place = divmod(first + done, self.per_block)
                block = await self.existing_block(index)
                assert block is not None
                there = min(count - done, self.per_block - place)
                for at in range(place, place + there):
                    block.table[at] = 1
                self._blocks.changed(block)
                done += there
        except BaseException:
            if done:
                self.give_up(first << self._cluster_bits, done << self._cluster_bits)
            raise

    # ------------------------------------------------------------------ new blocks

    async def add_block(self, index: int, first: int, start: int) -> None:
        """A block that is missing, or one without which it cannot be.

        Args:
            first: the cluster that it is needed for, or one before.
            start: where to look for room.

        Raises:
            BlockError: EFBIG: the file would be too long; the child's errno.
            ImageError: free clusters turn out to be tables.
        """
        place, _ = await self.find_free(start, 1, 1)
        home = place // self.per_block
        block = None
        if home != index:
            block = await self.existing_block(home)
            if block is None:
                await self.add_block(home, place, place + 1)
                return
        offset = place << self._cluster_bits
        if not offset and self.places.has(0):
            raise ImageError("Preventing invalid allocation of refcount block at offset 0")
        self.places.check("Preventing invalid allocation", offset)
        if block is not None:
            # At once: a block that is not dirty may be gone from the cache when others come.
            block.table[place % self.per_block] = 1
            self._blocks.changed(block)
        try:
            if index >= len(self._table.entries):
                behind = max(first, index * self.per_block, place) // self.per_block + 1
                self._move_table(behind, index + 1)
            made = self._make_block(index, place)
        except BaseException:
            if block is not None:
                block.table[place % self.per_block] = 0
            raise
        if block is None:
            made.table[place % self.per_block] = 1

    def add_run(self, count: int) -> int:
        """Take clusters that are next to each other, behind all others; with new blocks for them.

        Returns: the first.

        Raises:
            BlockError: EFBIG: the file would be too long.
            ImageError: free clusters turn out to be tables.
        """
        blocks = -(-count // (self.per_block - 1))
        index = self._table.end
        if index + blocks > len(self._table.entries):
            self._move_table(index, index + blocks)
            index = self._table.end
        self._check_behind(index, blocks + count)
        self._make_blocks(index, blocks, count)
        return index * self.per_block + blocks

    def _move_table(self, index: int, least: int) -> None:
        """A larger table, in clusters that new blocks from `index` on are for; with at least so many entries."""
        size = 1 << self._cluster_bits
        blocks, clusters = larger_table(index, least, self.per_block, size)
        self._check_behind(index, blocks + clusters)
        self.give_up(self._table.offset, self._table.length)
        self.places.remove(self._table.offset, self._table.length)
        first = index * self.per_block
        self._table.move((first + blocks) << self._cluster_bits, clusters * size // 8)
        self._make_blocks(index, blocks, clusters)
        self.places.add_alone("Reference count table", self._table.offset, self._table.length)

    def _check_behind(self, index: int, clusters: int) -> None:
        """Whether there can be so many, the first of which this block is for."""
        place = index * self.per_block << self._cluster_bits
        if place + (clusters << self._cluster_bits) > MAX_OFFSET:
            raise BlockError(errno.EFBIG, _TOO_LONG)
        self.places.check("Preventing invalid allocation", place, clusters << self._cluster_bits)

    def _make_blocks(self, index: int, blocks: int, clusters: int) -> None:
        """Blocks, in the first clusters that they are for; so many behind them are in use, too."""
        first = index * self.per_block
        made = [self._make_block(index + n, first + n) for n in range(blocks)]
        for used in range(blocks + clusters):
            made[used // self.per_block].table[used % self.per_block] = 1

    def _make_block(self, index: int, cluster: int) -> Slice:
        offset = cluster << self._cluster_bits
        self.places.add_alone("Reference count block that is missing", offset)
        block = self._blocks.add(offset)
        self._table.set(index, offset)
        return block
