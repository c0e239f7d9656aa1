"""Tables of 64-bit numbers in an image: read whole (L1), or by slices that a cache of bounded size keeps (L2).

Context: the control loop. Knows nothing about what the numbers mean.
"""

from __future__ import annotations

import asyncio
import sys
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeAlias

from vhostblk.block.edge import Edge
from vhostblk.block.iov import IoVec

# Large tables are read in pieces, so that one request is never too large for a child.
_PIECE = 1 << 20

Table: TypeAlias = "array[int]"


async def read_bytes(file: Edge, offset: int, length: int) -> bytearray:
    """So many bytes at `offset`; what is behind the end of the file is 0.

    Raises:
        BlockError: the child's errno.
    """
    data = bytearray(length)
    view = memoryview(data)
    for start in range(0, length, _PIECE):
        await file.preadv(offset + start, IoVec.of(view[start : start + _PIECE]))
    return data


async def read_table(file: Edge, offset: int, entries: int) -> Table:
    """Big-endian numbers at `offset`; raises as `read_bytes`."""
    table = array("Q")
    table.frombytes(await read_bytes(file, offset, entries * 8))
    return big_endian(table)


def big_endian(table: Table) -> Table:
    """From the file's byte order to ours or back, in place."""
    if sys.byteorder == "little":
        table.byteswap()
    return table


def table_bytes(table: Table) -> bytes:
    """As it is in the file."""
    return big_endian(table[:]).tobytes()


@dataclass(slots=True, eq=False)
class Slice:
    """A part of a table.

    Attributes:
        offset: in the file.
        pins: whoever changed it and has not seen it written yet; until then it stays.
    """

    offset: int
    table: Table
    is_dirty: bool = False
    pins: int = 0


class TableCache:
    """Slices of tables, those used last, and all that have not been written yet.

    Args:
        file: where the tables are.
        slice_bytes: of each slice, a multiple of 8.
        total_bytes: that slices may take; one slice is always kept.
    """

    def __init__(self, file: Edge, slice_bytes: int, total_bytes: int) -> None:
        self.slice_bytes = slice_bytes
        self._file = file
        self._entries = slice_bytes // 8
        self._most = max(total_bytes // slice_bytes, 2)
        self._slices: OrderedDict[int, Slice] = OrderedDict()
        self._loading: dict[int, asyncio.Future[None]] = {}
        self._forgotten: set[int] = set()  # while they are loaded
        self._dirty: dict[int, Slice] = {}

    def __len__(self) -> int:
        return len(self._slices)

    @property
    def is_dirty(self) -> bool:
        """Whether something has to be written."""
        return bool(self._dirty)

    @property
    def is_full(self) -> bool:
        """Whether so much waits to be written that it is time."""
        return 2 * len(self._dirty) >= self._most

    async def get(self, offset: int) -> Slice:
        """The slice at this offset of the file. It may be gone from the cache after the next `await`, if it is clean.

        Raises:
            BlockError: the child's errno; the next one who asks tries again.
        """
        while (found := self._slices.get(offset)) is None:
            loading = self._loading.get(offset)
            if loading is None:
                return await self._load(offset)
            await asyncio.shield(loading)
        self._slices.move_to_end(offset)
        return found

    def changed(self, slice_: Slice) -> None:
        """It has to be written."""
        assert self._slices.get(slice_.offset) is slice_
        slice_.is_dirty = True
        self._dirty[slice_.offset] = slice_

    def take_dirty(self) -> list[Slice]:
        """Those that have to be written, which stay until `written` or `not_written`."""
        taken = list(self._dirty.values())
        self._dirty.clear()
        for slice_ in taken:
            slice_.is_dirty = False
            slice_.pins += 1
        return taken

    def written(self, slices: list[Slice]) -> None:
        """What `take_dirty` gave is in the file."""
        for slice_ in slices:
            slice_.pins -= 1

    def not_written(self, slices: list[Slice]) -> None:
        """It is not; it still has to be."""
        for slice_ in slices:
            slice_.pins -= 1
            self.changed(slice_)

    def forget(self, offset: int) -> None:
        """What was at this offset is no table any more."""
        self._slices.pop(offset, None)
        self._dirty.pop(offset, None)
        if offset in self._loading:
            self._forgotten.add(offset)

    def clear(self) -> None:
        """Forget all; the image has changed. Nothing waits to be written."""
        assert not self._dirty
        self._slices.clear()

    async def _load(self, offset: int) -> Slice:
        loading = self._loading[offset] = asyncio.get_running_loop().create_future()
        try:
            table = await read_table(self._file, offset, self._entries)
        finally:
            del self._loading[offset]
            loading.set_result(None)
            forgotten = offset in self._forgotten
            self._forgotten.discard(offset)
        if forgotten:
            # Something else may be there by now: not for the next one who asks.
            return Slice(offset, table)
        self._make_room()
        loaded = self._slices[offset] = Slice(offset, table)
        return loaded

    def _make_room(self) -> None:
        """Clean ones go, the least recently used first."""
        while len(self._slices) >= self._most:
            for offset, slice_ in self._slices.items():
                if not slice_.is_dirty and not slice_.pins:
                    del self._slices[offset]
                    break
            else:
                return
