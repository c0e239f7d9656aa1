"""Tables of numbers in an image: 8 bytes each (L1, L2, the reference count table), or as wide as the counts are.

Context: the control loop. Knows nothing about what the numbers mean.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import TypeAlias

from vhostblk import native
from vhostblk.block.edge import Edge
from vhostblk.block.iov import IoVec

# Large tables are read in pieces, so that one request is never too large for a child.
_PIECE = 1 << 20
_TYPES = {3: "B", 4: "H", 5: "I", 6: "Q"}

Table: TypeAlias = "array[int]"


class Codec:
    """Tables as they are in the file, big-endian, and as numbers.

    Args:
        order: numbers have `1 << order` bits, 1 to 64.

    Attributes:
        largest: of all numbers.
    """

    def __init__(self, order: int) -> None:
        self._order = order
        self.largest = (1 << (1 << order)) - 1

    def decode(self, data: bytes | bytearray) -> Table:
        """Bytes to numbers."""
        if self._order >= 3:
            table = array(_TYPES[self._order])
            table.frombytes(data)
            return _swapped(table)
        # All first numbers of bytes at once, then all second ones, ...: a block may have 16 million.
        bits, mask = 1 << self._order, self.largest
        each = 8 // bits
        numbers = bytearray(len(data) * each)
        for n in range(each):
            numbers[n::each] = data.translate(bytes(byte >> n * bits & mask for byte in range(256)))
        return array("B", numbers)

    def encode(self, table: Table) -> bytes:
        """Numbers to bytes."""
        if self._order >= 3:
            return _swapped(table[:]).tobytes()
        bits = 1 << self._order
        each = 8 // bits
        whole = 0
        for n in range(each):
            whole |= int.from_bytes(table[n::each].tobytes()) << n * bits
        return whole.to_bytes(len(table) // each)


OFFSETS = Codec(6)
"""Of tables of offsets: 64 bits."""


def _swapped(table: Table) -> Table:
    """From the file's byte order to ours or back, in place."""
    if sys.byteorder == "little":
        table.byteswap()
    return table


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
    """A table of offsets; raises as `read_bytes`."""
    return OFFSETS.decode(await read_bytes(file, offset, entries * 8))


def entry_writes(offset: int, table: Table, indices: Iterable[int]) -> list[tuple[int, bytes]]:
    """These entries of the table of offsets at `offset`: where to write which bytes."""
    return [(offset + 8 * index, table[index].to_bytes(8)) for index in sorted(indices)]


def count_alike(table: Table, at: int, first: int, step: int) -> int:
    """How many numbers from `at` on are `first`, `first + step`, and so on.

    Args:
        table: of offsets.
        step: the numbers have 64 bits, also if all of the table goes on in this way.
    """
    if native.available:
        return native.count_steps(table, at, first, step)
    end, expected = at, first
    while end < len(table) and table[end] == expected:
        end += 1
        expected += step
    return end - at
