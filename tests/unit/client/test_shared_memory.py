"""Regions, the allocator over them, and that nothing is left behind."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.left_behind import left_behind
from tests.schedule import HUNT
from vhostblk.client.shared_memory import Kind, SharedMemory
from vhostblk.errors import StateError
from vhostblk.virtio.driver import Buffer

PAGE = 4096
KINDS: list[Kind] = ["memfd", "posix"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("one_file", [False, True])
def test_another_mapping_of_the_described_file_sees_the_same_bytes(
    kind: Kind, one_file: bool
) -> None:
    memory = SharedMemory([PAGE, 2 * PAGE], kind=kind, one_file=one_file)
    try:
        for number, region in enumerate(memory.regions):
            memory.write(region.gpa + 5, b"region %d" % number)
        for number, region in enumerate(memory.regions):
            described = region.description
            found = os.pread(region.fd, 8, described.mmap_offset + 5)
            assert found == b"region %d" % number
            assert (described.gpa, described.size) == (region.gpa, region.size)
    finally:
        memory.close()


@pytest.mark.parametrize("kind", KINDS)
def test_close_leaves_no_fd_no_mapping_and_no_name(kind: Kind) -> None:
    before = left_behind()
    memory = SharedMemory([PAGE, PAGE], kind=kind)
    fds, mappings, names = left_behind()
    assert fds > before[0]
    assert mappings == before[1] + 2
    assert names == before[2], "the name is gone while the memory is in use"
    memory.close()
    memory.close()
    assert left_behind() == before


def test_addresses_of_guest_and_front_end_differ() -> None:
    memory = SharedMemory([PAGE, PAGE])
    try:
        uvas = [memory.uva(region.gpa + 7) for region in memory.regions]
        assert uvas == [region.uva + 7 for region in memory.regions]
        assert not {region.gpa for region in memory.regions} & {r.uva for r in memory.regions}
        with pytest.raises(StateError):
            memory.uva(memory.regions[0].end)
    finally:
        memory.close()


@pytest.mark.parametrize("size", [0, -PAGE, PAGE + 1])
def test_region_must_be_a_number_of_pages(size: int) -> None:
    before = left_behind()
    with pytest.raises(StateError):
        SharedMemory([size])
    assert left_behind() == before


def test_buffer_may_lie_in_two_adjacent_regions_unless_it_must_not() -> None:
    memory = SharedMemory([PAGE, PAGE], gap=0)
    try:
        memory.allocate(PAGE - 16)
        crossing = memory.allocate(64)
        assert len(memory.views(crossing)) == 2
        memory.write(crossing.gpa, bytes(range(64)))
        assert memory.read(crossing) == bytes(range(64))
        memory.free(crossing)
        whole = memory.allocate(64, contiguous=True)
        assert len(memory.views(whole)) == 1
    finally:
        memory.close()


def test_region_with_buffers_in_it_is_not_removed() -> None:
    memory = SharedMemory([PAGE])
    try:
        region = memory.add_region(PAGE)
        first = memory.allocate(PAGE, alignment=PAGE)
        second = memory.allocate(PAGE, alignment=PAGE)
        with pytest.raises(StateError):
            memory.remove_region(region)
        memory.free(second)
        memory.remove_region(region)
        with pytest.raises(StateError):
            memory.allocate(1)
        memory.free(first)
        assert memory.allocate(PAGE) == first
    finally:
        memory.close()


def test_truncated_region_keeps_its_mapping_and_can_be_closed() -> None:
    memory = SharedMemory([PAGE, PAGE])
    region = memory.regions[1]
    region.truncate(0)
    assert os.fstat(region.fd).st_size == 0
    assert len(region.view) == region.size
    memory.write(memory.regions[0].gpa, b"the other file is whole")
    memory.close()


def test_spread_uses_every_region() -> None:
    memory = SharedMemory([4 * PAGE] * 3, spread=True)
    try:
        used = set()
        for _ in range(12):
            buffer = memory.allocate(PAGE, alignment=PAGE)
            used.add(memory.region_of(buffer.gpa).gpa)
            memory.free(buffer)
        assert len(used) == 3
    finally:
        memory.close()


@settings(max_examples=50 * HUNT)
@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.integers(1, 2 * PAGE),
            st.sampled_from([1, 16, 512, PAGE]),
            st.booleans(),
        ),
        max_size=40,
    ),
    st.booleans(),
    st.sampled_from([0, PAGE]),
)
def test_allocations_never_overlap_and_all_room_comes_back(
    steps: list[tuple[bool, int, int, bool]], spread: bool, gap: int
) -> None:
    memory = SharedMemory([4 * PAGE, 4 * PAGE], gap=gap, spread=spread)
    try:
        held: list[Buffer] = []
        for release, length, alignment, contiguous in steps:
            if release and held:
                memory.free(held.pop(len(held) // 2))
                continue
            try:
                buffer = memory.allocate(length, alignment=alignment, contiguous=contiguous)
            except StateError:
                continue
            assert buffer.gpa % alignment == 0
            assert len(memory.views(buffer)) == 1 or not contiguous
            assert all(
                buffer.gpa + length <= other.gpa or other.gpa + other.length <= buffer.gpa
                for other in held
            )
            held.append(buffer)
        for buffer in held:
            memory.free(buffer)
        for region in memory.regions:
            assert memory.allocate(4 * PAGE, contiguous=True).gpa == region.gpa or spread
    finally:
        memory.close()
