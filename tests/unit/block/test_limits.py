"""Limits: names, derived sizes, merging (rows B02 and B12)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostblk.block.limits import (
    MAX_ALIGNMENT,
    MAX_LENGTH,
    MAX_REQUEST,
    BlockLimits,
    align_down,
    align_up,
)
from vhostblk.block.node import ExtentFlag, Req, Role
from vhostblk.block.permissions import Perm


def test_derived_sizes_are_those_of_row_b02() -> None:
    assert MAX_REQUEST == 2_147_483_136
    assert MAX_ALIGNMENT == 1 << 30
    assert MAX_LENGTH == 0x7FFF_FFFF_C000_0000


def test_names_have_the_values_of_row_b02() -> None:
    assert {flag.name: flag.value for flag in Req if flag.value.bit_count() == 1} == {
        "COPY_ON_READ": 1,
        "ZERO_WRITE": 2,
        "MAY_UNMAP": 4,
        "REGISTERED_BUF": 8,
        "FUA": 0x10,
        "WRITE_COMPRESSED": 0x20,
        "WRITE_UNCHANGED": 0x40,
        "SERIALISING": 0x80,
        "NO_FALLBACK": 0x100,
        "PREFETCH": 0x200,
        "NO_WAIT": 0x400,
    }
    assert Req.MASK == 0x7FF
    assert [bit.value for bit in Perm] == [1, 2, 4, 8]
    assert Perm.ALL == 0x0F
    assert Role.IMAGE == 19


def test_extent_flags_have_the_values_of_the_engines_header() -> None:
    assert {flag.name: flag.value for flag in ExtentFlag} == {
        "READ": 1,
        "WRITE": 2,
        "ZERO": 4,
        "NULL": 8,
        "INLINE": 16,
        "POOL": 32,
        "FIXED": 64,
        "CACHED": 128,
    }


sizes = st.integers(0, 1 << 20)
limits = st.builds(
    BlockLimits,
    opt_transfer=sizes,
    max_transfer=sizes,
    max_pdiscard=sizes,
    max_pwrite_zeroes=sizes,
    min_mem_alignment=st.sampled_from([1, 512, 4096]),
    opt_mem_alignment=st.sampled_from([512, 4096]),
    max_iov=st.integers(1, 1024),
)


@given(limits, limits)
def test_merge_takes_the_stricter_of_transfer_and_memory_limits_only(
    own: BlockLimits, child: BlockLimits
) -> None:
    before = BlockLimits(max_pdiscard=own.max_pdiscard, max_pwrite_zeroes=own.max_pwrite_zeroes)
    transfers = [size for size in (own.max_transfer, child.max_transfer) if size]
    expected_iov = min(own.max_iov, child.max_iov)
    expected_memory = max(own.min_mem_alignment, child.min_mem_alignment)
    own.merge(child)
    assert own.max_transfer == min(transfers, default=0)
    assert own.max_iov == expected_iov
    assert own.min_mem_alignment == expected_memory
    assert own.max_pdiscard == before.max_pdiscard
    assert own.max_pwrite_zeroes == before.max_pwrite_zeroes
    assert own.request_alignment == 1


def test_limits_are_clamped_to_multiples_of_their_alignment() -> None:
    own = BlockLimits(
        request_alignment=512,
        max_transfer=1300,
        pdiscard_alignment=4096,
        max_pdiscard=10_000,
        pwrite_zeroes_alignment=1024,
        max_pwrite_zeroes=5000,
    )
    assert own.transfer == 1024
    assert own.discard_transfer == 8192
    assert own.zeroes_transfer == 4096
    assert BlockLimits(request_alignment=4096).transfer == align_down(MAX_REQUEST, 4096)


@pytest.mark.parametrize(
    "wrong",
    [
        BlockLimits(request_alignment=0),
        BlockLimits(request_alignment=3),
        BlockLimits(min_mem_alignment=0),
        BlockLimits(request_alignment=512, pdiscard_alignment=700),
        BlockLimits(request_alignment=4096, max_transfer=512),
        BlockLimits(pdiscard_alignment=4096, max_pdiscard=512),
    ],
)
def test_check_finds_limits_that_a_driver_must_not_state(wrong: BlockLimits) -> None:
    with pytest.raises(AssertionError):
        wrong.check()


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 20))
def test_aligning_stays_within_one_unit(value: int, unit: int) -> None:
    assert align_down(value, unit) <= value < align_down(value, unit) + unit
    assert align_up(value, unit) - unit < value <= align_up(value, unit)
