"""Lists of buffers: sums, copies, slices, each against the joined bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vhostblk.virtio.chain import copy_from, copy_to, slice_views, total

pieces = st.lists(st.binary(min_size=1, max_size=9), max_size=6)


def views_of(parts: list[bytes]) -> list[memoryview]:
    return [memoryview(bytearray(part)) for part in parts]


@given(pieces)
def test_total_is_the_sum(parts: list[bytes]) -> None:
    assert total(views_of(parts)) == len(b"".join(parts))


@given(pieces, st.integers(0, 60))
def test_copy_from_gives_the_first_bytes_in_any_framing(parts: list[bytes], length: int) -> None:
    assert copy_from(views_of(parts), length) == b"".join(parts)[:length]


@given(pieces, st.integers(0, 60), st.integers(0, 60))
def test_slice_views_is_a_slice_of_the_joined_bytes(
    parts: list[bytes], offset: int, length: int
) -> None:
    sliced = slice_views(views_of(parts), offset, length)
    assert b"".join(sliced) == b"".join(parts)[offset : offset + length]
    assert all(len(view) for view in sliced)


@given(pieces, st.binary(max_size=60))
def test_copy_to_fills_the_start_and_leaves_the_rest(parts: list[bytes], data: bytes) -> None:
    views = views_of(parts)
    before = b"".join(parts)
    fitting = data[: len(before)]
    assert copy_to(views, data) == len(fitting)
    assert b"".join(views) == fitting + before[len(fitting) :]
