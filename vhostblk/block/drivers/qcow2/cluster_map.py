"""Which cluster has which bytes of the disk: the L1 table and L2 tables, looked up and changed in memory.

Theory of operation: the L1 table is in memory as a whole, slices of L2 tables are in a cache. Who changes an entry asks
for a slice of a table that is the active one's alone (`own_slice`), and does it before the next `await`.

Context: the control loop. Knows nothing about how changes reach the disk: `metadata.py`.
"""

from __future__ import annotations

import asyncio
import errno
import os
from array import array
from collections.abc import Awaitable
from dataclasses import replace

from vhostblk.block.drivers.qcow2.cache import Slice, TableCache
from vhostblk.block.drivers.qcow2.entries import COPIED, L1_RESERVED, OFFSET_MASK
from vhostblk.block.drivers.qcow2.header import Header
from vhostblk.block.drivers.qcow2.refcounts import Refcounts
from vhostblk.block.drivers.qcow2.tables import (
    OFFSETS,
    Table,
    entry_writes,
    read_bytes,
)
from vhostblk.block.edge import Edge
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError, ImageError

# Entries of the L1 table to look at for one run.
_ENOUGH = 4096


class ClusterMap:
    """L1 and L2 tables of an image that is open.

    Args:
        file: where they are.
        refcounts: None: nobody writes.

    Attributes:
        slice_covers: bytes of the disk that a slice is for.
    """

    def __init__(
        self,
        file: Edge,
        header: Header,
        l1: Table,
        cache: TableCache,
        refcounts: Refcounts | None,
    ) -> None:
        self.header = header
        self._file = file
        self._l1 = l1
        self._refcounts = refcounts
        self._overlapping: set[int] = set()
        if refcounts is not None:
            self._add_l2_tables(refcounts)
        self._l1_dirty: set[int] = set()
        self._header_dirty = False
        self._l1_moved = False
        self._growing = asyncio.Lock()
        # What never changes, without a call for each request.
        self._cluster_bits = header.cluster_bits
        self._in_cluster = header.cluster_size - 1
        self._extended = header.has_subclusters
        self._l2_covers = header.l2_entries << header.cluster_bits
        self.use_cache(cache)

    def use_cache(self, cache: TableCache) -> None:
        """Keep slices of L2 tables in this one from now on; nothing is dirty in the one before."""
        self.cache = cache
        self.slice_covers = (
            cache.slice_bytes // self.header.l2_entry_size << self.header.cluster_bits
        )

    @property
    def refcounts(self) -> Refcounts:
        """Of an image that is written."""
        assert self._refcounts is not None
        return self._refcounts

    @property
    def has_debug_events(self) -> bool:
        """Whether somebody wants to know what is about to happen."""
        return self._file.node.has_debug_events

    def debug_event(self, name: str) -> Awaitable[None]:
        """Tell whoever is below the file what is about to happen."""
        return self._file.debug_event(name)

    def may_write(self, refcounts: Refcounts) -> None:
        """From now on."""
        self._refcounts = refcounts
        self._add_l2_tables(refcounts)

    def _add_l2_tables(self, refcounts: Refcounts) -> None:
        tables: set[int] = set()
        for entry in self._l1:
            table = entry & OFFSET_MASK
            if table and (table in tables or refcounts.places.has(table)):
                self._overlapping.add(table)
            elif table:
                tables.add(table)
        refcounts.places.add_all(tables)

    # ------------------------------------------------------------------ looking up

    def l2_table(self, offset: int) -> int:
        """Where the L2 table for these bytes of the disk is; 0: there is none.

        Raises:
            ImageError: its entry in the L1 table is wrong.
        """
        index = offset // self._l2_covers
        if index >= len(self._l1):
            return 0
        entry = self._l1[index]
        table = entry & OFFSET_MASK
        if entry & L1_RESERVED or table & self._in_cluster:
            number = f"{index:#x}" if index else "0"
            raise ImageError(f"L2 table offset {table:#x} unaligned (L1 index: {number})")
        return table

    def without_table(self, offset: int, limit: int) -> tuple[int, int]:
        """The range around `offset` for which there are no L2 tables; no need to look behind `limit`."""
        first = last = offset // self._l2_covers
        if first >= len(self._l1):
            return first * self._l2_covers, max(limit, (first + 1) * self._l2_covers)
        least = max(first - _ENOUGH, 0)
        while first > least and not self._l1[first - 1]:
            first -= 1
        most = min(-(-limit // self._l2_covers), len(self._l1), last + _ENOUGH)
        while last + 1 < most and not self._l1[last + 1]:
            last += 1
        return first * self._l2_covers, (last + 1) * self._l2_covers

    async def slice_at(self, table: int, offset: int) -> Slice:
        """The slice of an L2 table for these bytes of the disk.

        Raises:
            BlockError: the child's errno.
        """
        which = offset % self._l2_covers // self.slice_covers
        return await self.cache.get(table + which * self.cache.slice_bytes)

    def slice_start(self, offset: int) -> int:
        """The first byte of the disk that the same slice is for."""
        return offset // self.slice_covers * self.slice_covers

    # ------------------------------------------------------------------ changing

    async def own_slice(self, offset: int) -> Slice:
        """The slice for these bytes of the disk, in a table that is the active one's alone: made or copied if need be.

        It may be changed until the next `await`, with `cache.changed`.

        Raises:
            BlockError: the child's errno, ENOSPC.
            ImageError: the L1 table is wrong.
        """
        index = offset // self._l2_covers
        if (table := self.l2_table(offset)) in self._overlapping and (
            self._l1[index] & COPIED or await self.refcounts.count(table) < 2
        ):
            # Whoever writes either of them destroys the other. What is counted for both, as by a repair, is copied.
            raise ImageError(f"L2 table overlaps another table (L1 index: {index})")
        if not self._l1[index] & COPIED or not self.l2_table(offset):
            async with self._growing:
                if not self._l1[index] & COPIED or not self.l2_table(offset):
                    await self._own_table(offset, self.l2_table(offset))
        return await self.slice_at(self.l2_table(offset), offset)

    def own_slice_now(self, offset: int) -> Slice | None:
        """The same, if it is there already."""
        entry = self._l1[offset // self._l2_covers]
        table = entry & OFFSET_MASK
        if (
            not (entry & COPIED and table)
            or entry & L1_RESERVED
            or table & self._in_cluster
            or table in self._overlapping
        ):
            return None
        which = offset % self._l2_covers // self.slice_covers
        return self.cache.find(table + which * self.cache.slice_bytes)

    def change(self, slice_: Slice, offset: int, entry: int, bitmap: int = 0) -> None:
        """A new entry for the cluster at this byte of the disk.

        Args:
            slice_: of `own_slice`, without an `await` since.
            bitmap: its subclusters, where the image has any.
        """
        index = (offset - self.slice_start(offset)) >> self._cluster_bits
        if self._extended:
            slice_.table[2 * index] = entry
            slice_.table[2 * index + 1] = bitmap
        else:
            slice_.table[index] = entry
        self.cache.changed(slice_)

    def fill(self, slice_: Slice, offset: int, host: int, count: int, bitmap: int = 0) -> None:
        """`change` so many clusters, which are one behind the other in the file; each with the same subclusters."""
        size = self.header.cluster_size
        first = (offset - self.slice_start(offset)) >> self._cluster_bits
        places = array("Q", range(host | COPIED, (host | COPIED) + count * size, size))
        if self._extended:
            slice_.table[2 * first : 2 * (first + count) : 2] = places
            slice_.table[2 * first + 1 : 2 * (first + count) : 2] = array("Q", [bitmap]) * count
        else:
            slice_.table[first : first + count] = places
        self.cache.changed(slice_)

    def count_empty(self, slice_: Slice, start: int, end: int) -> int:
        """How many clusters from this byte of the disk on the slice says nothing of; no need to look behind `end`."""
        entries = self.entries(slice_, start, end).tobytes()
        return (len(entries) - len(entries.lstrip(b"\0"))) // self.header.l2_entry_size

    def entry(self, slice_: Slice, offset: int) -> tuple[int, int]:
        """The entry for the cluster at this byte of the disk, and its bitmap, where there are any."""
        index = (offset - self.slice_start(offset)) >> self._cluster_bits
        if self._extended:
            return slice_.table[2 * index], slice_.table[2 * index + 1]
        return slice_.table[index], 0

    def entries(self, slice_: Slice, start: int, end: int) -> Table:
        """Those for these bytes of the disk, with their bitmaps, where there are any."""
        words = self.header.l2_entry_size // 8
        base = self.slice_start(start)
        first, last = ((at - base >> self.header.cluster_bits) * words for at in (start, end))
        return slice_.table[first:last]

    async def _own_table(self, offset: int, old: int) -> None:
        """A new L2 table for these bytes of the disk, with the content of the old one if there is one."""
        size, index = self.header.cluster_size, offset // self._l2_covers
        new, _ = await self.refcounts.allocate(1, what="L2 table")
        try:
            if old:
                await self.debug_event("l2_alloc_cow_read")
            content = await read_bytes(self._file, old, size) if old else bytearray(size)
            await self.debug_event("l2_alloc_write")
            await self._file.pwritev(new, IoVec.of(content))
            await self._count_new_table()
        except BaseException:
            await self.refcounts.release(new, size)
            raise
        self._l1[index] = new | COPIED
        self._l1_dirty.add(index)
        self.refcounts.places.add_all([new])
        for at in range(0, size, self.cache.slice_bytes):
            # Slices of a table that is not ours alone are never dirty; who reads one now finds that it has moved.
            self.cache.forget(old + at)
            self.cache.forget(new + at)
        which = offset % self._l2_covers // self.slice_covers * self.cache.slice_bytes
        self.cache.put(new + which, content[which : which + self.cache.slice_bytes])
        if old:
            if old not in self._overlapping:
                self.refcounts.places.remove(old)
            self.refcounts.give_up(old)

    async def _count_new_table(self) -> None:
        """Before anybody refers to a new L2 table."""

    @property
    def table_covers(self) -> int:
        """Bytes of the disk that an L2 table is for."""
        return self._l2_covers

    @property
    def l1_covers(self) -> int:
        """The same of the L1 table."""
        return len(self._l1) * self._l2_covers

    def drop_table(self, offset: int) -> None:
        """Nothing has a place any more that is in the L2 table for these bytes of the disk.

        It has no changes that wait to be written; its clusters are the caller's to give up.

        Raises:
            ImageError: the L1 table is wrong.
        """
        table, index = self.l2_table(offset), offset // self._l2_covers
        if table in self._overlapping:
            raise ImageError(f"L2 table overlaps another table (L1 index: {index})")
        self._l1[index] = 0
        self._l1_dirty.add(index)
        for at in range(table, table + self.header.cluster_size, self.cache.slice_bytes):
            self.cache.forget(at)
        self.refcounts.places.remove(table)
        self.refcounts.give_up(table)

    def next_table(self, start: int, end: int) -> int:
        """The first place in `start`..`end` that has a table, or `end`."""
        covers, stop = self._l2_covers, min(-(-end // self._l2_covers), len(self._l1))
        found = (index for index in range(start // covers, stop) if self._l1[index])
        return min(max(start, next(found, stop) * covers), end) if start < end else end

    def has_table(self, offset: int, length: int) -> bool:
        """Whether a table is in this range of the file, so that it cannot be guest data; if somebody writes here."""
        refcounts = self._refcounts
        return refcounts is not None and (
            refcounts.places.has(offset, length) or refcounts.inactive.has(offset, length)
        )

    async def make_room(self, size: int) -> None:
        """A table for a disk of this size.

        Raises:
            BlockError: the child's errno, ENOSPC, EFBIG.
            ImageError: free clusters turn out to be tables.
        """
        async with self._growing:
            header, needed = self.header, self.header.l1_entries_needed(size)
            entries = max(needed, len(self._l1))
            # A disk of no bytes may have no table yet: how long it gets matters here, and not where.
            place = header.l1_offset or header.cluster_size
            try:
                replace(header, size=size, l1_entries=entries, l1_offset=place).check()
            except ImageError:
                what = f"Failed to grow the L1 table: {os.strerror(errno.EFBIG)}"
                raise BlockError(errno.EFBIG, what) from None
            if needed > len(self._l1):
                await self._move_l1(needed)

    async def _move_l1(self, entries: int) -> None:
        header = self.header
        await self.debug_event("l1_grow_alloc_table")
        clusters = -(-entries * 8 // header.cluster_size)
        offset = await self.room_for(clusters)
        old_bytes = len(self._l1) * 8
        if old_bytes:
            self.refcounts.give_up(header.l1_offset, old_bytes)
            self.refcounts.places.remove(header.l1_offset, old_bytes)
        self.refcounts.places.add_alone("Active L1 table", offset, entries * 8)
        self._l1.extend([0] * (entries - len(self._l1)))
        self.header = replace(header, l1_entries=entries, l1_offset=offset)
        self._l1_moved = self._header_dirty = True

    async def room_for(self, clusters: int) -> int:
        """Take clusters that are next to each other, wherever that is: behind everything else, in the end.

        Returns: the offset of the first.

        Raises:
            BlockError: the child's errno, EFBIG.
            ImageError: free clusters turn out to be tables.
        """
        refcounts = self.refcounts
        if clusters >= refcounts.per_block:
            # A block of counts is where it counts, so no more clusters than that are next to each other by chance.
            return await refcounts.allocate_run(clusters)
        while True:
            offset, got = await refcounts.allocate(clusters)
            if got == clusters:
                return offset
            await refcounts.release(offset, got * self.header.cluster_size)
            refcounts.skip(offset, got)

    def _l1_writes(self, dirty: set[int], moved: bool) -> list[tuple[int, bytes]]:
        start = self.header.l1_offset
        if moved:
            return [(start, OFFSETS.encode(self._l1))]
        return entry_writes(start, self._l1, dirty)
