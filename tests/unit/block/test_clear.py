"""Zero-writes and discards: how they are cut, and what happens where a driver cannot (rows B17 and B18)."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.block.fakes import ArrayNode, run_now
from vhostblk.block import clear, submit
from vhostblk.block.limits import BlockLimits
from vhostblk.block.node import Req
from vhostblk.block.options import NodeOptions
from vhostblk.errors import BlockError

FUA, MAY_UNMAP, NO_FALLBACK = int(Req.FUA), int(Req.MAY_UNMAP), int(Req.NO_FALLBACK)


def zero(node: ArrayNode, offset: int, length: int, flags: int = 0) -> None:
    run_now(clear.pwrite_zeroes(node, offset, length, flags))


def test_zero_write_never_crosses_a_unit_at_its_ends() -> None:
    limits = BlockLimits(
        request_alignment=512,
        min_mem_alignment=1,
        pwrite_zeroes_alignment=4096,
        max_pwrite_zeroes=10_000,
    )
    node = ArrayNode(limits=limits)
    zero(node, 512, 512 * 50)
    assert node.asked.of("zero") == [
        (512, 3584),
        (4096, 8192),
        (12288, 8192),
        (20480, 4096),
        (24576, 1536),
    ]


def test_unaligned_ends_are_written_as_data() -> None:
    node = ArrayNode(16384, BlockLimits(request_alignment=4096, min_mem_alignment=1))
    node.data[:] = b"\xff" * 16384
    zero(node, 100, 12_200)
    assert node.asked.of("zero") == [(4096, 8192)]
    assert node.asked.of("write") == [(0, 4096), (12288, 4096)]
    assert node.data == b"\xff" * 100 + bytes(12_200) + b"\xff" * (16384 - 12_300)


def test_zero_write_smaller_than_a_block_is_one_read_modify_write() -> None:
    node = ArrayNode(8192, BlockLimits(request_alignment=4096, min_mem_alignment=1))
    node.data[:] = b"\xff" * 8192
    zero(node, 4100, 10)
    assert node.asked.calls == [("read", 4096, 4096, 0), ("write", 4096, 4096, 0)]
    assert node.data[4100:4110] == bytes(10)
    assert node.data.count(b"\0") == 10


def test_driver_without_zero_writes_gets_data_in_bounded_pieces() -> None:
    node = ArrayNode(
        40 << 20, BlockLimits(request_alignment=512, min_mem_alignment=1), zeroes=False
    )
    node.data[:4] = b"full"
    zero(node, 0, 40 << 20)
    assert [length >> 20 for _, length in node.asked.of("write")] == [16, 16, 8]
    assert not node.data.strip(b"\0")


def test_what_the_driver_cannot_zero_for_its_alignment_reads_as_zeroes_all_the_same() -> None:
    """Row B17's proof: only whole units are zeroed cheaply, the pieces at both ends are written."""
    limits = BlockLimits(request_alignment=512, min_mem_alignment=1, pwrite_zeroes_alignment=4096)
    for start in range(0, 4096 + 512, 512):
        for end in range(8192, 8192 + 4096 + 512, 512):
            node = ArrayNode(16384, limits)
            node.data[:] = b"\xff" * 16384

            def fail(kind: str, offset: int, length: int) -> None:
                if kind == "zero" and (offset | length) % 4096:
                    raise BlockError(errno.ENOTSUP)

            node.fail = fail
            zero(node, start, end - start)
            assert node.data == b"\xff" * start + bytes(end - start) + b"\xff" * (16384 - end)
            written = sum(length for _, length in node.asked.of("write"))
            assert written == -start % 4096 + end % 4096


def test_no_fallback_is_enotsup_instead() -> None:
    node = ArrayNode(8192, BlockLimits(request_alignment=512, min_mem_alignment=1), zeroes=False)
    for offset in (0, 1):
        with pytest.raises(BlockError) as caught:
            zero(node, offset, 1024, NO_FALLBACK)
        assert caught.value.errno == errno.ENOTSUP
    assert not node.asked.count("write")


@pytest.mark.parametrize("zeroes", [True, False])
def test_fua_zero_write_in_five_pieces_is_flushed_exactly_once(zeroes: bool) -> None:
    limits = BlockLimits(min_mem_alignment=1, max_pwrite_zeroes=1024, max_transfer=1024)
    node = ArrayNode(limits=limits, zeroes=zeroes)
    zero(node, 0, 5 * 1024, FUA)
    assert node.asked.count("zero") == 5
    assert node.asked.count("flush") == 1


def test_native_fua_needs_no_flush() -> None:
    node = ArrayNode(zero_flags=FUA, write_flags=FUA)
    zero(node, 0, 1024, FUA)
    assert node.asked.calls == [("zero", 0, 1024, FUA)]


def test_error_ends_the_loop_and_nothing_is_flushed() -> None:
    node = ArrayNode(limits=BlockLimits(min_mem_alignment=1, max_pwrite_zeroes=1024))

    def fail(kind: str, offset: int, length: int) -> None:
        if offset == 2048:
            raise BlockError(errno.EIO)

    node.fail = fail
    before = node.write_log.generation
    with pytest.raises(BlockError):
        zero(node, 0, 5 * 1024, FUA)
    assert node.asked.count("zero") == 3
    assert not node.asked.count("flush")
    assert node.write_log.generation > before


def test_may_unmap_reaches_only_a_driver_that_may_and_can() -> None:
    for discard, supported, expected in (
        ("unmap", MAY_UNMAP, MAY_UNMAP),
        ("ignore", MAY_UNMAP, 0),
        ("unmap", 0, 0),
    ):
        node = ArrayNode(zero_flags=supported, common=NodeOptions(discard=discard))
        zero(node, 0, 512, MAY_UNMAP)
        assert node.asked.calls == [("zero", 0, 512, expected)]


# ---------------------------------------------------------------- discard

UNIT = BlockLimits(request_alignment=512, min_mem_alignment=1, pdiscard_alignment=4096)


def test_discard_pieces_keep_the_bulk_aligned() -> None:
    assert list(submit.discard_pieces(UNIT, 512, 16_384)) == [
        (512, 3584),
        (4096, 12_288),
        (16_384, 512),
    ]
    # 100 bytes up to a block, blocks up to a unit, units, blocks, and the 10 bytes left over.
    assert list(submit.discard_pieces(UNIT, 412, 16_384 + 110)) == [
        (412, 100),
        (512, 3584),
        (4096, 12_288),
        (16_384, 512),
        (16_896, 10),
    ]


units = st.sampled_from([1, 512, 1024])


@given(units, st.integers(0, 4), st.integers(0, 40), st.integers(0, 9000), st.integers(1, 30_000))
def test_discard_pieces_are_the_range_and_obey_the_limits(
    align: int, factor: int, largest: int, offset: int, length: int
) -> None:
    limits = BlockLimits(
        request_alignment=align,
        pdiscard_alignment=align * factor,
        max_pdiscard=max(align * factor, align) * largest,
    )
    position = offset
    for start, count in submit.discard_pieces(limits, offset, length):
        assert start == position
        assert count > 0
        assert not limits.max_pdiscard or count <= limits.max_pdiscard
        if start % limits.discard_unit:
            assert start // limits.discard_unit == (start + count - 1) // limits.discard_unit
        position += count
    assert position == offset + length


def test_no_fallback_is_refused_where_the_driver_might_fall_back_by_itself() -> None:
    node = ArrayNode(limits=UNIT, zero_flags=MAY_UNMAP)
    with pytest.raises(BlockError) as error:
        zero(node, 0, 4096, NO_FALLBACK)
    assert error.value.errno == errno.ENOTSUP
    assert node.asked.calls == []
    zero(node, 0, 4096, 0)
    assert node.asked.calls != []


def test_discard_ignores_enotsup_of_a_piece_and_stops_at_any_other_error() -> None:
    for error, asked in ((errno.ENOTSUP, 4), (errno.EIO, 3)):
        node = ArrayNode(limits=UNIT)

        def fail(kind: str, offset: int, length: int, error: int = error) -> None:
            if offset == 4096:  # the third of four
                raise BlockError(error)

        node.fail = fail
        before = node.write_log.generation
        if error == errno.EIO:
            with pytest.raises(BlockError):
                run_now(clear.pdiscard(node, 412, 16_384))
        else:
            run_now(clear.pdiscard(node, 412, 16_384))
        assert node.asked.count("discard") == asked
        assert node.write_log.generation > before


def test_discard_without_unmap_does_nothing_and_succeeds() -> None:
    node = ArrayNode(common=NodeOptions(discard="ignore"))
    run_now(clear.pdiscard(node, 0, 4096))
    assert not node.asked.calls
