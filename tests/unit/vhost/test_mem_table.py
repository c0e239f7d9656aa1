"""Guest memory: what can be mapped, who sees it where, and that it goes away again."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterator

import pytest

from tests.unit.vhost.resources import mappings, nothing_left
from vhostblk.errors import GuestError, PeerError
from vhostblk.vhost.mem_table import MemTable
from vhostblk.vhost.payload import MemoryRegion

PAGE = mmap.PAGESIZE
NAME = "vhostblk-test-memory"
UVA = 0x7F00_0000_0000


def address_of(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@pytest.fixture
def memory() -> Iterator[int]:
    """A file of 16 pages; nothing of it may be left mapped or open."""
    with nothing_left():
        fd = os.memfd_create(NAME)
        os.ftruncate(fd, 16 * PAGE)
        yield fd
        os.close(fd)
        assert mappings(NAME) == 0


@pytest.fixture
def empty() -> MemTable:
    return MemTable(address_of, 4)


def region(page: int, pages: int = 1, *, gpa: int | None = None, offset: int = 0) -> MemoryRegion:
    """A region at a guest page, shown by the front-end 4 GiB further up than UVA."""
    start = page * PAGE if gpa is None else gpa
    return MemoryRegion(gpa=start, size=pages * PAGE, uva=UVA + start, mmap_offset=offset)


def test_memory_is_seen_by_gpa_and_by_uva(memory: int, empty: MemTable) -> None:
    os.pwrite(memory, b"hello", 3 * PAGE + 5)
    table = empty.replaced([region(100, 4, offset=2 * PAGE)], [memory])
    (view,) = table.view(101 * PAGE + 5, 5)
    assert bytes(view) == b"hello"
    ring = table.ring(UVA + 101 * PAGE, 16)
    ring[0:2] = b"\xaa\xbb"
    assert os.pread(memory, 2, 3 * PAGE) == b"\xaa\xbb"
    view.release()
    ring.release()
    table.close()


def test_address_of_a_region_is_where_its_first_byte_is(memory: int, empty: MemTable) -> None:
    # Not even the offset has to be a multiple of the page size.
    os.pwrite(memory, b"first", PAGE + 0x123)
    table = empty.replaced([MemoryRegion(0, PAGE, UVA, PAGE + 0x123)], [memory])
    assert ctypes.string_at(table.regions[0].hva, 5) == b"first"
    assert bytes(table.view(0, 5)[0]) == b"first"
    assert bytes(table.view(PAGE - 1, 1)[0]) == b"\0"
    table.close()


def test_view_across_the_border_of_two_regions_has_two_parts(memory: int, empty: MemTable) -> None:
    os.pwrite(memory, b"ab", PAGE - 2)
    os.pwrite(memory, b"cd", 8 * PAGE)
    table = empty.replaced([region(1, offset=8 * PAGE), region(0)], [memory, memory])
    assert [bytes(view) for view in table.view(PAGE - 2, 4)] == [b"ab", b"cd"]
    assert [r.gpa for r in table.regions] == [0, PAGE]
    with pytest.raises(GuestError):
        table.ring(UVA + PAGE - 2, 4)
    table.close()


@pytest.mark.parametrize(
    ("gpa", "length"),
    [
        (0, 1),
        (PAGE - 1, 2),
        (PAGE, PAGE + 1),
        (2 * PAGE, 1),
        (2 * PAGE - 1, 4),
        (3 * PAGE, PAGE + 1),
        (2**64 - 1, 1),
        (2**64 - 1, 2**32 - 1),
        (PAGE, 2**64),
    ],
)
def test_anything_outside_guest_memory_is_the_guest_s_error(
    memory: int, empty: MemTable, gpa: int, length: int
) -> None:
    table = empty.replaced([region(1), region(3)], [memory, memory])
    with pytest.raises(GuestError):
        table.view(gpa, length)
    with pytest.raises(GuestError):
        table.ring(UVA + gpa, length)
    table.close()


def test_regions_may_show_the_same_memory_twice(memory: int, empty: MemTable) -> None:
    alias = MemoryRegion(gpa=0x100000, size=PAGE, uva=UVA, mmap_offset=0)
    table = empty.replaced([region(0), alias], [memory, memory])
    table.view(0, 1)[0][0] = 7
    assert table.view(0x100000, 1)[0][0] == 7
    assert table.ring(UVA, 1)[0] == 7
    table.close()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (MemoryRegion(0, 0, UVA, 0), "empty"),
        (MemoryRegion(2**64 - PAGE, PAGE, UVA, 0), "wraps"),
        (MemoryRegion(2**64 - 1, 2 * PAGE, UVA, 0), "wraps"),
        (MemoryRegion(0, PAGE, 2**64 - 1, 0), "wraps"),
        (MemoryRegion(0, 2**64 - 1, UVA, 0), "wraps"),
        (MemoryRegion(0, 17 * PAGE, UVA, 0), "the file has"),
        (MemoryRegion(0, PAGE, UVA, 16 * PAGE), "the file has"),
        (MemoryRegion(0, PAGE, UVA, 15 * PAGE + 1), "the file has"),
        (MemoryRegion(0, PAGE, UVA, 2**64 - 1), "the file has"),
        (MemoryRegion(0, 2**63, 0, 2**63), "the file has"),
    ],
)
def test_impossible_regions_are_refused_and_nothing_stays_mapped(
    memory: int, empty: MemTable, bad: MemoryRegion, reason: str
) -> None:
    with pytest.raises(PeerError, match=reason):
        empty.replaced([region(0, gpa=2**63 + 2**20), bad], [memory, memory])
    assert mappings(NAME) == 0


@pytest.mark.parametrize("start", [0, PAGE - 1, PAGE, 2 * PAGE, 3 * PAGE - 1])
def test_regions_that_overlap_in_gpa_are_refused(memory: int, empty: MemTable, start: int) -> None:
    table = empty.replaced([region(1, 2)], [memory])
    with pytest.raises(PeerError, match="overlap"):
        table.added(region(0, 2, gpa=start), memory)
    with pytest.raises(PeerError, match="overlap"):
        empty.replaced([region(0, 2, gpa=start), region(1, 2)], [memory, memory])
    table.close()


def test_more_regions_than_slots_are_refused(memory: int, empty: MemTable) -> None:
    table = empty.replaced([region(page) for page in range(4)], [memory] * 4)
    with pytest.raises(PeerError, match="5 regions, 4 slots"):
        table.added(region(9), memory)
    with pytest.raises(PeerError, match="5 regions, 4 slots"):
        table.replaced([region(page) for page in range(5)], [memory] * 5)
    table.close()


def test_fewer_fds_than_regions_are_refused(memory: int, empty: MemTable) -> None:
    with pytest.raises(PeerError, match="2 regions, 1 fds"):
        empty.replaced([region(0), region(1)], [memory])


def test_only_files_can_be_memory(empty: MemTable) -> None:
    with nothing_left():
        reader, writer = os.pipe()
        for fd in (reader, writer):
            with pytest.raises(PeerError, match="not a file"):
                empty.added(region(0), fd)
            os.close(fd)
        with pytest.raises(PeerError, match="cannot map"):
            empty.added(region(0), reader)


def test_file_that_may_not_be_written_is_refused(memory: int, empty: MemTable) -> None:
    fd = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
    with pytest.raises(PeerError, match="cannot map"):
        empty.added(region(0), fd)
    os.close(fd)


def test_sealed_file_is_refused(empty: MemTable) -> None:
    fd = os.memfd_create(NAME, os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with pytest.raises(PeerError, match="cannot map"):
        empty.added(region(0), fd)
    os.close(fd)


def test_region_larger_than_the_address_space_is_refused(empty: MemTable) -> None:
    fd = os.memfd_create(NAME)
    os.ftruncate(fd, 2**62)
    with pytest.raises(PeerError, match="cannot map"):
        empty.added(MemoryRegion(0, 2**62, UVA, 0), fd)
    os.close(fd)


def test_fd_is_not_needed_once_it_is_mapped(empty: MemTable) -> None:
    fd = os.memfd_create(NAME)
    os.ftruncate(fd, PAGE)
    table = empty.added(region(0), fd)
    os.close(fd)
    table.view(0, 1)[0][0] = 9
    assert table.ring(UVA, 1)[0] == 9
    table.close()
    assert mappings(NAME) == 0


def test_regions_that_stay_are_the_same_object_and_the_same_mapping(
    memory: int, empty: MemTable
) -> None:
    first = empty.added(region(0), memory)
    second = first.added(region(5), memory)
    assert second.regions[0] is first.regions[0]
    assert mappings(NAME) == 2
    first.close()
    assert mappings(NAME) == 2
    third = second.removed(region(0))
    second.close()
    second.close()
    assert mappings(NAME) == 1
    assert third.regions == (second.regions[1],)
    third.close()
    assert mappings(NAME) == 0


def test_region_is_removed_by_gpa_uva_and_size_whatever_its_offset(
    memory: int, empty: MemTable
) -> None:
    table = empty.added(region(0, 2), memory)
    for wrong in (region(1, 2), region(0, 1), MemoryRegion(0, 2 * PAGE, UVA + 1, 0)):
        with pytest.raises(PeerError, match="is not mapped"):
            table.removed(wrong)
    assert table.removed(region(0, 2, offset=12345)).regions == ()
    table.close()


def test_old_table_still_works_after_a_new_one_was_made(memory: int, empty: MemTable) -> None:
    old = empty.added(region(0), memory)
    new = old.replaced([region(7)], [memory])
    assert old.view(0, 1)
    assert new.view(7 * PAGE, 1)
    with pytest.raises(GuestError):
        new.view(0, 1)
    old.close()
    new.close()


def test_views_that_are_left_keep_the_mapping_until_they_go(memory: int, empty: MemTable) -> None:
    table = empty.added(region(0), memory)
    (view,) = table.view(0, 8)
    table.close()
    view[0] = 5
    assert mappings(NAME) == 1
    del view
    assert mappings(NAME) == 0
    assert os.pread(memory, 1, 0) == b"\5"


def test_region_in_a_file_of_huge_blocks_is_mapped_from_the_start_of_its_block(
    memory: int, empty: MemTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on hugetlbfs, whose block size is that of its pages, here eight of ours.
    os.pwrite(memory, b"huge", 11 * PAGE)
    asked: list[tuple[int, int]] = []
    real_fstat, real_mmap = os.fstat, mmap.mmap

    def fstat(fd: int) -> os.stat_result:
        status = real_fstat(fd)
        return os.stat_result(status[:10], {"st_blksize": 8 * PAGE})

    def spy(fd: int, length: int, flags: int, protection: int, *, offset: int) -> mmap.mmap:
        asked.append((offset, length))
        return real_mmap(fd, length, flags, protection, offset=offset)

    monkeypatch.setattr(os, "fstat", fstat)
    monkeypatch.setattr("vhostblk.vhost.shared_file._NO_FD", {})
    monkeypatch.setattr(mmap, "mmap", spy)
    table = empty.added(region(0, 2, offset=11 * PAGE), memory)
    assert asked == [(8 * PAGE, 8 * PAGE)]
    assert bytes(table.view(0, 4)[0]) == b"huge"
    table.close()
