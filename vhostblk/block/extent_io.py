"""Reads and writes of many places at once, past the pipeline: one operation of the engine's for all of them.

Theory of operation: whoever copies a lot asks for the extents of all that he is about to read or write, and one thread
does the system calls, with none of the graph's work for each. That holds as long as no extent is taken back: revocation
waits for what is running, and the graph is told of writes when they have ended, however they ended. What no extent has
goes through the node like any other request.

Context: the control loop. Knows nothing about what is copied.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence

from vhostblk.block.backend import BlockBackend
from vhostblk.block.extent import ExtentFlag, HostExtent, PastWrites, Writer, merged
from vhostblk.block.host_io import HostIO
from vhostblk.block.iov import IoVec, address_of
from vhostblk.errors import BlockError
from vhostblk.native import IOPart

__all__ = ["ExtentIO", "Piece"]

Piece = tuple[int, memoryview]
"""Where on the disk, and the memory that is to be filled or written."""

# As numbers: a test of an enumeration's flags takes a microsecond.
_READ, _WRITE = int(ExtentFlag.READ), int(ExtentFlag.WRITE)


class ExtentIO:
    """One user's way past the pipeline.

    Args:
        user: nobody else has attached anything to it.
        io: does the system calls.
        writer: a regular one is none of them.

    Context: the control loop.
    """

    def __init__(self, user: BlockBackend, io: HostIO, writer: Writer = Writer.ONCE) -> None:
        self._user = user
        self._io = io
        self._writer = writer
        self._running: set[asyncio.Future[None]] = set()
        self._written: list[tuple[int, int]] = []  # start and end; the graph has not been told
        user.attach(revoke=self._revoke, take_writes=self._take_writes)

    def close(self) -> None:
        """Nothing is running."""
        assert not self._running
        self._user.attach()

    async def read(self, pieces: Sequence[Piece]) -> None:
        """Fill all of them.

        Raises:
            BlockError: one of the reads failed; which of them is not known.
        """
        extents = await self._user.extents_of(_ranges(pieces))
        parts, rest, planned = _plan(pieces, extents, _READ)
        if await self._run(parts, write=False) != sum(end - start for start, end in planned):
            # Somebody has cut the file; the node knows what to say of that.
            raise BlockError(errno.EIO)
        for offset, view in rest:
            await self._user.begin_preadv(offset, IoVec([view]))

    async def write(self, pieces: Sequence[Piece]) -> None:
        """Write all of them, which do not overlap.

        Raises:
            BlockError: one of the writes failed; which of them is not known.
        """
        user = self._user
        extents: list[HostExtent] = []
        if user.write_cache:
            ranges = _ranges(pieces)
            if user.prepares_writes:
                extents = await user.prepare_writes(ranges, self._writer)
                extents.sort(key=lambda extent: extent.offset)
            else:
                extents = await user.extents_of(ranges)
        parts, rest, planned = _plan(pieces, extents, _WRITE)
        try:
            await self._run(parts, write=True)
        finally:
            # Also if some have failed, or nobody waits any more: nobody knows what was written.
            self._written += planned
            user.collect_writes(ranges=True)
        for offset, view in rest:
            await user.begin_pwritev(offset, IoVec([view]))

    async def _run(self, parts: Sequence[IOPart], *, write: bool) -> int:
        # Nothing waits between the answer about extents and this: nothing was taken back.
        if not parts:
            return 0
        running = asyncio.get_running_loop().create_future()
        self._running.add(running)
        try:
            return await self._io.transfer(parts, write=write)
        finally:
            self._running.discard(running)
            running.set_result(None)

    async def _revoke(self, offset: int, length: int) -> None:
        """None is kept, so only what is running has to end; all of it, because that takes milliseconds."""
        if self._running:
            await asyncio.wait(tuple(self._running))

    def _take_writes(self, ranges: bool) -> PastWrites:
        written, self._written = self._written, []
        if not written:
            return PastWrites()
        runs = [(start, end - start) for start, end in merged(written)] if ranges else []
        return PastWrites(len(written), max(end for _, end in written), runs)


def _ranges(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    return merged([(offset, offset + len(view)) for offset, view in pieces])


def _plan(
    pieces: Sequence[Piece], extents: Sequence[HostExtent], right: int
) -> tuple[list[IOPart], list[Piece], list[tuple[int, int]]]:
    """Parts for all that extents have; what they have not; and the ranges that the parts are for.

    Args:
        pieces, extents: by their offsets.
    """
    parts: list[IOPart] = []
    rest: list[Piece] = []
    planned: list[tuple[int, int]] = []
    number = 0
    for offset, view in pieces:
        end = offset + len(view)
        while offset < end:
            while number < len(extents) and extents[number].end <= offset:
                number += 1
            extent = extents[number] if number < len(extents) else None
            if extent is None or extent.offset >= end:
                rest.append((offset, view))
                break
            is_before = extent.offset > offset
            stop = extent.offset if is_before else min(end, extent.end)
            part, view = view[: stop - offset], view[stop - offset :]
            if is_before or not _may(extent, right, offset, part):
                rest.append((offset, part))
            else:
                planned.append((offset, stop))
                assert extent.fd is not None
                place = extent.host_offset + offset - extent.offset
                parts.append(IOPart(extent.fd, place, part))
            offset = stop
    return parts, rest, planned


def _may(extent: HostExtent, right: int, offset: int, part: memoryview) -> bool:
    """Whether this part of an extent may be used so."""
    if extent.fd is None or not int(extent.flags) & right:
        return False
    if (offset | len(part)) % extent.request_alignment:
        return False
    alignment = extent.memory_alignment
    return alignment == 1 or not (address_of(part) | len(part)) % alignment
