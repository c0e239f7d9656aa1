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
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

from vhostblk.block.drivers.qcow2.cache import TableCache
from vhostblk.block.drivers.qcow2.cluster_map import ClusterMap
from vhostblk.block.drivers.qcow2.header import AutoClear, Header, Incompatible
from vhostblk.block.drivers.qcow2.refcount_table import RefcountWrites
from vhostblk.block.drivers.qcow2.refcounts import Refcounts
from vhostblk.block.drivers.qcow2.tables import (
    Table,
    read_table,
)
from vhostblk.block.edge import Edge
from vhostblk.block.execution import to_the_end
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError

# The new header, and what to write for it, each durable before the next.
HeaderChange: TypeAlias = tuple[Header, list[tuple[int, bytes]]]


class Metadata(ClusterMap):
    """Tables of an image that is open, and how they get to the disk.

    Args:
        file: where they are. data: where guest data are; the same, if there is no external data file.
        refcounts: None: nobody writes.

    Attributes:
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
        super().__init__(file, header, l1, cache, refcounts)
        self._on_disk = header
        self._data = data
        self.discards = self.lazy = False
        self._sync_lock = asyncio.Lock()
        self._header_lock = asyncio.Lock()

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

    # ------------------------------------------------------------------ sizes, and the header

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
            await self.mark_clean()

    async def mark_dirty(self) -> None:
        """The image says from now on that its counts are wrong; raises BlockError."""
        await self._mark(Incompatible.DIRTY, on=True)

    async def mark_clean(self) -> None:
        """They are not, and that is on the disk; raises BlockError."""
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
    def unwritten(self) -> tuple[bool, bool]:
        """Whether there are changes of L2 tables, and of reference counts, that are not on the disk."""
        return self.cache.is_dirty, self._has_counts

    async def make_way(self) -> None:
        """Before clusters are taken: what is dirty is written if there is too much of it, or that frees many.

        Raises: as `sync`.
        """
        if self.is_full or self.refcounts.could_settle:
            await self.sync()

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
            await self.mark_dirty()
        # One moment:
        counts = RefcountWrites.none() if puts_off else refcounts.take_writes()
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
            await self._write_counts(counts)
            if moved is not None:
                await self._file.flush()
                await self.debug_event("refblock_alloc_switch_table")
                await self.write_header(**moved)
            if self._data is not self._file:
                await self._data.flush()
            await self._file.flush()
            await self._write_all(pictures, "l2_update")
            if l1_moved:
                await self.debug_event("l1_grow_write_table")
            await self._write_all(l1, "l1_update")
            if header is not None:
                await self._file.flush()
                if l1_moved:
                    await self.debug_event("l1_grow_activate_table")
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

    async def _write_counts(self, counts: RefcountWrites) -> None:
        """Blocks, then where they are."""
        is_moved = counts.moved is not None
        if counts.table:
            await self.debug_event("refblock_alloc_write")
        if is_moved:
            await self.debug_event("refblock_alloc_write_blocks")
        await self._write_all(counts.blocks, "refblock_update_part")
        for group in counts.table:
            await self._file.flush()
            event = "refblock_alloc_write_table" if is_moved else "refblock_alloc_hookup"
            await self._write_all(group, event)

    async def _count_new_table(self) -> None:
        """What is counted for tables is not put off, as in QEMU: a crash then costs less to repair."""
        if not self.lazy:
            return
        async with self._sync_lock:
            counts = self.refcounts.take_writes()
            try:
                if counts.moved is None:
                    await self._write_counts(counts)
            except BaseException:
                self.refcounts.not_written(counts)
                raise
            if counts.moved is None:
                self.refcounts.written(counts)
            else:
                self.refcounts.not_written(counts)

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

    async def _write_all(self, writes: list[tuple[int, bytes]], event: str = "none") -> None:
        for offset, data in writes:
            if event != "none":
                await self.debug_event(event)
            await self._file.pwritev(offset, IoVec.of(data))


def _runs(clusters: list[int]) -> Iterator[tuple[int, int]]:
    """First and length of each run of consecutive numbers."""
    start = 0
    for at in range(1, len(clusters) + 1):
        if at == len(clusters) or clusters[at] != clusters[at - 1] + 1:
            yield clusters[start], at - start
            start = at
