"""Looking for zeroes in memory.

Knows nothing of what they mean.
"""

from __future__ import annotations

from typing import Any

from vhostblk.native.binding import engine, ffi

__all__ = ["zero_blocks"]


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
