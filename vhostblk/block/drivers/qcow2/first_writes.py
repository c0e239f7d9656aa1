"""Clusters get a place before their first data are written, many at a time.

Theory of operation: whoever is about to write past the pipeline (the engine) says where. Clusters that have no place
get new ones, next to each other; what the disk shows there until now is put into them, zeroes mostly, in one request;
then the L2 entries are changed. From then on a write to them is one in place, which everybody above may make alone. A
crash before the data are there shows what was there before, like one before any other write.

What is not so simple is left to `clusters.py`: compressed clusters, clusters that are shared with snapshots, those that
somebody uses just now, and those of which a write with a backing file below has all, so that nothing has to be copied.

Context: the control loop. Knows nothing about extents.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vhostblk.block.drivers.qcow2.cluster_writes import Read
from vhostblk.block.drivers.qcow2.entries import COPIED, EntryReader, Kind, Run
from vhostblk.block.drivers.qcow2.header import SUBCLUSTERS
from vhostblk.block.drivers.qcow2.locks import RangeLocks
from vhostblk.block.drivers.qcow2.metadata import Metadata
from vhostblk.block.edge import Edge
from vhostblk.block.execution import to_the_end
from vhostblk.block.extent import Ranges, merged
from vhostblk.block.iov import IoVec, concat

__all__ = ["FirstWrites"]

Changed = Callable[[Ranges], Coroutine[Any, Any, None]]

# Bytes that are taken at a time, and of them such that have to be copied.
_MOST = 16 << 20
_MOST_COPIED = 4 << 20
_WHOLE = (1 << SUBCLUSTERS) - 1


@dataclass(slots=True, eq=False)
class _New:
    """A cluster that gets a place.

    Attributes:
        at: on the disk.
        content: what it has; None: zeroes.
        host: where.
    """

    at: int
    content: IoVec | None = None
    host: int = 0


class FirstWrites:
    """See the module.

    Args:
        data: where guest data go, in the file that has the tables.
        locks: who uses which range of the disk.
        read: the disk's content; under the locks already.
        changed: told of all ranges (start, end) of the disk that are somewhere now; returns when nobody goes elsewhere.
    """

    def __init__(
        self,
        metadata: Metadata,
        data: Edge,
        locks: RangeLocks,
        *,
        read: Read,
        changed: Changed,
    ) -> None:
        self._metadata = metadata
        self._data = data
        self._locks = locks
        self._read = read
        self._changed = changed
        header = metadata.header
        self._entries = EntryReader(header)
        self._size = header.cluster_size
        self._extended = header.has_subclusters

    async def prepare(self, ranges: Ranges, backed: int) -> tuple[list[Run], Ranges]:
        """Give a place to what is simple.

        Args:
            ranges: of what will be written, each for itself.
            backed: up to where something may be below.

        Returns: whole clusters, in order: those that got a place, and those that had one where they may be written. It
            is true until the next `await`.

        Raises:
            BlockError: a child's errno; ENOSPC, EFBIG. Some clusters may have got their place.
            ImageError: an entry is wrong.
        """
        if self._metadata.is_full:
            await self._metadata.sync()
        size = self._size
        covered, touched = set[int](), set[int]()
        for start, end in ranges:
            touched.update(range(start // size * size, end, size))
            if start < backed:
                covered.update(range(-(-start // size) * size, end // size * size, size))
        wanted = sorted(touched)[: max(_MOST // size, 1)]
        with self._locks.taken(self._runs(wanted)) as free:
            clusters = [at for run in free for at in range(*run, size)]
            new, there = await self._look(clusters, backed, covered)
            done = 0
            while done < len(new):
                host, count = await self._metadata.refcounts.allocate(len(new) - done)
                await self._use(new[done : done + count], host)
                done += count
        return self._placed(new), self._runs(there)

    async def _look(
        self, clusters: Iterable[int], backed: int, covered: Container[int]
    ) -> tuple[list[_New], list[int]]:
        """Those that may get a place here, and those that need none."""
        metadata = self._metadata
        new: list[_New] = []
        there: list[int] = []
        copied = 0
        for at in clusters:
            own = metadata.own_slice_now(at) or await metadata.own_slice(at)
            entry, bitmap = metadata.entry(own, at)
            if not (entry or bitmap):
                is_zero = at >= backed
            else:
                run = self._entries.part_at(own.table, metadata.slice_start(at), at)
                if run.kind is Kind.NORMAL and run.copied:
                    there.append(at)
                    continue
                is_zero = run.kind is Kind.ZERO
                if run.has_host or not is_zero or run.end - run.start < self._size:
                    continue
            if is_zero:
                new.append(_New(at))
            elif at not in covered and (not copied or copied + self._size <= _MOST_COPIED):
                copied += self._size
                new.append(_New(at, IoVec.of(bytearray(self._size))))
        return new, there

    async def _use(self, new: list[_New], host: int) -> None:
        """Put them there, as the disk shows them now."""
        metadata, size = self._metadata, self._size
        linked = 0
        try:
            for number, cluster in enumerate(new):
                cluster.host = host + number * size
            await self._fill(new)
            for cluster in new:
                at = cluster.at
                own = metadata.own_slice_now(at) or await metadata.own_slice(at)
                metadata.change(own, at, cluster.host | COPIED, _WHOLE)
                linked += 1
        finally:
            await to_the_end(self._settle(new, linked))

    async def _settle(self, new: list[_New], linked: int) -> None:
        """Nobody sees anything else for the first of them; the others are free again."""
        await self._changed(self._runs([cluster.at for cluster in new[:linked]]))
        if linked < len(new):
            unused = (len(new) - linked) * self._size
            await self._metadata.refcounts.release(new[linked].host, unused)

    async def _fill(self, new: list[_New]) -> None:
        copies = [self._copy(cluster) for cluster in new if cluster.content is not None]
        if copies:
            # None goes on when this has ended.
            for error in await asyncio.gather(*copies, return_exceptions=True):
                if error is not None:
                    raise error
        size = self._size
        first = 0
        while first < len(new):
            last, is_zero = first + 1, new[first].content is None
            while last < len(new) and (new[last].content is None) is is_zero:
                last += 1
            host, parts = new[first].host, [c.content for c in new[first:last] if c.content]
            if is_zero:
                await self._data.pwrite_zeroes(host, (last - first) * size)
            else:
                await self._data.pwritev(host, concat(tuple(parts)))
            first = last

    async def _copy(self, cluster: _New) -> None:
        content = cluster.content
        assert content is not None
        await self._read(cluster.at, content)
        if content.is_zero():
            cluster.content = None

    def _placed(self, new: list[_New]) -> list[Run]:
        """Runs of the disk that are runs of the file."""
        runs: list[Run] = []
        size = self._size
        start = host = end = 0
        for cluster in new:
            if cluster.at != end or cluster.host - host != end - start:
                if end:
                    runs.append(Run(Kind.NORMAL, start, end, host, has_host=True, copied=True))
                start, host = cluster.at, cluster.host
            end = cluster.at + size
        if end:
            runs.append(Run(Kind.NORMAL, start, end, host, has_host=True, copied=True))
        return runs

    def _runs(self, clusters: Sequence[int]) -> list[tuple[int, int]]:
        return merged([(at, at + self._size) for at in clusters])
