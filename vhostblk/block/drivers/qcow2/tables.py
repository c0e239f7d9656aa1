"""Tables of 64-bit numbers in an image: read whole (L1), or by slices that a cache of bounded size keeps (L2).

Context: the control loop. Knows nothing about what the numbers mean.
"""

from __future__ import annotations

import asyncio
import sys
from array import array
from collections import OrderedDict
from typing import TypeAlias

from vhostblk.block.edge import Edge
from vhostblk.block.iov import IoVec

# Large tables are read in pieces, so that one request is never too large for a child.
_PIECE = 1 << 20

Table: TypeAlias = "array[int]"


async def read_table(file: Edge, offset: int, entries: int) -> Table:
    """Big-endian numbers at `offset`; what is behind the end of the file is 0.

    Raises:
        BlockError: the child's errno.
    """
    data = bytearray(entries * 8)
    view = memoryview(data)
    for start in range(0, len(data), _PIECE):
        await file.preadv(offset + start, IoVec.of(view[start : start + _PIECE]))
    table = array("Q")
    table.frombytes(data)
    if sys.byteorder == "little":
        table.byteswap()
    return table


def _seen(loading: asyncio.Future[Table]) -> None:
    """Whoever waited for it knows of its failure; nobody may be left who does."""
    if not loading.cancelled():
        loading.exception()


class TableCache:
    """Slices of tables, those used last.

    Args:
        file: where the tables are.
        slice_bytes: of each slice, a multiple of 8.
        total_bytes: that slices may take; one slice is always kept.
    """

    def __init__(self, file: Edge, slice_bytes: int, total_bytes: int) -> None:
        self._file = file
        self._entries = slice_bytes // 8
        self._most = max(total_bytes // slice_bytes, 1)
        self._slices: OrderedDict[int, Table] = OrderedDict()
        self._loading: dict[int, asyncio.Future[Table]] = {}

    def __len__(self) -> int:
        return len(self._slices)

    async def get(self, offset: int) -> Table:
        """The slice at this offset of the file; nobody changes it.

        Raises:
            BlockError: the child's errno; the next one who asks tries again.
        """
        table = self._slices.get(offset)
        if table is not None:
            self._slices.move_to_end(offset)
            return table
        loading = self._loading.get(offset)
        if loading is None:
            loading = asyncio.ensure_future(self._load(offset))
            loading.add_done_callback(_seen)
            self._loading[offset] = loading
        # Whoever waits may be cancelled; the others still want it.
        return await asyncio.shield(loading)

    async def _load(self, offset: int) -> Table:
        try:
            table = await read_table(self._file, offset, self._entries)
        finally:
            del self._loading[offset]
        while len(self._slices) >= self._most:
            self._slices.popitem(last=False)
        self._slices[offset] = table
        return table

    def clear(self) -> None:
        """Forget all; the image has changed."""
        self._slices.clear()
