"""The maps that the engine marks come and go, and no mark is lost: `write_record.py` with an engine that is played."""

from __future__ import annotations

import errno

import pytest

from vhostblk import native
from vhostblk.block.extent import ExtentFlag, HostExtent, PastWrites
from vhostblk.errors import BlockError
from vhostblk.export.write_record import WriteRecord
from vhostblk.testing.plugin import ExpectedLog


class Map:
    """Stands in for `native.DirtyMap`."""

    def __init__(self, length: int, granularity: int) -> None:
        self.length = length
        self.granularity = granularity
        self.marks: list[tuple[int, int]] = []
        self.is_gone = False

    def take(self) -> list[tuple[int, int]]:
        assert not self.is_gone
        taken, self.marks = self.marks, []
        return taken


class Disk:
    """Stands in for `native.Disk`."""

    def __init__(self) -> None:
        self.write_gen = 0
        self.highest = 0
        self.map: Map | None = None

    def set_dirty_map(self, dirty: Map | None) -> None:
        self.map = dirty

    def take_highest_write(self) -> int:
        highest, self.highest = self.highest, 0
        return highest


def extent(record: int, flags: ExtentFlag = ExtentFlag.WRITE) -> HostExtent:
    return HostExtent(0, 4096, 7, 0, flags, record=record)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setattr(native, "DirtyMap", Map)
    return Disk()


@pytest.fixture
def record(disk: Disk) -> WriteRecord:
    return WriteRecord(disk, 1 << 20)  # type: ignore[arg-type]


def current(disk: Disk) -> Map:
    assert disk.map is not None
    return disk.map


def test_nothing_is_marked_until_somebody_wants_to_know(disk: Disk, record: WriteRecord) -> None:
    record.prepare([extent(0), extent(4096, ExtentFlag.READ)])
    assert disk.map is None
    record.prepare([extent(0), extent(8192), extent(4096)])
    assert (current(disk).granularity, current(disk).length) == (4096, 1 << 20)


def test_map_that_is_fine_enough_stays(disk: Disk, record: WriteRecord) -> None:
    record.prepare([extent(4096)])
    first = current(disk)
    record.prepare([extent(8192)])
    assert current(disk) is first
    record.prepare([extent(512)])
    assert current(disk).granularity == 512


def test_old_map_is_looked_at_as_long_as_a_thread_may_mark_it(
    disk: Disk, record: WriteRecord
) -> None:
    record.prepare([extent(4096)])
    old = current(disk)
    old.marks.append((0, 4096))
    record.prepare([extent(512)])
    assert list(record.take(True).ranges) == [(0, 4096)]
    old.marks.append((4096, 4096))  # by a thread that has not noticed
    current(disk).marks.append((8192, 512))
    assert list(record.take(True).ranges) == [(4096, 4096), (8192, 512)]
    with record.revocation(False):
        old.marks.append((0, 4096))
    assert list(record.take(True).ranges) == [(0, 4096)]
    old.is_gone = True
    assert not record.take(True).ranges


def test_thread_that_notices_during_the_revocation_only_may_mark_until_its_end(
    disk: Disk, record: WriteRecord
) -> None:
    record.prepare([extent(4096)])
    old = current(disk)
    with record.revocation(False):
        record.prepare([extent(512)])  # its message is not among those that are answered
    record.take(True)
    old.marks.append((0, 4096))
    assert list(record.take(True).ranges) == [(0, 4096)]


def test_longer_disk_has_a_longer_map_before_the_engine_is_told(
    disk: Disk, record: WriteRecord
) -> None:
    assert record.set_length(2 << 20)
    record.prepare([extent(4096)])
    first = current(disk)
    assert first.length == 2 << 20
    assert record.set_length(1 << 20)
    assert current(disk) is first
    assert record.set_length(3 << 20)
    assert (current(disk).length, current(disk).granularity) == (3 << 20, 4096)


def test_no_map_is_marked_after_all_extents_were_revoked(disk: Disk, record: WriteRecord) -> None:
    record.prepare([extent(4096)])
    with record.revocation(True):
        current(disk).marks.append((0, 4096))  # in flight until then
    assert disk.map is None
    assert list(record.take(True).ranges) == [(0, 4096)]


def test_extent_that_is_mapped_during_a_revocation_keeps_its_map(
    disk: Disk, record: WriteRecord
) -> None:
    record.prepare([extent(4096)])
    with record.revocation(True):
        record.prepare([extent(4096)])
    assert disk.map is not None


def test_numbers_are_told_once_and_places_when_asked_for(disk: Disk, record: WriteRecord) -> None:
    record.prepare([extent(4096)])
    disk.write_gen, disk.highest = 3, 8192
    current(disk).marks.append((0, 4096))
    assert record.take(False) == PastWrites(3, 8192, ())
    assert record.take(True) == PastWrites(0, 0, [(0, 4096)])
    disk.write_gen, disk.highest = 5, 512
    assert record.take(False) == PastWrites(2, 512, ())


def test_without_memory_nothing_is_mapped_and_nothing_grows(
    disk: Disk, record: WriteRecord, monkeypatch: pytest.MonkeyPatch, expect_log: ExpectedLog
) -> None:
    """Served by the block layer, slowly, rather than unseen."""
    expect_log.expect("what is new of the disk cannot be used")

    def full(length: int, granularity: int) -> Map:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    record.prepare([extent(4096)])
    before = disk.map
    monkeypatch.setattr(native, "DirtyMap", full)
    with pytest.raises(BlockError) as caught:
        record.prepare([extent(512)])
    assert caught.value.errno == errno.ENOMEM
    assert not record.set_length(2 << 20)
    assert disk.map is before
