"""Which blocks are zeroes, and how far numbers go on alike, the engine says as Python would."""

from __future__ import annotations

from array import array
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vhostblk import native

pytestmark = pytest.mark.skipif(not native.available, reason="the engine is not built")


def model(data: bytes, first: int, block: int) -> bytes:
    bounds = [0, *range(first, len(data), block), len(data)]
    return bytes(not any(data[begin:end]) for begin, end in pairwise(bounds))


@given(
    length=st.integers(1, 1500),
    places=st.sets(st.integers(0, 1499), max_size=4),
    lead=st.integers(0, 20),
    tail=st.integers(0, 20),
    first=st.integers(1, 600),
    block=st.integers(1, 600),
)
@example(
    length=64, places=set(), lead=1, tail=1, first=64, block=64
)  # what is beside it does not count
@example(length=256, places={101}, lead=0, tail=0, first=128, block=128)  # neither end shows it
@example(length=130, places={65}, lead=0, tail=0, first=67, block=63)  # behind the last whole line
def test_blocks_are_zeroes_if_all_their_bytes_are(
    length: int, places: set[int], lead: int, tail: int, first: int, block: int
) -> None:
    content = bytearray(length)
    for place in places:
        content[place % length] = 1
    data = bytearray(b"\xff" * lead + content + b"\xff" * tail)
    found = native.zero_blocks(data, lead, lead + length, first, block)
    assert found == model(bytes(content), first, block)
    data += b"nothing holds it any more"  # BufferError otherwise


def test_nothing_has_no_blocks() -> None:
    assert native.zero_blocks(bytearray(3), 2, 2, 1, 1) == b""


def test_numbers_are_counted_as_far_as_they_go_on_alike() -> None:
    table = array("Q", [7, 7, 9])
    assert native.count_steps(table, 0, 7, 0) == 2
    assert native.count_steps(table, 1, 7, 2) == 2
    assert native.count_steps(table, 0, 8, 0) == 0
    assert native.count_steps(table, 3, 7, 0) == 0
