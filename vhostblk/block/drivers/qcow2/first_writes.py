"""Clusters get a place before their first data are written, many at a time.

Theory of operation: whoever is about to write past the pipeline (the engine) says where. Clusters that have no place
get new ones, next to each other; what the disk shows there until now is put into them, zeroes mostly, in one request;
then the L2 entries are changed. From then on a write to them is one in place, which everybody above may make alone. A
crash before the data are there shows what was there before, like one before any other write.

What is not so simple is left to `clusters.py`: compressed clusters, clusters that are shared with snapshots, those that
somebody uses just now, and those of which a write with a backing file below has all, so that nothing has to be copied:
these have no place before the data are there, unless it is a new image that is being made.

Whoever writes once, and nothing else, is given the subclusters that he writes to, as any other write would be, and
leaves those with something below to `clusters.py`. Who comes again, a guest, is given whole clusters.

Context: the control loop. Knows nothing about extents.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vhostblk.block.drivers.qcow2.cluster_writes import Read
from vhostblk.block.drivers.qcow2.entries import EntryReader, Kind, Run
from vhostblk.block.drivers.qcow2.header import SUBCLUSTERS
from vhostblk.block.drivers.qcow2.locks import RangeLocks
from vhostblk.block.drivers.qcow2.metadata import Metadata
from vhostblk.block.edge import Edge
from vhostblk.block.execution import to_the_end
from vhostblk.block.extent import Ranges, Writer, merged
from vhostblk.block.iov import IoVec, concat
from vhostblk.block.limits import SECTOR_SIZE

__all__ = ["FirstWrites"]

Changed = Callable[[Ranges], Coroutine[Any, Any, None]]

# Bytes that are taken at a time, and of them such that have to be copied.
_MOST = 16 << 20
_MOST_COPIED = 4 << 20
_WHOLE = (1 << SUBCLUSTERS) - 1


@dataclass(slots=True, eq=False)
class _New:
    """Clusters that get a place, all of them in one slice of a table.

    Attributes:
        at: on the disk.
        count: clusters, one behind the other.
        content: what it has, of one alone; None: zeroes.
        host: where.
        subclusters: that are there from now on; all, if there is more than one cluster.
    """

    at: int
    count: int = 1
    content: IoVec | None = None
    host: int = 0
    subclusters: int = _WHOLE


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
        self._sub = header.subcluster_size
        self._extended = header.has_subclusters

    async def prepare(
        self, ranges: Ranges, backed: int, writer: Writer = Writer.REGULAR
    ) -> tuple[list[Run], Ranges]:
        """Give a place to what is simple.

        Args:
            ranges: of what will be written, each for itself.
            backed: up to where something may be below.
            writer: of one who writes once, what the file grows by need not be allocated before, and other subclusters
                not at all.

        Returns: whole clusters, in order, or subclusters where somebody writes once: those that got a place, and those
            that had one where they may be written. It is true until the next `await`.

        Raises:
            BlockError: a child's errno; ENOSPC, EFBIG. Some clusters may have got their place.
            ImageError: an entry is wrong.
        """
        await self._metadata.make_way()
        size, is_once = self._size, writer is not Writer.REGULAR
        covered = set[int]()
        for start, end in ranges:
            if start < backed:
                covered.update(range(-(-start // size) * size, end // size * size, size))
        touched = self._touched(ranges) if is_once and self._extended else None
        blank = covered if writer is Writer.MAKER else frozenset[int]()
        with self._locks.taken(self._wanted(ranges)) as free:
            new, there = await self._look(free, backed, covered, blank, touched)
            placed: list[_New] = []
            while new:
                host, count = await self._metadata.refcounts.allocate(sum(one.count for one in new))
                first, new = self._split(new, count)
                await self._use(first, host, is_once)
                placed += first
        return self._placed(placed), merged([(at, at + size) for at in there])

    def _wanted(self, ranges: Ranges) -> list[tuple[int, int]]:
        """Whole clusters, as many as are taken at a time."""
        size = self._size
        wanted: list[tuple[int, int]] = []
        left = max(_MOST // size, 1) * size
        for start, end in merged([(a // size * size, -(-b // size) * size) for a, b in ranges]):
            wanted.append((start, min(end, start + left)))
            left -= wanted[-1][1] - start
            if not left:
                break
        return wanted

    def _touched(self, ranges: Ranges) -> dict[int, int]:
        """Subclusters that the ranges have bytes of, by where their clusters begin on the disk."""
        size, sub = self._size, self._sub
        touched: dict[int, int] = {}
        for start, end in ranges:
            for at in range(start // size * size, end, size):
                first, last = max(start - at, 0) // sub, -(-min(end - at, size) // sub)
                touched[at] = touched.get(at, 0) | (1 << last) - (1 << first)
        return touched

    async def _look(
        self,
        ranges: Ranges,
        backed: int,
        covered: Container[int],
        blank: Container[int],
        touched: Mapping[int, int] | None,
    ) -> tuple[list[_New], list[int]]:
        """Those that may get a place here, and those that need none.

        Args:
            covered: clusters that have something below, all of which will be written.
            blank: of these, such as may show zeroes until then.
            touched: subclusters, by cluster; None: all of each.
        """
        metadata, size = self._metadata, self._size
        new: list[_New] = []
        there: list[int] = []
        copied = 0
        for start, end in ranges:
            at, stop = start, start
            while at < end:
                own = metadata.own_slice_now(at) or await metadata.own_slice(at)
                if at >= stop:
                    stop = min(metadata.slice_start(at) + metadata.slice_covers, end)
                if at >= backed and (count := metadata.count_empty(own, at, stop)):
                    if touched is None:
                        new.append(_New(at, count))
                        at += count * size
                    else:
                        new.append(_New(at, subclusters=touched[at]))
                        at += size
                    continue
                one, at = at, at + size
                if one in blank and metadata.count_empty(own, one, at):
                    new.append(_New(one))
                    continue
                entry, bitmap = metadata.entry(own, one)
                is_zero = False
                if entry or bitmap:
                    run = self._entries.part_at(own.table, metadata.slice_start(one), one)
                    if run.kind is Kind.NORMAL and run.copied:
                        there.append(one)
                        continue
                    is_zero = run.kind is Kind.ZERO
                    if run.has_host or not is_zero or run.end - run.start < size:
                        continue
                if touched is not None:
                    continue
                if is_zero:
                    new.append(_New(one))
                elif one not in covered and (not copied or copied + size <= _MOST_COPIED):
                    copied += size
                    new.append(_New(one, content=IoVec.of(bytearray(size))))
        return new, there

    def _split(self, new: list[_New], count: int) -> tuple[list[_New], list[_New]]:
        """The first so many clusters, and the others."""
        for number, one in enumerate(new):
            if one.count > count:
                if not count:
                    return new[:number], new[number:]
                rest = _New(one.at + count * self._size, one.count - count)
                one.count = count
                return new[: number + 1], [rest, *new[number + 1 :]]
            count -= one.count
        return new, []

    async def _use(self, new: list[_New], host: int, at_once: bool) -> None:
        """Put them there, as the disk shows them now."""
        metadata, size = self._metadata, self._size
        linked = 0
        try:
            for one in new:
                one.host = host
                host += one.count * size
            await self._fill(new, at_once)
            for one in new:
                own = metadata.own_slice_now(one.at) or await metadata.own_slice(one.at)
                metadata.fill(own, one.at, one.host, one.count, one.subclusters)
                linked += 1
        finally:
            await to_the_end(self._settle(new, linked))

    async def _settle(self, new: list[_New], linked: int) -> None:
        """Nobody sees anything else for the first of them; the others are free again."""
        size = self._size
        await self._changed(merged([(one.at, one.at + one.count * size) for one in new[:linked]]))
        if unused := sum(one.count for one in new[linked:]):
            await self._metadata.refcounts.release(new[linked].host, unused * size)

    async def _fill(self, new: list[_New], at_once: bool) -> None:
        copies = [self._copy(cluster) for cluster in new if cluster.content is not None]
        if copies:
            # None goes on when this has ended.
            for error in await asyncio.gather(*copies, return_exceptions=True):
                if error is not None:
                    raise error
        first = 0
        while first < len(new):
            last, is_zero = first + 1, new[first].content is None
            while last < len(new) and (new[last].content is None) is is_zero:
                last += 1
            host, parts = new[first].host, [c.content for c in new[first:last] if c.content]
            if is_zero:
                count = sum(one.count for one in new[first:last])
                await self._zero(host, count * self._size, at_once)
            else:
                await self._data.pwritev(host, concat(tuple(parts)))
            first = last

    async def _zero(self, host: int, length: int, at_once: bool) -> None:
        file = self._data.node
        is_plain = file.limits.request_alignment <= SECTOR_SIZE and file.has_zero_init()
        if at_once and is_plain and host >= file.length:
            # What a file grows by is zeroes: blocks that are allocated for them cost more than those for data.
            await self._data.pwritev(host + length - SECTOR_SIZE, IoVec.of(bytes(SECTOR_SIZE)))
        else:
            await self._data.pwrite_zeroes(host, length)

    async def _copy(self, cluster: _New) -> None:
        content = cluster.content
        assert content is not None
        await self._read(cluster.at, content)
        if content.is_zero():
            cluster.content = None

    def _placed(self, placed: list[_New]) -> list[Run]:
        """Runs of the disk that are runs of the file."""
        runs: list[Run] = []
        start = host = end = 0
        for one in placed:
            for at, length in self._parts(one):
                place = one.host + at - one.at
                if at != end or place - host != end - start:
                    if end:
                        runs.append(Run(Kind.NORMAL, start, end, host, has_host=True, copied=True))
                    start, host = at, place
                end = at + length
        if end:
            runs.append(Run(Kind.NORMAL, start, end, host, has_host=True, copied=True))
        return runs

    def _parts(self, one: _New) -> Iterator[tuple[int, int]]:
        """What is there now: where on the disk, and bytes."""
        if one.subclusters == _WHOLE:
            yield one.at, one.count * self._size
            return
        for number in range(SUBCLUSTERS):
            if one.subclusters >> number & 1:
                yield one.at + number * self._sub, self._sub
