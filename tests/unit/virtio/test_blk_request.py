"""Requests from chains: every framing, every rule, in the documented order."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostblk.errors import GuestError
from vhostblk.virtio.blk import HEADER, SEGMENT, RequestType, Status
from vhostblk.virtio.blk_request import BlkRequest, Segment, parse
from vhostblk.virtio.chain import Broken, DescriptorChain

CAPACITY = 1 << 20
SECTORS = CAPACITY // 512


def pieces(data: bytes | bytearray, cuts: list[int]) -> list[memoryview]:
    """Cut `data` at `cuts` into views, without empty ones."""
    view = memoryview(bytearray(data))
    borders = [0, *sorted(cut % (len(view) + 1) for cut in cuts), len(view)]
    return [view[a:b] for a, b in itertools.pairwise(borders) if a < b]


def chain_of(
    kind: int,
    sector: int = 0,
    out: bytes = b"",
    room: int = 0,
    *,
    cuts: list[int] | None = None,
) -> DescriptorChain:
    """A well-formed chain: `out` behind the header, `room` writable bytes before the status."""
    readable = pieces(HEADER.pack(kind, 0, sector) + out, cuts or [16])
    return DescriptorChain(7, readable, pieces(bytes(room + 1), cuts or [room]))


def parsed(
    kind: int,
    sector: int = 0,
    out: bytes = b"",
    room: int = 0,
    *,
    read_only: bool = False,
    max_segments: int = 4,
) -> BlkRequest:
    chain = chain_of(kind, sector, out, room)
    return parse(chain, capacity=CAPACITY, read_only=read_only, max_segments=max_segments)


def segments(*ranges: tuple[int, int, int]) -> bytes:
    return b"".join(SEGMENT.pack(*fields) for fields in ranges)


IN, OUT, FLUSH, GET_ID = RequestType.IN, RequestType.OUT, RequestType.FLUSH, RequestType.GET_ID
DISCARD, WRITE_ZEROES = RequestType.DISCARD, RequestType.WRITE_ZEROES


@given(st.lists(st.integers(0, 2000), max_size=6))
def test_any_framing_of_a_read_gives_the_same_request(cuts: list[int]) -> None:
    request = parse(chain_of(IN, 3, room=1024, cuts=cuts), capacity=CAPACITY)
    assert (request.status, request.type, request.offset) == (None, IN, 3 * 512)
    assert request.length == 1024 == sum(map(len, request.data))
    assert len(request.status_byte) == 1


@given(st.lists(st.integers(0, 2000), max_size=6))
def test_any_framing_of_a_write_gives_the_same_bytes(cuts: list[int]) -> None:
    data = random.Random(1).randbytes(1024)
    request = parse(chain_of(OUT, 5, data, cuts=cuts), capacity=CAPACITY)
    assert (request.status, request.offset, request.length) == (None, 5 * 512, 1024)
    assert b"".join(request.data) == data


@given(st.lists(st.integers(0, 2000), max_size=6))
def test_any_framing_of_segments_gives_the_same_ranges(cuts: list[int]) -> None:
    out = segments((1, 2, 1), (8, 1, 0))
    request = parse(chain_of(WRITE_ZEROES, 0, out, cuts=cuts), capacity=CAPACITY, max_segments=2)
    assert request.status is None
    assert request.segments == [Segment(512, 1024, True), Segment(4096, 512, False)]


def test_status_is_the_last_writable_byte_even_behind_data() -> None:
    room = memoryview(bytearray(513))
    chain = DescriptorChain(0, [memoryview(HEADER.pack(IN, 0, 0))], [room])
    request = parse(chain, capacity=CAPACITY)
    assert request.length == 512
    assert request.complete(Status.OK, 512) == 513
    request.status_byte[0] = 0xAB
    assert room[512] == 0xAB


def test_chain_without_a_writable_byte_breaks_the_queue() -> None:
    chain = DescriptorChain(0, [memoryview(HEADER.pack(IN, 0, 0))], [])
    with pytest.raises(GuestError) as caught:
        parse(chain, capacity=CAPACITY)
    assert caught.value.reason == Broken.NO_STATUS


def test_chain_that_is_not_all_in_memory_fails_and_is_not_looked_at() -> None:
    chain = chain_of(IN, room=512)
    chain.is_incomplete = True
    request = parse(chain, capacity=CAPACITY)
    assert request.status == Status.IOERR
    assert (request.type, request.length, list(request.data)) == (-1, 0, [])
    assert request.complete(Status.IOERR) == 1


def test_chain_whose_end_is_not_in_memory_breaks_the_queue() -> None:
    chain = chain_of(IN, room=512)
    chain.lacks(chain.writable)
    with pytest.raises(GuestError) as caught:
        parse(chain, capacity=CAPACITY)
    assert caught.value.reason == Broken.ADDRESS


@pytest.mark.parametrize("length", [0, 1, 15])
def test_short_header_is_completed_with_an_error(length: int) -> None:
    readable = [memoryview(bytes(length))] if length else []
    chain = DescriptorChain(3, readable, [memoryview(bytearray(1))])
    request = parse(chain, capacity=CAPACITY)
    assert (request.head, request.status, request.type) == (3, Status.IOERR, -1)


@pytest.mark.parametrize("kind", [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 16, 1 << 31, 2**32 - 1])
def test_type_that_is_not_implemented_is_unsupported(kind: int) -> None:
    assert parsed(kind, room=512).status == Status.UNSUPP


@pytest.mark.parametrize("kind", [OUT, DISCARD, WRITE_ZEROES])
def test_request_that_modifies_a_read_only_device_fails(kind: int) -> None:
    assert parsed(kind, out=bytes(512), read_only=True).status == Status.IOERR


@pytest.mark.parametrize("kind", [IN, FLUSH, GET_ID])
def test_request_that_modifies_nothing_is_fine_on_a_read_only_device(kind: int) -> None:
    assert parsed(kind, room=512, read_only=True).status is None


@pytest.mark.parametrize("length", [1, 511, 513])
def test_transfer_of_no_whole_sectors_fails(length: int) -> None:
    assert parsed(IN, room=length).status == Status.IOERR
    assert parsed(OUT, out=bytes(length)).status == Status.IOERR


@pytest.mark.parametrize("kind", [IN, OUT])
@pytest.mark.parametrize(
    ("sector", "fits"),
    [
        (SECTORS - 1, True),
        (SECTORS, False),
        (2**64 - 1, False),
        (2**55, False),
        (2**55 - 1, False),
        (2**63, False),
    ],
)
def test_transfer_must_end_within_the_capacity(kind: int, sector: int, fits: bool) -> None:
    request = parsed(kind, sector, bytes(512 * (kind == OUT)), 512 * (kind == IN))
    assert request.status == (None if fits else Status.IOERR)


@pytest.mark.parametrize(("length", "fits"), [(2147483136, True), (2147483648, False)])
@pytest.mark.parametrize("kind", [IN, OUT])
def test_transfer_of_2_gib_fails(kind: int, length: int, fits: bool) -> None:
    mib = memoryview(bytearray(1 << 20))
    data = [mib] * (length >> 20) + [mib[: length % (1 << 20)]] * (length % (1 << 20) > 0)
    header, status = pieces(HEADER.pack(kind, 0, 0), []), pieces(bytes(1), [])
    chain = (
        DescriptorChain(7, header, [*data, *status])
        if kind == IN
        else DescriptorChain(7, [*header, *data], status)
    )

    request = parse(chain, capacity=1 << 40)

    assert request.length == length
    assert request.status == (None if fits else Status.IOERR)


def test_transfer_of_nothing_is_fine_up_to_the_end() -> None:
    assert parsed(IN, SECTORS).status is None
    assert parsed(OUT, SECTORS + 1).status == Status.IOERR


def test_flush_ignores_sector_and_data() -> None:
    request = parsed(FLUSH, 2**64 - 1, bytes(3), 5)
    assert (request.status, len(request.data)) == (None, 0)


@pytest.mark.parametrize("room", [0, 1, 20, 21])
def test_get_id_takes_any_room(room: int) -> None:
    request = parsed(GET_ID, room=room)
    assert (request.status, request.length) == (None, room)


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize("length", [0, 1, 15, 17, 8 * 16 + 8])
def test_segments_of_a_wrong_size_fail(kind: int, length: int) -> None:
    assert parsed(kind, out=bytes(length)).status == Status.IOERR


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
def test_more_segments_than_offered_are_unsupported(kind: int) -> None:
    out = segments(*[(0, 1, 0)] * 3)
    assert parsed(kind, out=out, max_segments=3).status is None
    assert parsed(kind, out=out, max_segments=2).status == Status.UNSUPP
    assert parsed(kind, out=out, max_segments=0).status == Status.UNSUPP


@pytest.mark.parametrize(
    ("kind", "flags", "status"),
    [
        (DISCARD, 0, None),
        (DISCARD, 1, Status.UNSUPP),
        (DISCARD, 2, Status.UNSUPP),
        (WRITE_ZEROES, 0, None),
        (WRITE_ZEROES, 1, None),
        (WRITE_ZEROES, 2, Status.UNSUPP),
        (WRITE_ZEROES, 1 << 31, Status.UNSUPP),
    ],
)
def test_flags_of_a_segment(kind: int, flags: int, status: Status | None) -> None:
    request = parsed(kind, out=segments((0, 1, 0), (1, 1, flags)))
    assert request.status == status
    assert len(request.segments) == (2 if status is None else 0), "all or nothing"


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize(
    ("sector", "count", "fits"),
    [
        (0, SECTORS, True),
        (SECTORS, 0, True),
        (SECTORS, 1, False),
        (0, SECTORS + 1, False),
        (2**64 - 1, 1, False),
        (2**64 - 1, 2**32 - 1, False),
        (1, 2**32 - 1, False),
    ],
)
def test_segments_must_end_within_the_capacity(
    kind: int, sector: int, count: int, fits: bool
) -> None:
    request = parsed(kind, out=segments((0, 1, 0), (sector, count, 0)))
    assert request.status == (None if fits else Status.IOERR)


def test_segments_are_read_once() -> None:
    """The driver changes the segment after the check; the request does not notice."""
    chain = chain_of(DISCARD, 0, segments((1, 1, 0)))
    request = parse(chain, capacity=CAPACITY)
    chain.readable[1][:] = SEGMENT.pack(2**63, 2**31, 7)
    assert request.segments == [Segment(512, 512, False)]


@pytest.mark.parametrize(
    ("status", "used"), [(Status.OK, 513), (Status.IOERR, 1), (Status.UNSUPP, 1)]
)
def test_used_length_vouches_for_data_only_after_success(status: Status, used: int) -> None:
    request = parsed(IN, room=512)
    assert request.complete(status, 512) == used
    assert request.status_byte[0] == status
