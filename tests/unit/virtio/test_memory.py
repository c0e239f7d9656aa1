"""Bounds of guest memory, and that the fences come back."""

from __future__ import annotations

import pytest

from vhostblk.errors import GuestError
from vhostblk.virtio.memory import Fence, FlatMemory, ring_words


@pytest.fixture
def memory() -> FlatMemory:
    return FlatMemory(0x1000, bytearray(range(256)))


def test_view_is_writable_memory_and_not_a_copy(memory: FlatMemory) -> None:
    (view,) = memory.view(0x1010, 4)
    view[0] = 0xFF
    assert bytes(memory.view(0x1010, 4)[0]) == b"\xff\x11\x12\x13"


def test_view_reaches_exactly_to_the_end(memory: FlatMemory) -> None:
    assert len(memory.view(0x1000, 256)[0]) == 256


@pytest.mark.parametrize(
    ("gpa", "length"),
    [(0xFFF, 1), (0x1100, 1), (0x10FF, 2), (0, 0x1001), (2**64 - 1, 2), (0x1000, 2**32)],
)
def test_view_of_anything_outside_is_a_guest_error(
    memory: FlatMemory, gpa: int, length: int
) -> None:
    with pytest.raises(GuestError):
        memory.view(gpa, length)


def test_ring_words_are_little_endian() -> None:
    assert list(ring_words(memoryview(b"\x01\x00\x00\x02"))) == [1, 512]


def test_fences_return_however_often_they_are_used() -> None:
    fence = Fence()
    for _ in range(3):
        fence.full()
        fence.weak()
