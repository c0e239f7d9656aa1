"""Guest clusters of an image that is written: what is compressed, what reads as zeroes, and what is given up; the rest
of what is done with them is in `cluster_writes.py`.

Context: the control loop. Knows nothing about how tables reach the disk: `metadata.py`.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import suppress

from vhostblk.block.drivers.qcow2.cluster_writes import ClusterWrites
from vhostblk.block.drivers.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, Kind
from vhostblk.block.drivers.qcow2.header import SUBCLUSTERS
from vhostblk.block.drivers.qcow2.refcounts import Old
from vhostblk.block.drivers.qcow2.tables import Table
from vhostblk.block.execution import to_the_end
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import align_down, align_up
from vhostblk.errors import BlockError

__all__ = ["Clusters", "Old"]

_ZERO = 1
_ALL = (1 << SUBCLUSTERS) - 1
_ALL_ZERO = _ALL << SUBCLUSTERS


class Clusters(ClusterWrites):
    """Reads where things are, writes, and clears."""

    # ------------------------------------------------------------------ compressed writes

    async def write_compressed(self, offset: int, clusters: Sequence[bytes]) -> None:
        """Write whole clusters from `offset` on, which are compressed already, and shorter for that.

        Raises: as `write`; of those that are in one slice of a table none is written then.
        """
        while clusters:
            room = self._metadata.slice_start(offset) + self._metadata.slice_covers - offset
            count = min(room // self._size, len(clusters))
            await self._write_compressed(offset, clusters[:count])
            clusters = clusters[count:]
            offset += count * self._size

    async def _write_compressed(self, start: int, clusters: Sequence[bytes]) -> None:
        metadata, refcounts = self._metadata, self._metadata.refcounts
        await metadata.make_way()
        end = start + len(clusters) * self._size
        async with self.locks.held(start, end, alone=True):
            slice_ = await metadata.own_slice(start)
            self.check_sound(slice_.table, start, start, end)
            places: list[int] = []
            entries: list[int] = []
            try:
                for data in clusters:
                    places.append(await refcounts.allocate_bytes(len(data)))
                    entries.append(self._entries.compressed_entry(places[-1], len(data)))
                await self._write_packed(places, clusters)
                slice_ = await metadata.own_slice(start)
            except BaseException:
                for host, data in zip(places, clusters, strict=False):
                    await refcounts.release(host, len(data))
                raise
            old: list[Old] = []
            for at, entry in zip(range(start, end, self._size), entries, strict=True):
                old += self.gives_up(metadata.entry(slice_, at)[0])
                metadata.change(slice_, at, entry)
            await to_the_end(self.let_go(start, end, old))

    async def _write_packed(self, places: Sequence[int], clusters: Sequence[bytes]) -> None:
        """Compressed clusters; those that are behind each other in the file at once."""
        first, count = 0, len(clusters)
        while first < count:
            last, end = first, places[first]
            while last < count and places[last] == end:
                end += len(clusters[last])
                last += 1
            for _ in range(first, last):
                await self._metadata.debug_event("write_compressed")
            await self._data.pwritev(places[first], IoVec.of(b"".join(clusters[first:last])))
            first = last

    # ------------------------------------------------------------------ zeroes and discards

    async def clear(
        self, offset: int, length: int, *, keep: bool, discard: bool, unwritten: bool = False
    ) -> None:
        """Whole clusters, or subclusters, read as zeroes.

        Args:
            keep: their place stays theirs.
            discard: where nothing is below it does not matter what they read as.
            unwritten: ENOTSUP if one has data.

        Raises:
            BlockError: ENOTSUP: not by changing tables only; the child's errno.
            ImageError: an entry is wrong.
        """
        if self._metadata.header.version < 3 and self._has_backing():
            raise BlockError(errno.ENOTSUP)
        at, end = offset, offset + length
        covers = self._metadata.slice_covers
        while at < end:
            stop = min(end, self._metadata.slice_start(at) + covers)
            if self._metadata.is_full:
                await self._metadata.sync()
            start, limit = align_down(at, self._size), align_up(stop, self._size)
            async with self.locks.held(start, limit, alone=True):
                if (
                    not self._has_backing()
                    and not self._metadata.l2_table(at)
                    and self._leaves_unallocated(discard)
                ):
                    at = stop
                    continue
                slice_ = await self._metadata.own_slice(at)
                old: list[Old] = []
                self.check_sound(slice_.table, at, start, align_up(stop, self._size))
                self._check_clearable(slice_.table, at, stop, unwritten)
                for cluster in range(start, stop, self._size):
                    entry, bits = self._metadata.entry(slice_, cluster)
                    low = max(at - cluster, 0) // self._sub
                    high = -(-min(stop - cluster, self._size) // self._sub)
                    whole = (low, high) == (0, self._size // self._sub)
                    new = self._cleared(
                        entry, bits, low, high, keep=keep or not whole, discard=discard
                    )
                    if new != (entry, bits):
                        if entry & OFFSET_MASK and not new[0] & OFFSET_MASK:
                            old += self.gives_up(entry)
                        self._metadata.change(slice_, cluster, *new)
                await to_the_end(self.let_go(start, limit, old))
                if not keep and self._is_external:
                    # Nobody else can have the place; the room need not stay theirs.
                    with suppress(BlockError):
                        await self._data.pdiscard(at, stop - at)
            at = stop

    def _leaves_unallocated(self, discard: bool) -> bool:
        """Whether clusters stay unallocated where that reads as zeroes. As in QEMU, what is written to is not."""
        return discard or self._metadata.header.version < 3

    def _check_clearable(self, table: Table, start: int, end: int, unwritten: bool) -> None:
        """A part of a compressed cluster cannot be cleared; nor what has data, if it should have none."""
        for at in (start, end - 1):
            cluster = align_down(at, self._size)
            if not unwritten and start <= cluster and cluster + self._size <= end:
                continue
            base = self._metadata.slice_start(at)
            run = self._entries.part_at(table, base, at)
            if run.kind is Kind.COMPRESSED or (unwritten and run.kind is Kind.NORMAL):
                raise BlockError(errno.ENOTSUP)

    def _cleared(
        self, entry: int, bits: int, low: int, high: int, *, keep: bool, discard: bool
    ) -> tuple[int, int]:
        """The entry of a cluster whose subclusters `low`..`high` read as zeroes."""
        is_allocated = bool(entry & (OFFSET_MASK | COMPRESSED | COPIED | _ZERO))
        # As in QEMU, subclusters without a place are as good as discarded.
        is_allocated |= bool(bits) and not discard
        if not is_allocated and not self._has_backing() and self._leaves_unallocated(discard):
            return entry, bits
        keep = keep and not entry & COMPRESSED and bool(entry & COPIED or (bits and not discard))
        if not self._extended:
            if self._metadata.header.version < 3:
                return 0, 0
            return (entry | _ZERO if keep else _ZERO), 0
        touched = (1 << high) - (1 << low)
        if not keep and touched == _ALL:
            return 0, _ALL_ZERO
        return entry, bits & ~touched | touched << SUBCLUSTERS

    # ------------------------------------------------------------------ giving up

    async def make_empty(self) -> None:
        """Give up all clusters, and the tables that name them; on the disk, too, when this returns. Nobody writes.

        Raises:
            BlockError: the child's errno; some are given up then.
            ImageError: an entry is wrong.
        """
        metadata = self._metadata
        async with self.locks.held(0, metadata.l1_covers, alone=True):
            # So no slice that is forgotten has changes.
            await metadata.sync()
            for start in range(0, metadata.l1_covers, metadata.table_covers):
                if metadata.l2_table(start):
                    old = await self._all_of(start, start + metadata.table_covers)
                    metadata.drop_table(start)
                    await to_the_end(self.let_go(start, start + metadata.table_covers, old))
                if metadata.is_full:
                    await metadata.sync()
            await metadata.sync()

    async def _all_of(self, start: int, end: int) -> list[Old]:
        """What one L2 table has."""
        old = []
        for at in range(start, end, self._metadata.slice_covers):
            slice_ = await self._metadata.slice_at(self._metadata.l2_table(start), at)
            stop = at + self._metadata.slice_covers
            self.check_sound(slice_.table, at, at, stop)
            for cluster in range(at, stop, self._size):
                old += self.gives_up(self._metadata.entry(slice_, cluster)[0])
        return old
