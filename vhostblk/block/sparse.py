"""Which parts of a buffer are worth writing, where what is not written reads as zeroes (`qemu-img convert -S`).

Theory of operation: the target is thought of as blocks of one size, and a block is zeroes or it is data. Zeroes that
are shorter than what the caller wants to spare are data, too, if they are between data: so there are fewer and larger
writes. Which blocks are zeroes the engine tells, where there is one.

Knows nothing about where the data come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from vhostblk import native
from vhostblk.block.limits import MAX_REQUEST

_ZEROES = bytes(64 << 10)


def is_zero(data: bytearray, start: int, end: int) -> bool:
    """Whether this part of the buffer is all zeroes."""
    step = len(_ZEROES)
    while end - start > step:
        if not data.startswith(_ZEROES, start, start + step):
            return False
        start += step
    return data.startswith(_ZEROES[: end - start], start, end)


def pieces(
    data: bytearray, start: int, end: int, at: int, block: int, least: int
) -> Iterator[tuple[int, int, bool]]:
    """Cut `data[start:end]` into what is to be written and what is zeroes.

    Args:
        at: where in the target it belongs, bytes.
        block: bytes, a power of two: both kinds begin and end at its multiples in the target, but at the ends of the
            buffer.
        least: bytes; shorter zeroes between data are not worth anything.

    Returns: begin and end in `data`, and whether it is data; all of it, in order.
    """
    kinds = _kinds(data, start, end, at, block)
    first = block - at % block  # length of the first block, which may be a part of one

    def position(index: int) -> int:
        return min(start + first + (index - 1) * block, end) if index else start

    index, count = 0, len(kinds)
    while index < count:
        before = position(index)
        if kinds[index]:
            index = _or_end(kinds.find(0, index), count)
            yield before, position(index), False
            continue
        enough = min(least, end - before)
        while True:
            stop = _or_end(kinds.find(1, index), count)
            if stop == count:
                break
            index = _or_end(kinds.find(0, stop), count)
            if index == count or position(index) - position(stop) >= enough:
                break
        index = stop
        yield before, position(stop), True


def _or_end(found: int, count: int) -> int:
    return count if found < 0 else found


def _kinds(data: bytearray, start: int, end: int, at: int, block: int) -> bytes:
    """For each block: 1 if it is zeroes, else 0."""
    first = block - at % block
    if native.available:
        return native.zero_blocks(data, start, end, first, block)
    bounds = [start, *range(start + first, end, block), end]
    return bytes(is_zero(data, *pair) for pair in pairwise(bounds))


def largest_power_of_two(size: int) -> int:
    """That is not above `size`, which is positive."""
    return 1 << min(size, MAX_REQUEST).bit_length() - 1
