"""What somebody above may do in an image without asking: runs of the file, of backing files, of nothing.

Theory of operation: a run that is allocated, and neither compressed nor encrypted, is one of the file that has the
data, for writing if the image shares it with nobody; what is not allocated is a run of the backing file, or zeroes. A
chain costs nothing once it was looked up. What was given out and has no place in the image yet is remembered (`shown`),
roughly: who gives it one need not take back what nobody can have.

Knows nothing about how clusters get their place.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod

from vhostblk.block.drivers.qcow2.entries import Kind, Run
from vhostblk.block.drivers.qcow2.header import Header
from vhostblk.block.drivers.qcow2.metadata import Metadata
from vhostblk.block.edge import Edge
from vhostblk.block.extent import ExtentFlag, HostExtent, Hull, Ranges, merged
from vhostblk.block.limits import align_down, align_up
from vhostblk.block.node import BlockNode
from vhostblk.block.pipeline import host_extent

__all__ = ["Qcow2Extents"]

# As a number: a test of an enumeration's flags takes a microsecond.
_WRITE = int(ExtentFlag.WRITE)


class Qcow2Extents(BlockNode):
    """The part of a qcow2 node that answers for extents.

    Attributes:
        shown: where zeroes, or a backing file's, were given out.
        moves: how often clusters have changed their place.
    """

    moves = 0
    shown: Hull
    _header: Header
    _file: Edge
    _data: Edge
    _metadata: Metadata
    _is_corrupt: bool

    @abstractmethod
    async def _run(self, offset: int, limit: int, since: int | None = None) -> Run:
        """The run around `offset`, see `Clusters.run`."""

    async def host_extent(self, offset: int, length: int) -> HostExtent | None:
        """What is allocated is the data file's, what is not is the backing file's, or zeroes."""
        run = await self._run(offset, self.length, since=0)
        start, end = run.start, min(run.end, self.length)
        if run.kind is Kind.COMPRESSED or (run.kind is Kind.NORMAL and self.is_encrypted):
            return None
        if run.kind is Kind.NORMAL:
            return await self._of_file(run, start, end, offset, length)
        # At once: whoever gives it a place meanwhile has to know.
        self.shown.add(start, end)
        backing = self.children.get("backing")
        if run.kind is Kind.UNALLOCATED and backing is not None:
            if offset < backing.node.length:
                return await _of_backing(backing, start, end, offset, length)
            start = max(start, backing.node.length)
        return HostExtent(start, end - start, None, 0, ExtentFlag.READ | ExtentFlag.ZERO)

    async def host_extents(self, ranges: Ranges) -> list[HostExtent]:
        """By whole clusters. No zeroes: most of them will be written, and would have to be taken back before."""
        size, length = self._header.cluster_size, self.length
        whole = [
            (align_down(start, size), min(align_up(end, size), length)) for start, end in ranges
        ]
        backing = self.children.get("backing")
        found: list[HostExtent | None] = []
        file: HostExtent | None = None
        for start, end in merged(whole):
            at = start
            while at < end:
                run = await self._run(at, end, start)
                stop = min(run.end, end)
                if run.kind is Kind.NORMAL and not self.is_encrypted:
                    place = run.host + at - run.start
                    if file is None or not file.offset <= place < file.end:
                        file = await host_extent(self._data.node, place, stop - at)
                    found.append(self._in_file(run, at, stop, file))
                elif run.kind is Kind.UNALLOCATED and backing and at < backing.node.length:
                    self.shown.add(at, stop)
                    found.append(await _of_backing(backing, at, stop, at, stop - at))
                at = stop
        return [extent for extent in found if extent is not None]

    async def _extents_of(self, runs: list[Run]) -> list[HostExtent]:
        """The same for runs that were looked up just now, as far as one extent of the file has them."""
        if not runs:
            return []
        moves = self.moves
        file = await host_extent(self._data.node, runs[0].host, self._header.cluster_size)
        if self.moves != moves:
            return []
        found = [self._in_file(run, run.start, min(run.end, self.length), file) for run in runs]
        return [extent for extent in found if extent is not None]

    @abstractmethod
    async def _moved(self, start: int, end: int) -> None:
        """Other clusters are shown now: nobody may use the old ones, nor flush without the tables."""

    async def _got_place(self, ranges: Ranges) -> None:
        """What had none: as if it had moved, but that extents of it were given to few, if to anybody."""
        await self.revoke_flush()
        shown = [self._moved(*run) for run in ranges if self.shown.touches(*run)]
        for error in await asyncio.gather(*shown, return_exceptions=True) if shown else ():
            if error is not None:
                raise error

    async def _of_file(
        self, run: Run, start: int, end: int, offset: int, length: int
    ) -> HostExtent | None:
        shift = run.host - run.start
        file = await host_extent(self._data.node, offset + shift, min(length, end - offset))
        return self._in_file(run, start, end, file)

    def _in_file(
        self, run: Run, start: int, end: int, file: HostExtent | None
    ) -> HostExtent | None:
        """`start`..`end` of a run, as far as they are in a range that somebody may use of the data file."""
        shift = run.host - run.start
        if file is None or shift % file.request_alignment:
            return None
        start, end = max(start, file.offset - shift), min(end, file.end - shift)
        if start >= end:
            return None
        flags = file.flags
        if int(flags) & _WRITE and not self._may_write_alone(run):
            flags &= ~ExtentFlag.WRITE
        return HostExtent(
            start,
            end - start,
            file.fd,
            file.host_offset + start + shift - file.offset,
            flags,
            file.request_alignment,
            file.memory_alignment,
            file.record,
        )

    def _may_write_alone(self, run: Run) -> bool:
        if self._is_corrupt or self.for_check or not run.copied:
            return False
        if self.is_outlived and self._metadata.is_dirty:
            # Perhaps only we know of this cluster, and what is written there would be gone with us.
            return False
        if self._data is not self._file:
            return True
        return not self._metadata.has_table(run.host, run.end - run.start)


async def _of_backing(
    backing: Edge, start: int, end: int, offset: int, length: int
) -> HostExtent | None:
    """`start`..`end` of the backing file, as far as they are in one of its extents; around `offset`."""
    below = await host_extent(backing.node, offset, min(length, end - offset))
    below = below.cut(start, end) if below is not None else None
    return below.without(ExtentFlag.WRITE) if below is not None else None
