"""Guest clusters of an image that is written: where they come from, and how they get a place of their own.

Theory of operation: a write into clusters that have their place, and share it with nobody, goes there. Any other
gets new clusters, writes the data there together with what was around it before (copy on write), and then changes the
L2 entries: from one moment to the next, the disk shows the new clusters. Extents of the engine for the range are taken
back afterwards, and only then the old clusters are given up.

Context: the control loop. Knows nothing about how tables reach the disk: `metadata.py`.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from vhostblk.block.drivers.qcow2.cache import Slice
from vhostblk.block.drivers.qcow2.entries import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    EntryError,
    EntryReader,
    Kind,
    Run,
)
from vhostblk.block.drivers.qcow2.header import SUBCLUSTERS
from vhostblk.block.drivers.qcow2.locks import RangeLocks
from vhostblk.block.drivers.qcow2.metadata import Metadata
from vhostblk.block.drivers.qcow2.refcounts import Old
from vhostblk.block.drivers.qcow2.tables import Table
from vhostblk.block.edge import Edge
from vhostblk.block.execution import to_the_end
from vhostblk.block.flags import Req
from vhostblk.block.iov import IoVec, concat
from vhostblk.block.limits import align_down, align_up
from vhostblk.errors import BlockError, ImageError

if TYPE_CHECKING:
    from vhostblk.block.crypto.encrypted_file import Encryption

Read = Callable[[int, IoVec], Awaitable[None]]
Changed = Callable[[int, int], Awaitable[None]]

_ALL = (1 << SUBCLUSTERS) - 1
# Of data that are written at once to new clusters.
_MOST = 16 << 20
_NO_FALLBACK = int(Req.NO_FALLBACK)


class ClusterWrites:
    """Reads where things are, and writes.

    Args:
        data: where guest data go.
        read: the disk's content, for copy on write; under the locks already.
        changed: told of each range of the disk that has another place now; returns when nobody uses the old one.
        has_backing: whether something may be below now.
        encryption: of what goes to `data`.
    """

    def __init__(
        self,
        metadata: Metadata,
        data: Edge,
        *,
        is_external: bool,
        read: Read,
        changed: Changed,
        has_backing: Callable[[], bool],
        encryption: Encryption | None = None,
    ) -> None:
        self.locks = RangeLocks()
        self._metadata = metadata
        self._data = data
        self._is_external = is_external
        self._read = read
        self._changed = changed
        self._has_backing = has_backing
        self._encryption = encryption
        header = metadata.header
        self._entries = EntryReader(header)
        self._size = header.cluster_size
        self._sub = header.subcluster_size
        self._extended = header.has_subclusters

    async def run(self, offset: int, limit: int, since: int | None = None) -> Run:
        """The run around `offset`; no need to know what is behind `limit`, or before `since` (absent: `offset`).

        Raises:
            BlockError: the child's errno.
            ImageError: an entry is wrong.
        """
        table, slice_ = await self._find_slice(offset)
        if slice_ is None:
            return Run(Kind.UNALLOCATED, *self._metadata.without_table(offset, limit))
        base, since = self._metadata.slice_start(offset), offset if since is None else since
        try:
            return self._entries.run_at(slice_.table, base, offset, limit, since)
        except EntryError as error:
            raise error.in_table(table, (error.guest_offset - base) // self._size) from None

    async def statuses(self, offset: int, limit: int) -> list[tuple[int, int, int]]:
        """Block status from `offset` on, as far as one slice knows: flags, bytes, place.

        Raises:
            BlockError: the child's errno.
            ImageError: the first entry is wrong.
        """
        table, slice_ = await self._find_slice(offset)
        if slice_ is None:
            _, end = self._metadata.without_table(offset, limit)
            return [(0, min(end, limit) - offset, 0)]
        base = self._metadata.slice_start(offset)
        try:
            return self._entries.statuses(slice_.table, base, offset, limit)
        except EntryError as error:
            raise error.in_table(table, (error.guest_offset - base) // self._size) from None

    async def _find_slice(self, offset: int) -> tuple[int, Slice | None]:
        """The table for these bytes of the disk, and the slice of it; 0 and none if there is no table."""
        metadata = self._metadata
        while table := metadata.l2_table(offset):
            slice_ = await metadata.slice_at(table, offset)
            if metadata.l2_table(offset) == table:
                return table, slice_
        return 0, None

    # ------------------------------------------------------------------ writing

    async def write(self, offset: int, iov: IoVec) -> None:
        """Write, piece by piece.

        Raises:
            BlockError: the child's errno; ENOSPC, EFBIG.
            ImageError: an entry is wrong.
        """
        at, end, behind = offset, offset + iov.length, 0
        while at < end:
            piece = iov.slice(at - offset, end - at)
            count, behind = await self._write_some(at, end, piece, behind)
            at += count

    async def _write_some(self, offset: int, end: int, iov: IoVec, behind: int) -> tuple[int, int]:
        """Write a part.

        Args:
            behind: where the part before ends in the file; 0: there is none.

        Returns: how many bytes, and where they end in the file; 0 if somebody was faster.
        """
        async with self.locks.held(offset, end, alone=False):
            run = await self.run(offset, end)
            if _is_in_place(run) and (run.end >= end or not await self._reusable(offset, end)):
                count = min(run.end, end) - offset
                host = run.host + offset - run.start
                self._check_not_a_table(host, count)
                if self._metadata.has_debug_events:
                    await self._metadata.debug_event("write_aio")
                await self._put(offset, host, iov.slice(0, count))
                return count, host + count
        await self._metadata.make_way()
        start = align_down(offset, self._size)
        stop = min(
            align_up(end, self._size),
            self._metadata.slice_start(offset) + self._metadata.slice_covers,
            start + max(_MOST, self._size),
        )
        async with self.locks.held(start, stop, alone=True):
            return await self._write_anew(offset, min(end, stop), iov, behind)

    async def _write_anew(self, offset: int, end: int, iov: IoVec, behind: int) -> tuple[int, int]:
        """Write to clusters that need a place; as `_write_some`."""
        run = await self.run(offset, end)
        reused = await self._reusable(offset, end)
        if _is_in_place(run) and not reused:
            return 0, 0
        start = align_down(offset, self._size)
        slice_ = await self._metadata.own_slice(offset)
        entry, bitmap = self._metadata.entry(slice_, offset)
        reuses = run.has_host and bool(entry & COPIED) and not entry & COMPRESSED
        count = 1
        fresh = self._are_fresh(slice_, start, end)
        if fresh:
            host, count = await self._new_clusters(start, -(-(end - start) // self._size), behind)
        elif reuses:
            host, count = entry & OFFSET_MASK, max(reused, 1)
            self._check_not_a_table(host, count * self._size)
        else:
            wanted = self._how_many(slice_.table, offset, end)
            self.check_sound(slice_.table, offset, start, start + wanted * self._size)
            host, count = await self._new_clusters(start, wanted, behind)
        end = min(end, start + count * self._size)
        first, last = self._copied_around(offset, end, entry, bitmap)
        try:
            # What is in place already stays as it is if the data do not get there.
            is_blank = not (reuses and self._extended and bitmap & _ALL)
            await self._write_data(
                *(host - start, first, offset, end, last),
                *(iov.slice(0, end - offset), is_blank),
            )
            slice_ = await self._metadata.own_slice(offset)
        except BaseException:
            if not reuses and not self._is_external:
                await self._metadata.refcounts.release(host, count * self._size)
            raise
        # From here on the disk shows the new clusters.
        old: list[Old] = []
        if fresh:
            self._metadata.fill(slice_, start, host, count)
        for number in range(0 if fresh else count):
            at = start + number * self._size
            was, bits = self._metadata.entry(slice_, at)
            if not reuses:
                old += self.gives_up(was)
            new_bits = (
                _new_bits(
                    bits, max(first - at, 0) // self._sub, min(last - at, self._size) // self._sub
                )
                if self._extended
                else 0
            )
            self._metadata.change(slice_, at, (host + at - start) | COPIED, new_bits)
        await to_the_end(self.let_go(start, start + count * self._size, old))
        return end - offset, host + end - start

    async def let_go(self, start: int, end: int, old: list[Old]) -> None:
        """Clusters of the disk have another place, or none: the old ones are given up when nobody uses them."""
        await self._changed(start, end)
        self._give_up(old)

    def _check_not_a_table(self, host: int, length: int) -> None:
        if not self._is_external and self._metadata.has_table(host, length):
            raise ImageError(f"Preventing invalid write at offset {host:#x}: it is a table")

    def check_sound(self, table: Table, offset: int, start: int, end: int) -> None:
        """All entries make sense; so what they give up is theirs.

        Args:
            table: a slice, the one for `offset`.
            start, end: of the disk, within the slice.

        Raises:
            ImageError: one does not.
        """
        base = self._metadata.slice_start(offset)
        for at in range(start, end, self._size):
            run = self._entries.part_at(table, base, at)
            if run.has_host:
                length = run.compressed if run.kind is Kind.COMPRESSED else self._size
                self._check_not_a_table(run.host, length)

    def _are_fresh(self, slice_: Slice, start: int, end: int) -> bool:
        """Whether none of these clusters has a place, or ever had; not of those with subclusters."""
        return not self._extended and not any(
            self._metadata.entries(slice_, start, align_up(end, self._size))
        )

    async def _reusable(self, offset: int, end: int) -> int:
        """Whole clusters from `offset` on that lie one behind the other and are this image's alone, where some of them
        read as zeroes: one write for all of them. 0: there is nothing to be gained."""
        if self._extended or offset % self._size or offset + 2 * self._size > end:
            return 0
        metadata = self._metadata
        table = metadata.l2_table(offset)
        if not table:
            return 0
        slice_ = await metadata.slice_at(table, offset)
        if metadata.l2_table(offset) != table:
            return 0
        base = metadata.slice_start(offset)
        stop = min(end - end % self._size, base + metadata.slice_covers)
        host, kinds = None, set()
        at = offset
        while at < stop:
            run = self._entries.part_at(slice_.table, base, at)
            if not run.copied or run.kind not in (Kind.NORMAL, Kind.ZERO):
                break
            if host is not None and run.host != host + at - offset:
                break
            host = run.host if host is None else host
            kinds.add(run.kind)
            at += self._size
        return (at - offset) // self._size if len(kinds) == 2 else 0

    def _how_many(self, table: Table, offset: int, end: int) -> int:
        """Clusters from the one of `offset` on that need a place, as far as one write may go."""
        slice_start = self._metadata.slice_start(offset)
        start = align_down(offset, self._size)
        if self._extended:
            # What is around the data in the last cluster may have to move, too: that is for another turn.
            end = align_down(end, self._size) if offset == start else start
        count = 0
        for at in range(start, end, self._size):
            run = self._entries.part_at(table, slice_start, at)
            if count and (_is_in_place(run) or (run.has_host and run.copied)):
                break
            count += 1
        return max(count, 1)

    async def _new_clusters(self, start: int, count: int, behind: int) -> tuple[int, int]:
        if self._is_external:
            return start, count
        refcounts = self._metadata.refcounts
        # As in QEMU: what follows on what was written is put there, as far as it fits.
        if behind and not behind % self._size:
            there = await refcounts.allocate_at(behind, count)
            if there:
                return behind, there
        return await refcounts.allocate(count, together=True)

    def _copied_around(self, offset: int, end: int, entry: int, bitmap: int) -> tuple[int, int]:
        """The range to write, so that no cluster or subcluster is half old: up to whole ones.

        A cluster whose data move has to move as a whole.
        """
        unit = self._sub
        moves = entry & COMPRESSED or (bitmap & _ALL and not entry & COPIED)
        first = align_down(offset, self._size if moves or not self._extended else unit)
        last = align_up(end, self._size if moves or not self._extended else unit)
        if self._extended and not moves and entry & COPIED:
            # What is there already stays.
            start = align_down(offset, self._size)
            if bitmap >> (first - start) // unit & 1:
                first = offset
            if bitmap >> (last - 1 - start) // unit & 1:
                last = end
        return first, last

    async def _write_data(
        self,
        shift: int,
        first: int,
        offset: int,
        end: int,
        last: int,
        iov: IoVec,
        is_blank: bool,
    ) -> None:
        """The data, with what was around them.

        Args:
            is_blank: nothing between `first` and `last` has to be kept.
        """
        if self._is_external:
            # The file is not longer than the disk.
            size = self._metadata.header.size
            last = max(end, min(last, size if self._encryption is None else align_down(size, 512)))
        tell = self._metadata.debug_event
        if first == offset and last == end:
            await tell("write_aio")
            await self._put(offset, offset + shift, iov)
            return
        if (
            self._encryption is None
            and is_blank
            and await self._is_zero(first, offset)
            and await self._is_zero(end, last)
        ):
            try:
                await tell("cluster_alloc_space")
                await self._data.pwrite_zeroes(first + shift, last - first, _NO_FALLBACK)
            except BlockError as error:
                if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
                    raise
            else:
                await tell("write_aio")
                await self._data.pwritev(offset + shift, iov)
                return
        head, tail = bytearray(offset - first), bytearray(last - end)
        await tell("cow_read")
        if head:
            await self._read(first, IoVec.of(head))
        if tail:
            await self._read(end, IoVec.of(tail))
        parts = [IoVec.of(head)] if head else []
        parts.append(iov)
        if tail:
            parts.append(IoVec.of(tail))
        await tell("write_aio")
        await self._put(first, first + shift, concat(tuple(parts)))

    async def _put(self, offset: int, host: int, iov: IoVec) -> None:
        """Data go where they belong."""
        if self._encryption is None:
            await self._data.pwritev(host, iov)
        else:
            await self._encryption.write(self._data, offset, host, iov)

    async def _is_zero(self, start: int, end: int) -> bool:
        """Whether it is known that the range, in one cluster, reads as zeroes."""
        if start == end:
            return True
        run = await self.run(start, end)
        return run.end >= end and (
            run.kind is Kind.ZERO or (run.kind is Kind.UNALLOCATED and not self._has_backing())
        )

    # ------------------------------------------------------------------ giving up

    def gives_up(self, entry: int) -> list[Old]:
        """What an entry refers to."""
        if self._is_external:
            return []
        if entry & COMPRESSED:
            host, length = self._entries.compressed_place(entry)
            return [Old(host, length)]
        host = entry & OFFSET_MASK
        return [Old(host, self._size, bool(entry & COPIED))] if host else []

    def _give_up(self, old: list[Old]) -> None:
        for place in old:
            self._metadata.refcounts.give_up(place.offset, place.length, frees=place.is_alone)


def _is_in_place(run: Run) -> bool:
    return run.kind is Kind.NORMAL and run.copied


def _new_bits(bits: int, low: int, high: int) -> int:
    """Subclusters `low`..`high` are allocated now."""
    touched = (1 << max(high, low)) - (1 << low)
    return (bits | touched) & ~(touched << SUBCLUSTERS)
