"""What an image is going to be, built in its free space beside what it is, until one write of the header decides.

Theory of operation: what internal snapshots change they change everywhere: counts of all clusters, and the flags that
say which clusters may be written in place. Tables in place would contradict each other until the last one is written.
So nothing that the image uses is written: blocks of counts that change get a new place, as do L2 tables, the L1 table
and the table of snapshots, in clusters that are free now and stay so if the header is never written. The header's first
sector names them all, so after a crash the image is as it was, or as it was going to be, and `check` finds nothing.

Nobody else uses the image meanwhile, and all that is known in memory was written before.

Context: the control loop. Knows nothing about what snapshots are.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Iterable

from vhostblk.block.drivers.qcow2.cache import Slice, TableCache
from vhostblk.block.drivers.qcow2.header import MAX_OFFSET, MAX_REFCOUNT_TABLE_BYTES, Header
from vhostblk.block.drivers.qcow2.overlaps import TablePlaces
from vhostblk.block.drivers.qcow2.tables import OFFSETS, Codec, Table, read_table
from vhostblk.block.edge import Edge
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError, ImageError

_CACHE_BYTES = 64 << 20


class Shadow:
    """Reference counts as they are going to be, and where there is room.

    Args:
        table: where the blocks of counts are now.
        places: of all tables that there are now.
    """

    def __init__(self, file: Edge, header: Header, table: Table, places: TablePlaces) -> None:
        self._file = file
        self._header = header
        self._size = header.cluster_size
        self._places = places
        self._codec = Codec(header.refcount_order)
        self._per_block = header.cluster_size * 8 >> header.refcount_order
        self._old = table
        self._new = table[:]
        self._moved: list[int] = []
        self._is_moved: set[int] = set()
        self._blocks = TableCache(file, self._codec, self._size, _CACHE_BYTES, "refblock_load")
        # No cluster before this one is taken any more, so what is taken need not be counted at once.
        self._hint = 0
        self._pending: list[tuple[int, int]] = []

    @classmethod
    async def load(cls, file: Edge, header: Header, places: TablePlaces) -> Shadow:
        """Of an image as it is on the disk.

        Raises:
            BlockError: the child's errno.
        """
        entries = header.refcount_table_clusters * header.cluster_size // 8
        table = await read_table(file, header.refcount_table_offset, entries)
        return cls(file, header, table, places)

    # ------------------------------------------------------------------ counts

    async def add(self, clusters: Iterable[int], change: int) -> None:
        """So many users more, or less, of these clusters.

        Raises:
            BlockError: EINVAL: more than a count can say; or the child's errno.
            ImageError: a cluster had fewer users.
        """
        index, block = -1, None
        for cluster in clusters:
            which, at = divmod(cluster, self._per_block)
            if block is None or which != index:
                index, block = which, await self._own(which)
            count = block.table[at] + change
            if count < 0 or (change > 0 and not block.table[at]):
                raise ImageError(f"reference count of cluster {cluster} is too low")
            if count > self._codec.largest:
                raise BlockError(errno.EINVAL, "a reference count cannot be that large")
            block.table[at] = count
        await self._settle()

    async def counts(self, clusters: Iterable[int]) -> list[int]:
        """How many use each of these clusters; raises BlockError with the child's errno."""
        found = []
        index, counts = -1, None
        for cluster in clusters:
            which, at = divmod(cluster, self._per_block)
            if which != index:
                index, counts = which, await self._counts(self._new, which)
            found.append(counts[at] if counts is not None else 0)
        return found

    async def _counts(self, table: Table, index: int) -> Table | None:
        place = table[index] if index < len(table) else 0
        return (await self._blocks.get(place)).table if place else None

    async def _own(self, index: int) -> Slice:
        """A block at a new place, to be changed until the next `await`."""
        if index not in self._is_moved:
            await self._move(index)
        block = await self._blocks.get(self._new[index])
        self._blocks.changed(block)
        return block

    async def _move(self, index: int) -> None:
        if self._blocks.is_full:
            await self._write_blocks()
        place = await self._find(1)
        old = await self._counts(self._old, index)
        counts = old if old is not None else self._codec.decode(bytes(self._size))
        await self._file.pwritev(place, IoVec.of(self._codec.encode(counts)))
        if index >= len(self._new):
            self._new.extend([0] * (index + 1 - len(self._new)))
        elif self._new[index]:
            self._pending.append((self._new[index] // self._size, -1))
        self._new[index] = place
        self._moved.append(index)
        self._is_moved.add(index)
        self._pending.append((place // self._size, 1))

    async def _settle(self) -> None:
        """Count what was taken and given up for blocks that have moved, which may make others move."""
        while self._pending:
            cluster, change = self._pending.pop()
            index, at = divmod(cluster, self._per_block)
            block = await self._own(index)
            if block.table[at] + change < 0:
                raise ImageError(f"reference count of cluster {cluster} is 0 already")
            block.table[at] += change

    # ------------------------------------------------------------------ room

    async def allocate(self, clusters: int) -> int:
        """The offset of so many clusters next to each other that nobody uses, now or later; they count as used once.

        Raises:
            BlockError: EFBIG: the image cannot grow; or the child's errno.
            ImageError: free clusters turn out to be tables.
        """
        offset = await self._find(clusters)
        first = offset // self._size
        self._pending += ((first + number, 1) for number in range(clusters))
        await self._settle()
        return offset

    async def _find(self, clusters: int) -> int:
        start = at = self._hint
        while at - start < clusters:
            index, first = divmod(at, self._per_block)
            old, new = await self._counts(self._old, index), await self._counts(self._new, index)
            end = _end_of_free(
                old, new, first, min(first + clusters - (at - start), self._per_block)
            )
            at += end - first
            if end < self._per_block and at - start < clusters:
                at = start = index * self._per_block + _next_free(old, new, end, self._per_block)
        self._hint = at
        offset, length = start * self._size, clusters * self._size
        if offset + length > MAX_OFFSET:
            raise BlockError(errno.EFBIG, "the image file cannot grow any more")
        # If they are, counts are wrong.
        self._places.check("Preventing invalid allocation", offset, length)
        return offset

    # ------------------------------------------------------------------ the disk

    async def write(self) -> dict[str, int]:
        """Write all counts; returns what the header has to say about them.

        Raises:
            BlockError: EFBIG; or the child's errno.
            ImageError: counts are wrong.
        """
        header = self._header
        first = header.refcount_table_offset // self._size
        await self.add(range(first, first + header.refcount_table_clusters), -1)
        while True:
            clusters = -(-len(self._new) * 8 // self._size)
            if clusters * self._size > MAX_REFCOUNT_TABLE_BYTES:
                raise BlockError(errno.EFBIG, "the reference count table cannot grow any more")
            offset = await self.allocate(clusters)
            if len(self._new) * 8 <= clusters * self._size:
                break
            first = offset // self._size
            await self.add(range(first, first + clusters), -1)
        await self._write_blocks()
        table = self._new[:]
        table.extend([0] * (clusters * self._size // 8 - len(table)))
        await self._file.pwritev(offset, IoVec.of(OFFSETS.encode(table)))
        return {"refcount_table_offset": offset, "refcount_table_clusters": clusters}

    async def _write_blocks(self) -> None:
        taken = self._blocks.take_dirty()
        for block in taken:
            await self._file.pwritev(block.offset, IoVec.of(self._codec.encode(block.table)))
        self._blocks.written(taken)

    async def freed(self) -> AsyncIterator[tuple[int, int]]:
        """Offset and length of what was used, and is not any more."""
        for index in sorted(self._moved):
            old, new = await self._counts(self._old, index), await self._counts(self._new, index)
            if old is None or new is None:
                continue
            start = None
            for at in range(self._per_block + 1):
                is_freed = at < self._per_block and old[at] and not new[at]
                if is_freed and start is None:
                    start = at
                elif not is_freed and start is not None:
                    yield (index * self._per_block + start) * self._size, (at - start) * self._size
                    start = None


def _end_of_free(old: Table | None, new: Table | None, start: int, stop: int) -> int:
    """Where the free clusters from `start` on end, at most at `stop`."""
    for at in range(start, stop):
        if (old is not None and old[at]) or (new is not None and new[at]):
            return at
    return stop


def _next_free(old: Table | None, new: Table | None, start: int, stop: int) -> int:
    """The first free cluster from `start` on; `stop` if there is none."""
    at = start
    while at < stop:
        for counts in (old, new):
            if counts is not None:
                try:
                    at = counts.index(0, at)
                except ValueError:
                    return stop
        if not ((old is not None and old[at]) or (new is not None and new[at])):
            return at
        at += 1
    return stop
