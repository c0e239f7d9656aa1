"""What is worth writing: the pieces are those that qemu-img's rule, sector by sector, finds."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostblk import native
from vhostblk.block.sparse import is_zero, largest_power_of_two, pieces

SECTOR = 512


def first_run(zero: list[bool], at: int, alignment: int) -> tuple[bool, int]:
    """Whether the first sectors are data, and how many; a run ends at the alignment, except where all is the same."""
    length = next((n for n, one in enumerate(zero) if one != zero[0]), len(zero))
    is_data = not zero[0]
    if length == len(zero):
        return is_data, length
    tail = (at + length) % alignment
    if not tail:
        return is_data, length
    if is_data or length <= tail:
        return True, min(length + alignment - tail, len(zero))
    return False, length - tail


def model(zero: list[bool], at: int, alignment: int, least: int) -> list[tuple[int, int, bool]]:
    """Begin, end and whether it is data, in sectors."""
    found = []
    start = 0
    while start < len(zero):
        is_data, length = first_run(zero[start:], at + start, alignment)
        end = start + length
        if is_data:
            enough = min(least, len(zero) - start)
            checked = end
            while checked < len(zero):
                more, length = first_run(zero[checked:], at + checked, alignment)
                checked += length
                if more:
                    end = checked
                elif length >= enough:
                    break
        found.append((start, end, is_data))
        start = end
    return found


@given(
    runs=st.lists(st.tuples(st.booleans(), st.integers(1, 40)), min_size=1, max_size=12),
    at=st.integers(0, 100),
    block=st.sampled_from((1, 2, 8, 32)),
    more=st.integers(0, 40),
    lead=st.integers(0, 3),
    byte=st.integers(0, SECTOR - 1),
    has_engine=st.booleans() if native.available else st.just(False),
)
def test_pieces_are_those_of_the_rule_by_sectors(
    runs: list[tuple[bool, int]],
    at: int,
    block: int,
    more: int,
    lead: int,
    byte: int,
    has_engine: bool,
) -> None:
    zero = [kind for kind, length in runs for _ in range(length)]
    data = bytearray(b"\xff" * lead)
    for one in zero:
        sector = bytearray(SECTOR)
        if not one:
            sector[byte] = 1  # one byte is enough, wherever it is
        data += sector
    # As `convert` asks: blocks are the largest power of two in what is worth sparing.
    least = block + more % block
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "available", has_engine)
        found = [
            ((start - lead) // SECTOR, (end - lead) // SECTOR, is_data)
            for start, end, is_data in pieces(
                data, lead, len(data), at * SECTOR, block * SECTOR, least * SECTOR
            )
        ]
    assert found == model(zero, at, block, least)


@given(length=st.integers(0, 200_000), place=st.integers(0, 199_999), lead=st.integers(0, 70_000))
def test_one_byte_is_enough_not_to_be_zero(length: int, place: int, lead: int) -> None:
    data = bytearray(lead) + bytearray(length) + b"\xff"
    assert is_zero(data, lead, lead + length)
    if place < length:
        data[lead + place] = 1
        assert not is_zero(data, lead, lead + length)


def test_powers_of_two() -> None:
    groups = groupby(range(1, 70), largest_power_of_two)
    assert [(power, len(list(group))) for power, group in groups] == [
        *((1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (32, 32), (64, 6))
    ]
