"""Looking through memory: for zeroes, for numbers that go on in the same way.

Knows nothing of what they mean.
"""

from __future__ import annotations

from array import array
from typing import Any

from vhostblk.native.binding import engine, ffi

__all__ = ["count_steps", "zero_blocks"]


def zero_blocks(data: Any, start: int, end: int, first: int, block: int) -> bytes:
    """Say of blocks of `data[start:end]` whether they are all zeroes: 1 for each that is, 0 for each that is not.

    Args:
        data: contiguous, writable; nobody writes to it meanwhile.
        first: bytes of the first block, positive.
        block: bytes of all others, positive; the last may be a part of one.

    Context: any thread.
    """
    if start >= end:
        return b""
    kinds = bytearray(1 + -(-max(end - start - first, 0) // block))
    lib = engine()
    with memoryview(data) as view, view[start:end] as part:
        held = ffi.from_buffer("char[]", part)
        lib.vb_zero_blocks(
            ffi.cast("uintptr_t", held), end - start, first, block, ffi.from_buffer(kinds)
        )
        ffi.release(held)
    return bytes(kinds)


def count_steps(table: array[int], start: int, first: int, step: int) -> int:
    """Say how many numbers from `table[start]` on are `first`, `first + step`, and so on.

    Args:
        table: numbers of 64 bits; nobody writes to it meanwhile.
        start: inside the table, or its end.
        first, step: not negative, below 2^64; so is what they add up to behind the last number.

    Context: any thread.
    """
    address, count = table.buffer_info()
    return int(engine().vb_count_steps(address + 8 * start, count - start, first, step))
