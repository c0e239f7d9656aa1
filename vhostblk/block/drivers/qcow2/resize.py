"""A disk that grows or shrinks (block layer row B31.4).

Theory of operation: the size in the header is written last, both ways. A disk that shrinks loses what is behind its new
end first, so that nothing of that comes back when it grows again; then blocks of reference counts that count nothing
any more, and the end of the file. A disk that grows gets its tables first, and its preallocated clusters: behind the
end of the file, where nothing of the past can show. Either way a crash leaves clusters that nobody uses, at worst.

Context: the control loop; nobody uses the range that comes or goes meanwhile.
"""

from __future__ import annotations

import errno

from vhostblk.block.drivers.qcow2.cache import Slice
from vhostblk.block.drivers.qcow2.clusters import Clusters, Old
from vhostblk.block.drivers.qcow2.data_file import forget_behind
from vhostblk.block.drivers.qcow2.entries import COPIED, Kind
from vhostblk.block.drivers.qcow2.header import SUBCLUSTERS, AutoClear, Header
from vhostblk.block.drivers.qcow2.metadata import Metadata
from vhostblk.block.edge import Edge
from vhostblk.block.execution import to_the_end
from vhostblk.block.flags import Preallocation
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import SECTOR_SIZE, align_down, align_up
from vhostblk.errors import BlockError

_ALL_ZERO = ((1 << SUBCLUSTERS) - 1) << SUBCLUSTERS
_ZERO = 1
_PIECE = 1 << 20
_ALLOCATES = (Preallocation.FALLOC, Preallocation.FULL)


def check_resizable(header: Header, length: int) -> None:
    """Refuse what would lose something, as QEMU does.

    Raises:
        BlockError: EINVAL, ENOTSUP: why.
    """
    if length % SECTOR_SIZE:
        raise BlockError(errno.EINVAL, f"The new size must be a multiple of {SECTOR_SIZE}")
    if header.snapshots and header.version < 3:
        # Theirs is not written in the image.
        raise BlockError(errno.ENOTSUP, "Can't resize a v2 image which has snapshots")


class Resize:
    """One change of the size.

    Args:
        backing: the length of the backing file; 0: there is none.
    """

    def __init__(
        self, metadata: Metadata, clusters: Clusters, file: Edge, data: Edge, backing: int
    ) -> None:
        self._metadata = metadata
        self._clusters = clusters
        self._file = file
        self._data = data
        self._backing = backing
        self._header = metadata.header
        self._size = metadata.header.cluster_size

    async def run(self, old: int, new: int, mode: Preallocation) -> None:
        """Make the disk `new` bytes long.

        Raises:
            BlockError: a child's errno, ENOSPC, EFBIG; then the disk is as long as it was.
            ImageError: the tables are wrong.
        """
        if new < old:
            await self._shrink(old, new)
        elif new > old:
            await self._grow(old, new, mode)

    # ------------------------------------------------------------------ shrinking

    async def _shrink(self, old: int, new: int) -> None:
        metadata = self._metadata
        discards, metadata.discards = metadata.discards, True  # that is what shrinking is for
        try:
            await self.cut(align_up(new, self._size), align_up(old, self._size))
            await metadata.set_size(new)
            if self._header.has_data_file:
                await self._data.truncate(new)
            await metadata.trim()
        finally:
            metadata.discards = discards

    async def cut(self, start: int, end: int) -> None:
        """Forget where clusters are, from `start` to `end` and as far as their tables go, and give them up.

        Raises:
            BlockError: a child's errno.
            ImageError: an entry is wrong.
        """
        metadata, covers = self._metadata, self._metadata.table_covers
        # Most of a large disk has no tables.
        at = metadata.next_table(start, end)
        while at < end:
            table_start = align_down(at, covers)
            stop = min(table_start + covers, end)
            if metadata.is_full:
                await metadata.sync()
            if metadata.l2_table(at):
                async with self._clusters.locks.held(at, stop, alone=True):
                    if at == table_start:  # the rest of the table is for what is behind the end
                        await self._cut_table(at, stop)
                    else:
                        await self.forget(at, stop)
            at = metadata.next_table(stop, end)

    async def _cut_table(self, start: int, end: int) -> None:
        """All that an L2 table refers to, and itself."""
        metadata = self._metadata
        old: list[Old] = []
        for at in range(start, start + metadata.table_covers, metadata.slice_covers):
            slice_ = await metadata.slice_at(metadata.l2_table(start), at)
            old += self._given_up(slice_, at, at + metadata.slice_covers)
        metadata.drop_table(start)
        await to_the_end(self._clusters.let_go(start, end, old))

    async def forget(self, start: int, end: int) -> None:
        """The same within one table, without what else it is for; raises as `cut`."""
        metadata = self._metadata
        at = start
        while at < end:
            stop = min(metadata.slice_start(at) + metadata.slice_covers, end)
            slice_ = await metadata.slice_at(metadata.l2_table(at), at)
            if any(metadata.entries(slice_, at, stop)):
                slice_ = await metadata.own_slice(at)
                old = self._given_up(slice_, at, stop)
                for cluster in range(at, stop, self._size):
                    if metadata.entry(slice_, cluster) != (0, 0):
                        metadata.change(slice_, cluster, 0)
                await to_the_end(self._clusters.let_go(at, stop, old))
            at = stop

    def _given_up(self, slice_: Slice, start: int, end: int) -> list[Old]:
        """What the entries refer to that are for `start`..`end`."""
        clusters, metadata = self._clusters, self._metadata
        old: list[Old] = []
        if any(metadata.entries(slice_, start, end)):
            for at in range(start, end, self._size):
                entry, _ = metadata.entry(slice_, at)
                if entry:
                    clusters.check_sound(slice_.table, at, at, at + self._size)
                    old += clusters.gives_up(entry)
        return old

    # ------------------------------------------------------------------ growing

    async def _grow(self, old: int, new: int, mode: Preallocation) -> None:
        metadata = self._metadata
        is_raw = bool(self._header.autoclear & AutoClear.RAW_DATA_FILE)
        if mode is Preallocation.OFF and is_raw:
            mode = Preallocation.METADATA  # the tables say where everything is
        await metadata.make_room(new)
        # Before anybody can see it, also after a crash: nothing that was behind the end shows, neither here nor below.
        whole, end = align_up(old, self._size), align_up(new, self._size)
        await self.cut(whole, align_up(end, metadata.table_covers))
        await self._zero_tail(old, min(whole, new), allocate=mode is not Preallocation.OFF)
        if self._header.has_data_file:
            length = end if mode is not Preallocation.OFF else new
            await forget_behind(self._data, old, length)
            allocates = mode in _ALLOCATES and length > self._data.node.length
            await self._data.truncate(length, mode if allocates else Preallocation.OFF)
        if mode is not Preallocation.OFF:
            await self._preallocate(whole, end, mode)
        elif whole < min(end, self._backing):
            await self._hide_backing(whole, min(align_up(self._backing, self._size), end))
        await metadata.set_size(new)

    async def _zero_tail(self, start: int, end: int, *, allocate: bool) -> None:
        """The rest of the cluster that was the last one."""
        at, shows = start, allocate or start < min(end, self._backing)
        while at < end and not shows:
            run = await self._clusters.run(at, end)
            shows = run.kind in (Kind.NORMAL, Kind.COMPRESSED)
            at = run.end
        if start < end and shows:
            await self._clusters.write(start, IoVec.of(bytes(end - start)))

    async def _hide_backing(self, start: int, end: int) -> None:
        if self._header.version < 3:  # there are no zero clusters
            await self._preallocate(start, end, Preallocation.METADATA)
            return
        await self._clusters.clear(start, end - start, keep=False, discard=False)

    async def _preallocate(self, start: int, end: int, mode: Preallocation) -> None:
        """Give the clusters `start`..`end`, which have no place, one that reads as zeroes."""
        if self._header.crypt and self._header.version < 3:  # what is there reads as anything
            await self._write_zeroes(start, end)
            return
        if self._header.has_data_file:
            await self._map(start, [(start, (end - start) // self._size)])
            return
        refcounts = self._metadata.refcounts
        behind = align_up(self._file.node.length, self._size)
        left, ready = (end - start) // self._size, 0
        runs: list[tuple[int, int]] = []
        try:
            while left:
                host, count = await refcounts.allocate(left, behind=behind)
                runs.append((host, count))
                left -= count
                if self._metadata.is_full or not left:
                    # Before new blocks of reference counts are written behind what has no room yet.
                    await self._make_room(runs[ready:], mode)
                    ready = len(runs)
                    await self._metadata.sync()
            await self._map(start, runs)
        except BaseException:
            for host, count in runs:
                await refcounts.release(host, count * self._size)
            raise

    async def _write_zeroes(self, start: int, end: int) -> None:
        for at in range(start, end, max(_PIECE, self._size)):
            count = min(max(_PIECE, self._size), end - at)
            await self._clusters.write(at, IoVec.of(bytes(count)))

    async def _make_room(self, runs: list[tuple[int, int]], mode: Preallocation) -> None:
        """A file that has these clusters, as zeroes."""
        end = max((host + count * self._size for host, count in runs), default=0)
        is_zero = self._file.node.has_zero_init()
        if end > self._file.node.length:
            mode = mode if mode in _ALLOCATES else Preallocation.OFF
            try:
                await self._file.truncate(end, mode)
            except BlockError as error:
                if error.errno != errno.ENOTSUP or mode in _ALLOCATES:
                    raise
                is_zero = False
        if not is_zero:
            for host, count in runs:
                await self._file.pwrite_zeroes(host, count * self._size)

    async def _map(self, start: int, runs: list[tuple[int, int]]) -> None:
        """Guest clusters from `start` on are in these runs of clusters; takes them out of the list."""
        metadata, at = self._metadata, start
        while runs:
            host, count = runs[0]
            if metadata.is_full:
                await metadata.sync()
            slice_ = await metadata.own_slice(at)
            stop = metadata.slice_start(at) + metadata.slice_covers
            mapped = min(count, (stop - at) // self._size)
            for cluster in range(at, at + mapped * self._size, self._size):
                entry, bitmap = (host + cluster - at) | COPIED, 0
                if self._header.has_subclusters and (cluster < self._backing or self._header.crypt):
                    bitmap = _ALL_ZERO
                elif self._header.crypt:
                    entry |= _ZERO
                metadata.change(slice_, cluster, entry, bitmap)
            at += mapped * self._size
            if mapped < count:
                runs[0] = host + mapped * self._size, count - mapped
            else:
                del runs[0]
