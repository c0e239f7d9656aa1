"""A block driver whose data never stay where they are: a test of everybody who keeps an extent too long.

Theory of operation: the disk is cut into chunks, and the child has more room ("slots") than there are chunks. A move
copies a chunk to a free slot and fills the old one with poison. While it does it is a serialising write of that chunk,
as an unaligned write is (`pipeline.serialise`): it revokes the chunk, waits for whoever is at it, and gives out no
extent. So a read or write that uses an old extent, at any time, ends in poison or is lost, and one that is in flight
while the copy is made may be. Drivers with such moves in them, like copy-on-write or mirrors, need the same of the
data path; a file, which never moves, forgives everything.

Knows nothing about the engine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vhostblk.block.edge import Edge
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode, FlushTarget, HostExtent, OpenContext, Req, Role
from vhostblk.block.options import SIZE, option
from vhostblk.block.pipeline import flush_target, host_extent, serialise
from vhostblk.block.tracking import RequestType

__all__ = ["POISON", "WanderingNode"]

POISON = b"\xee"


@dataclass(frozen=True, slots=True)
class WanderingOptions:
    """Besides `file`."""

    chunk: int = option(SIZE, 65536, about="bytes that move together")


class WanderingNode(BlockNode):
    """Half as long as its child."""

    driver_name = "wandering"
    options_type = WanderingOptions
    options: WanderingOptions
    child_keys = ("file",)
    supported_write_flags = int(Req.FUA | Req.WRITE_UNCHANGED)
    supported_zero_flags = int(Req.FUA | Req.MAY_UNMAP | Req.WRITE_UNCHANGED | Req.NO_FALLBACK)
    _file: Edge

    async def open(self, context: OpenContext) -> None:
        """Everything is where it belongs, at first."""
        self._file = await context.open_child(self, "file", Role.DATA | Role.PRIMARY)
        self._chunk = self.options.chunk
        slots = self._file.node.length // self._chunk
        self._slot_of = list(range(slots // 2))
        self._chunk_in: list[int | None] = [*self._slot_of, *[None] * (slots - len(self._slot_of))]
        self._free = list(range(len(self._slot_of), slots))
        self.length = len(self._slot_of) * self._chunk

    def refresh_limits(self) -> None:
        """A move is a whole number of blocks."""
        self.limits.request_alignment = self._file.node.limits.request_alignment
        assert self._chunk % self.limits.request_alignment == 0

    # ------------------------------------------------------------------ requests

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(offset in the child, bytes done before, bytes) of each chunk that is touched."""
        done = 0
        while done < length:
            index, inside = divmod(offset + done, self._chunk)
            count = min(self._chunk - inside, length - done)
            yield self._slot_of[index] * self._chunk + inside, done, count
            done += count

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        """Piece by piece."""
        for at, done, count in self._pieces(offset, length):
            await self._file.preadv(at, iov.slice(done, count))

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        """Piece by piece."""
        for at, done, count in self._pieces(offset, length):
            await self._file.pwritev(at, iov.slice(done, count), flags)

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        """Piece by piece."""
        for at, _, count in self._pieces(offset, length):
            await self._file.pwrite_zeroes(at, count, flags)

    async def driver_pdiscard(self, offset: int, length: int) -> None:
        """Piece by piece."""
        for at, _, count in self._pieces(offset, length):
            await self._file.pdiscard(at, count)

    def can_discard(self) -> bool:
        """If the child can."""
        return self._file.node.can_discard()

    # ------------------------------------------------------------------ extents

    async def host_extent(self, offset: int, length: int) -> HostExtent | None:
        """As many neighbours as are neighbours in the child."""
        first = last = offset // self._chunk
        slots = self._slot_of
        while first and slots[first - 1] == slots[first] - 1:
            first -= 1
        while last + 1 < len(slots) and slots[last + 1] == slots[last] + 1:
            last += 1
        start, shift = first * self._chunk, (slots[first] - first) * self._chunk
        end = (last + 1) * self._chunk
        extent = await host_extent(self._file.node, offset + shift, min(length, end - offset))
        extent = extent and extent.cut(start + shift, end + shift)
        return extent and replace(extent, offset=extent.offset - shift)

    def flush_target(self) -> int | FlushTarget:
        """The child's: nothing is cached here."""
        return flush_target(self._file.node)

    async def child_revoke(self, edge: Edge, offset: int, length: int) -> None:
        """The chunks that are in these slots."""
        for slot in range(offset // self._chunk, -(-(offset + length) // self._chunk)):
            chunk = self._chunk_in[slot] if slot < len(self._chunk_in) else None
            if chunk is not None:
                await self.revoke(chunk * self._chunk, self._chunk)

    def child_resized(self, edge: Edge) -> None:
        """What the child has more is not used."""

    # ------------------------------------------------------------------ moving

    async def move(self, choice: random.Random, span: int) -> None:
        """Put a chunk somewhere else, and poison where it was.

        Args:
            choice: chooses chunk and place.
            span: where the disk is in use: up to this many bytes.
        """
        chunk, size = choice.randrange(min(span // self._chunk, len(self._slot_of))), self._chunk
        slot = self._free.pop(choice.randrange(len(self._free)))
        self.in_flight += 1
        request = self.tracker.begin(RequestType.WRITE, chunk * size, size)
        buffer = self.bounce.acquire(size, self.limits.opt_mem_alignment)
        try:
            await serialise(self, request, 0)
            old = self._slot_of[chunk]
            await self._file.preadv(old * size, IoVec([buffer[:size]]))
            await self._file.pwritev(slot * size, IoVec([buffer[:size]]))
            buffer[:size] = POISON * size
            await self._file.pwritev(old * size, IoVec([buffer[:size]]))
            self._slot_of[chunk], self._chunk_in[slot], self._chunk_in[old] = slot, chunk, None
            slot = old
        finally:
            self._free.append(slot)
            self.write_log.generation += 1
            self.bounce.release(buffer)
            self.tracker.end(request)
            self.leave()
