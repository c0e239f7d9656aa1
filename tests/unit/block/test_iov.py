"""Vectors: slicing, copying, addresses."""

from __future__ import annotations

import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostblk import native
from vhostblk.block.iov import IoVec, address_of, concat

pieces = st.lists(st.binary(max_size=9), max_size=6)


@given(pieces, st.data())
def test_slice_is_the_slice_of_the_joined_bytes(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    iov = IoVec.of(*parts)
    offset = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, len(whole) - offset))
    part = iov.slice(offset, length)
    assert part.tobytes() == whole[offset : offset + length]
    assert part.length == length


@given(pieces, st.data())
def test_copy_from_changes_exactly_its_range(parts: list[bytes], data: st.DataObject) -> None:
    buffers = [bytearray(part) for part in parts]
    expected = bytearray(b"".join(parts))
    offset = data.draw(st.integers(0, len(expected)))
    content = data.draw(st.binary(max_size=len(expected) - offset))
    IoVec.of(*buffers).copy_from(content, offset)
    expected[offset : offset + len(content)] = content
    assert b"".join(buffers) == expected


@given(pieces, st.data())
def test_copy_to_reads_its_range(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    offset = data.draw(st.integers(0, len(whole)))
    target = bytearray(data.draw(st.integers(0, len(whole) - offset)))
    IoVec.of(*parts).copy_to(memoryview(target), offset)
    assert target == whole[offset : offset + len(target)]


def test_zero_reaches_over_elements_and_is_not_limited_by_its_source() -> None:
    first, second = bytearray(b"\xff" * 70_000), bytearray(b"\xff" * 70_000)
    IoVec.of(first, second).zero(1, 139_998)
    assert first == b"\xff" + bytes(69_999)
    assert second == bytes(69_999) + b"\xff"


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 5), (4, 1), (0, -1)])
def test_slice_refuses_what_is_outside(offset: int, length: int) -> None:
    with pytest.raises(ValueError, match="vector of 4"):
        IoVec.of(b"ab", b"cd").slice(offset, length)


@pytest.mark.parametrize("engine", [True, False])
def test_address_of_read_only_and_writable_buffers_differs_by_their_distance(
    engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine and not native.available:
        pytest.skip("the engine is not built")
    monkeypatch.setattr(native, "available", engine)
    for buffer in (bytes(100), bytearray(100), mmap.mmap(-1, 4096)):
        view = memoryview(buffer)
        assert address_of(view[7:]) - address_of(view) == 7
    assert address_of(mmap.mmap(-1, 4096)) % 4096 == 0


def test_alignment_needs_every_address_and_every_length() -> None:
    page = memoryview(mmap.mmap(-1, 8192))
    assert IoVec([page[:512], page[4096:]]).is_aligned(512)
    assert not IoVec([page[:512], page[100:612]]).is_aligned(512)
    assert not IoVec([page[:500], page[512:1024]]).is_aligned(512)
    assert IoVec([page[:500], page[511:]]).is_aligned(1)


def test_concat_leaves_empty_elements_out() -> None:
    joined = concat((IoVec.of(b""), IoVec.of(b"a", b""), IoVec.of(b"b")))
    assert [bytes(view) for view in joined.views] == [b"a", b"b"]
