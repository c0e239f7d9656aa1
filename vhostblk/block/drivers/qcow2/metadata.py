"""The tables of one image, and the order in which changes to them reach the disk.

Theory of operation: L1, L2 slices and reference counts are changed in memory, always together and never across an
`await`. `sync` takes a picture of all that is dirty at one moment, and writes it in this order:

1. reference counts of what was taken, and where they are; guest data are in the file already
2. a flush
3. L2 slices and L1 entries: a new table was written before anybody knew it; the header, after a flush, if it changes
4. a flush; now nobody refers to what was given up, and it may be taken again.

So, whenever the power goes, everything that is referred to is counted as used, and has its data: `check` finds clusters
that nobody uses, at worst. A write that fails leaves all of it dirty, and the next sync tries again.

With lazy reference counts the first step is put off until there is no room for more, or the image is closed; before
that is done for the first time, the header says that counts are wrong (`dirty`), so that whoever opens the image after
a crash repairs it (`repair.py`).

Context: the control loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

from vhostblk.block.drivers.qcow2.cache import Slice, TableCache
from vhostblk.block.drivers.qcow2.entries import COPIED, L1_RESERVED, OFFSET_MASK
from vhostblk.block.drivers.qcow2.header import AutoClear, Header, Incompatible
from vhostblk.block.drivers.qcow2.refcounts import Refcounts
from vhostblk.block.drivers.qcow2.tables import (
    OFFSETS,
    Table,
    entry_writes,
    read_bytes,
    read_table,
)
from vhostblk.block.edge import Edge
from vhostblk.block.execution import to_the_end
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError, ImageError

# The new header, and what to write for it, each durable before the next.
HeaderChange: TypeAlias = tuple[Header, list[tuple[int, bytes]]]
# Entries of the L1 table to look at for one run.
_ENOUGH = 4096


class Metadata:
    """Tables of an image that is open.

    Args:
        file: where they are. data: where guest data are; the same, if there is no external data file.
        refcounts: None: nobody writes.

    Attributes:
        slice_covers: bytes of the disk that a slice is for.
        discards: what is given up goes back to the host.
        lazy: writing reference counts is put off.
    """

    def __init__(
        self,
        file: Edge,
        data: Edge,
        header: Header,
        l1: Table,
        cache: TableCache,
        refcounts: Refcounts | None,
    ) -> None:
        self.header = header
        self._on_disk = header
        self.cache = cache
        self._file = file
        self._data = data
        self._l1 = l1
        self._refcounts = refcounts
        self.discards = self.lazy = False
        self._overlapping: set[int] = set()
        if refcounts is not None:
            self._add_l2_tables(refcounts)
        self._l1_dirty: set[int] = set()
        self._header_dirty = False
        self._l1_moved = False
        self._sync_lock = asyncio.Lock()
        self._growing = asyncio.Lock()
        self._header_lock = asyncio.Lock()
        # What never changes, without a call for each request.
        self._cluster_bits = header.cluster_bits
        self._in_cluster = header.cluster_size - 1
        self._extended = header.has_subclusters
        self._l2_covers = header.l2_entries << header.cluster_bits
        self.slice_covers = cache.slice_bytes // header.l2_entry_size << header.cluster_bits

    @classmethod
    async def load(
        cls, file: Edge, data: Edge, header: Header, cache: TableCache, refcounts: Refcounts | None
    ) -> Metadata:
        """Read the L1 table.

        Raises:
            BlockError: the child's errno.
        """
        l1 = await read_table(file, header.l1_offset, header.l1_entries)
        return cls(file, data, header, l1, cache, refcounts)

    @property
    def refcounts(self) -> Refcounts:
        """Of an image that is written."""
        assert self._refcounts is not None
        return self._refcounts

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
        entry = self._l1[index]
        table = entry & OFFSET_MASK
        if entry & L1_RESERVED or table & self._in_cluster:
            raise ImageError(f"L2 table offset {entry:#x} unaligned (L1 index: {index})")
        return table

    def without_table(self, offset: int, limit: int) -> tuple[int, int]:
        """The range around `offset` for which there are no L2 tables; no need to look behind `limit`."""
        first = last = offset // self._l2_covers
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
                    await self._own_table(index, self.l2_table(offset))
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

    async def _own_table(self, index: int, old: int) -> None:
        """A new L2 table, with the content of the old one if there is one."""
        size = self.header.cluster_size
        new, _ = await self.refcounts.allocate(1)
        try:
            content = await read_bytes(self._file, old, size) if old else bytearray(size)
            await self._file.pwritev(new, IoVec.of(content))
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
        if old:
            if old not in self._overlapping:
                self.refcounts.places.remove(old)
            self.refcounts.give_up(old)

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
            needed = self.header.l1_entries_needed(size)
            try:
                replace(self.header, size=size, l1_entries=max(needed, len(self._l1))).check()
            except ImageError as error:
                raise BlockError(errno.EFBIG, str(error)) from None
            if needed > len(self._l1):
                await self._move_l1(needed)

    async def trim(self) -> None:
        """Make the file as small as it can be without moving anything.

        Raises:
            BlockError: the child's errno.
        """
        async with self._sync_lock:
            await self._sync(everything=True)
            # A block may be counted by one that is empty then.
            while await self.refcounts.drop_empty_blocks():
                await self._sync(everything=True)
            async with self.refcounts.end() as end:
                if end < self._file.node.length:
                    with contextlib.suppress(BlockError):  # it is only longer than it has to be
                        await self._file.truncate(end)

    async def set_size(self, size: int) -> None:
        """Make the disk that large; there is room in the table.

        Raises:
            BlockError: the child's errno; then the size is as before.
        """
        old = self.header
        self.header = replace(old, size=size)
        self._header_dirty = True
        try:
            await self.sync()
        except BaseException:
            self.header = replace(self.header, size=old.size)
            self._header_dirty = True
            raise

    async def _move_l1(self, entries: int) -> None:
        header = self.header
        clusters = -(-entries * 8 // header.cluster_size)
        # Contiguous, wherever that is: behind everything else, in the end.
        while True:
            offset, got = await self.refcounts.allocate(clusters)
            if got == clusters:
                break
            await self.refcounts.release(offset, got * header.cluster_size)
            self.refcounts.skip(offset, got)
        old_bytes = len(self._l1) * 8
        if old_bytes:
            self.refcounts.give_up(header.l1_offset, old_bytes)
            self.refcounts.places.remove(header.l1_offset, old_bytes)
        self.refcounts.places.add_alone("Active L1 table", offset, entries * 8)
        self._l1.extend([0] * (entries - len(self._l1)))
        self.header = replace(header, l1_entries=entries, l1_offset=offset)
        self._l1_moved = self._header_dirty = True

    # ------------------------------------------------------------------ features

    async def clear_unknown_features(self) -> None:
        """Whoever writes without knowing a feature says so by clearing its bit.

        Raises:
            BlockError: the child's errno.
        """
        known = self.header.autoclear & sum(AutoClear)
        if known != self.header.autoclear:
            self.header = replace(self.header, autoclear=known)
            await self.write_header(autoclear=known)
            await self._file.flush()

    async def mark_corrupt(self) -> None:
        """Nobody writes to this image any more, as far as we can tell them."""
        if self.header.version >= 3:
            with contextlib.suppress(BlockError):
                await self._mark(Incompatible.CORRUPT, on=True)

    async def finish(self) -> None:
        """Write all, also what was put off.

        Raises:
            BlockError: a child's errno.
            ImageError: counts are wrong.
        """
        while self._has_changes or self._has_counts:
            # Twice, if the first one frees clusters: their counts are lowered when it is over.
            await self.sync(everything=True)
        if self._is_marked_dirty:
            await self._file.flush()
            await self._mark(Incompatible.DIRTY, on=False)

    @property
    def _is_marked_dirty(self) -> bool:
        return bool(self._on_disk.incompatible & Incompatible.DIRTY)

    async def _mark(self, feature: Incompatible, *, on: bool) -> None:
        old = self._on_disk.incompatible
        await self.write_header(incompatible=old | feature if on else old & ~feature)
        await self._file.flush()

    async def change_header(self, change: Callable[[Header], HeaderChange]) -> None:
        """Put another header in place of what is on the disk, durably, by writes that are ordered.

        Args:
            change: is shown what is on the disk; the fields that requests change stay as they are.

        Raises:
            BlockError: the child's errno; then it may be either.
        """
        async with self._header_lock:
            header, writes = change(self._on_disk)
            for write in writes:
                await self._write_all([write])
                await self._file.flush()
            self._on_disk = header
            self.header = replace(
                self.header,
                backing_name=header.backing_name,
                backing_offset=header.backing_offset,
                extensions=header.extensions,
                autoclear=header.autoclear,
            )

    async def write_header(self, **fields: int) -> None:
        """Change these fields on the disk, and no others, whoever else changes some meanwhile.

        Raises:
            BlockError: the child's errno.
        """
        async with self._header_lock:
            header = replace(self._on_disk, **fields)  # type: ignore[arg-type]
            await self._write_all([(0, header.to_bytes())])
            self._on_disk = header

    # ------------------------------------------------------------------ writing

    @property
    def is_dirty(self) -> bool:
        """Whether the disk does not know everything yet."""
        return self._sync_lock.locked() or self._has_changes

    @property
    def _has_changes(self) -> bool:
        return bool(
            self.cache.is_dirty
            or self._l1_dirty
            or self._header_dirty
            or (self._refcounts is not None and self._refcounts.has_given_up)
            or (self._has_counts and not (self.lazy and self._is_marked_dirty))
        )

    @property
    def _has_counts(self) -> bool:
        return self._refcounts is not None and self._refcounts.has_writes

    @property
    def is_full(self) -> bool:
        """Whether so much waits to be written that it is time."""
        return self.cache.is_full or self.refcounts.is_full

    async def sync(self, *, everything: bool = False) -> None:
        """Write what is dirty now; see the module's docstring.

        Args:
            everything: put nothing off.

        Raises:
            BlockError: a child's errno; all that was not written still has to be.
            ImageError: counts are wrong.
        """
        async with self._sync_lock:
            if self._has_changes or (everything and self._has_counts):
                await self._sync(everything)

    async def _sync(self, everything: bool) -> None:
        refcounts, cache = self.refcounts, self.cache
        puts_off = self.lazy and not everything and not refcounts.is_full
        if puts_off and self._has_counts and not self._is_marked_dirty:
            await self._mark(Incompatible.DIRTY, on=True)
        # One moment:
        counts = refcounts.no_writes() if puts_off else refcounts.take_writes()
        slices = cache.take_dirty()
        pictures = cache.writes(slices)
        l1_dirty, l1_moved = self._l1_dirty, self._l1_moved
        self._l1_dirty, self._l1_moved = set(), False
        given_up = refcounts.take_given_up()
        moved = None
        if counts.moved is not None:
            offset, clusters = counts.moved
            moved = {"refcount_table_offset": offset, "refcount_table_clusters": clusters}
            self.header = replace(self.header, **moved)  # type: ignore[arg-type]
        header, self._header_dirty = (self.header if self._header_dirty else None), False
        l1 = self._l1_writes(l1_dirty, l1_moved)
        try:
            await self._write_all(counts.blocks)
            if counts.table:
                await self._file.flush()
                await self._write_all(counts.table)
            if moved is not None:
                await self._file.flush()
                await self.write_header(**moved)
            if self._data is not self._file:
                await self._data.flush()
            await self._file.flush()
            await self._write_all(pictures)
            await self._write_all(l1)
            if header is not None:
                await self._file.flush()
                await self.write_header(
                    size=header.size, l1_entries=header.l1_entries, l1_offset=header.l1_offset
                )
            if given_up or header is not None:
                await self._file.flush()
        except BaseException:
            refcounts.not_written(counts)
            cache.not_written(slices)
            self._l1_dirty |= l1_dirty
            self._l1_moved |= l1_moved
            self._header_dirty |= header is not None
            refcounts.not_settled(given_up)
            raise
        refcounts.written(counts)
        cache.written(slices)
        await to_the_end(self._settle(given_up))

    async def _settle(self, given_up: list[int]) -> None:
        """Nobody on the disk refers to these clusters any more: give the host their room, if we may."""
        size = self.header.cluster_size
        if self.discards:
            for first, count in _runs(given_up):
                with contextlib.suppress(BlockError):  # it is a hint
                    if all(
                        [await self.refcounts.count((first + n) * size) == 1 for n in range(count)]
                    ):
                        await self._file.pdiscard(first * size, count * size)
        await self.refcounts.settle(given_up)

    def _l1_writes(self, dirty: set[int], moved: bool) -> list[tuple[int, bytes]]:
        start = self.header.l1_offset
        if moved:
            return [(start, OFFSETS.encode(self._l1))]
        return entry_writes(start, self._l1, dirty)

    async def _write_all(self, writes: list[tuple[int, bytes]]) -> None:
        for offset, data in writes:
            await self._file.pwritev(offset, IoVec.of(data))


def _runs(clusters: list[int]) -> Iterator[tuple[int, int]]:
    """First and length of each run of consecutive numbers."""
    start = 0
    for at in range(1, len(clusters) + 1):
        if at == len(clusters) or clusters[at] != clusters[at - 1] + 1:
            yield clusters[start], at - start
            start = at
