"""Limits: names, derived sizes, merging (rows B02 and B12)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.block.fakes import ArrayNode, NoOptions, PassNode, put_above
from vhostblk.block.edge import Edge
from vhostblk.block.filters.filter import FilterNode
from vhostblk.block.limits import (
    MAX_ALIGNMENT,
    MAX_LENGTH,
    MAX_REQUEST,
    BlockLimits,
    align_down,
    align_up,
)
from vhostblk.block.node import ExtentFlag, Req, Role
from vhostblk.block.options import NodeOptions
from vhostblk.block.permissions import Perm

FUA, MAY_UNMAP, NO_FALLBACK = int(Req.FUA), int(Req.MAY_UNMAP), int(Req.NO_FALLBACK)
WRITE_UNCHANGED, REGISTERED_BUF = int(Req.WRITE_UNCHANGED), int(Req.REGISTERED_BUF)


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
    assert Req.MASK.value == 0x7FF
    assert [bit.value for bit in Perm] == [1, 2, 4, 8]
    assert Perm.ALL.value == 0x0F
    assert Role.IMAGE.value == 19


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


alignments = st.sampled_from([1, 2, 512, 1024, 4096])


@st.composite
def stated(draw: st.DrawFn) -> BlockLimits:
    """What a driver may state of itself."""
    align = draw(alignments)
    discard_unit, zeroes_unit = align * draw(st.integers(0, 4)), align * draw(st.integers(0, 4))
    return BlockLimits(
        request_alignment=align,
        opt_transfer=align * draw(st.integers(0, 4)),
        max_transfer=draw(st.one_of(st.just(0), st.integers(align, 8 * align))),
        pdiscard_alignment=discard_unit,
        max_pdiscard=max(discard_unit, align) * draw(st.integers(0, 4)),
        pwrite_zeroes_alignment=zeroes_unit,
        max_pwrite_zeroes=max(zeroes_unit, align) * draw(st.integers(0, 4)),
        min_mem_alignment=draw(alignments),
        opt_mem_alignment=draw(alignments),
        max_iov=draw(st.integers(1, 1024)),
    )


class Stating(PassNode):
    """A filter with an alignment of its own."""

    align = 1

    def refresh_limits(self) -> None:
        self.limits.request_alignment = self.align


@given(st.lists(stated(), min_size=1, max_size=3), alignments)
def test_any_node_above_any_children_has_limits_that_are_sound(
    children: list[BlockLimits], align: int
) -> None:
    """Only transfers and memory are inherited, as the strictest of them; what is less than a block becomes one."""
    node = Stating("above", NodeOptions(), NoOptions())
    node.align = align
    for number, limits in enumerate(children):
        child = ArrayNode(8192, limits)
        edge = Edge(node, child, str(number), Role.DATA, Perm.NONE, Perm.ALL)
        edge.attach()
        node.children[str(number)] = edge
    node.compute_limits()
    found = node.limits
    found.check()
    assert found.request_alignment == align
    transfers = [limits.max_transfer for limits in children if limits.max_transfer]
    assert found.max_transfer == (max(min(transfers), align) if transfers else 0)
    assert found.opt_transfer == align_up(max(limits.opt_transfer for limits in children), align)
    assert found.max_iov == min(limits.max_iov for limits in children)
    for name in ("min_mem_alignment", "opt_mem_alignment"):
        assert getattr(found, name) == max(getattr(limits, name) for limits in children)
    for name in ("max_pdiscard", "pdiscard_alignment", "max_pwrite_zeroes"):
        assert getattr(found, name) == 0


def test_change_of_limits_reaches_everybody_above() -> None:
    leaf = ArrayNode(8192, BlockLimits(min_mem_alignment=1))
    middle = put_above(leaf, "middle")
    top = put_above(middle, "top")
    leaf.limits.max_transfer, leaf.limits.min_mem_alignment = 2048, 512
    middle.compute_limits()
    assert (top.limits.max_transfer, top.limits.min_mem_alignment) == (2048, 512)


class Handing(PassNode):
    """Hands everything on, as most filters do."""

    supported_write_flags = FilterNode.supported_write_flags
    supported_zero_flags = FilterNode.supported_zero_flags


def test_who_hands_requests_on_has_the_flags_of_the_child_and_those_that_change_nothing() -> None:
    leaf = ArrayNode(8192, BlockLimits(min_mem_alignment=1), write_flags=FUA, zero_flags=0)
    middle = put_above(leaf, "middle", Handing)
    top = put_above(middle, "top", Handing)
    middle.compute_limits()
    assert top.supported_write_flags == middle.supported_write_flags == FUA | WRITE_UNCHANGED
    assert top.supported_zero_flags == middle.supported_zero_flags == WRITE_UNCHANGED
    leaf.supported_write_flags = 0
    leaf.supported_zero_flags = FUA | MAY_UNMAP | NO_FALLBACK | REGISTERED_BUF
    leaf.compute_limits()
    assert top.supported_write_flags == WRITE_UNCHANGED
    assert top.supported_zero_flags == FUA | MAY_UNMAP | NO_FALLBACK | WRITE_UNCHANGED


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
