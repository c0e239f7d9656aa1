"""Statistics pages: made, read, left over, replaced; and what happens without shared memory."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostblk.export import stats_page, stats_reader
from vhostblk.export.statistics import QueueCounters
from vhostblk.export.stats_layout import PageError, PageHeader, header_offset
from vhostblk.export.stats_page import StatsPage, StatsPages, remove_if_stale, remove_stale
from vhostblk.testing.plugin import ExpectedLog

SHM = Path("/dev/shm")


@pytest.fixture
def page() -> Iterator[StatsPage]:
    page = StatsPage.shared("unit", 4, is_native=False)
    yield page
    page.close()


@pytest.fixture
def leftovers() -> Iterator[list[str]]:
    """Names of files to remove at the end."""
    names: list[str] = []
    yield names
    for name in names:
        (SHM / name).unlink(missing_ok=True)


def dead_pid() -> int:
    """The number of a process that was."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def plant(name: str, content: bytes) -> str:
    (SHM / name).write_bytes(content)
    return name


# ---------------------------------------------------------------- writing and reading


def test_a_reader_sees_what_is_counted_while_it_is_counted(page: StatsPage) -> None:
    counters = QueueCounters(page.queue(2))
    counters.finished("read", 4096, False, 1000, counters.began())
    copy = stats_reader.read_page(page.name)
    assert copy.is_alive
    assert not copy.is_native
    assert not copy.is_partial
    assert (copy.header.export, copy.header.pid, copy.header.queues) == ("unit", os.getpid(), 4)
    # The queues below one that started are there, and have counted nothing.
    assert [queue.requests for queue in copy.queues.values()] == [0, 0, 1]
    assert copy.queues[2].operations["read"].bytes == 4096
    counters.began()
    assert stats_reader.read_page(page.name).queues[2].in_flight == 1
    assert page.read()[2] == stats_reader.read_page(page.name).queues[2]


def test_front_ends_are_counted(page: StatsPage) -> None:
    page.front_end_came()
    page.front_end_left()
    page.front_end_came()
    header = stats_reader.read_page(page.name).header
    assert (header.sessions, header.connected) == (2, 1)


def test_a_queue_has_the_same_counters_every_time(page: StatsPage) -> None:
    page.queue(0)[5] = 9
    page.queue(1)
    assert page.queue(0)[5] == 9


def test_only_its_user_may_read_a_page(page: StatsPage) -> None:
    assert stat.S_IMODE((SHM / page.name).stat().st_mode) == 0o600


def test_a_page_takes_memory_only_for_queues_that_started() -> None:
    page = StatsPage.shared("unit", 256, is_native=True)
    try:
        path = SHM / page.name
        assert path.stat().st_size > 2 << 20
        assert path.stat().st_blocks * 512 <= 4096
        page.queue(0)
        # And readers do not make it more.
        stats_reader.read_page(page.name)
        assert path.stat().st_blocks * 512 <= 4 * 4096
    finally:
        page.close()


def test_a_page_vanishes_when_it_is_closed(page: StatsPage) -> None:
    name = page.name
    words = page.queue(0)
    assert name in stats_reader.page_names()
    page.close()
    assert name not in stats_reader.page_names()
    with pytest.raises(FileNotFoundError):
        stats_reader.read_page(name)
    with pytest.raises(ValueError, match="released"):
        words[0] = 1


@pytest.mark.parametrize("export", ["a/b", "x" * 300, "", "ü\n", "../../etc/passwd"])
def test_an_export_may_have_any_name(export: str) -> None:
    page = StatsPage.shared(export, 1, is_native=False)
    try:
        assert (SHM / page.name).is_file()
        assert stats_reader.pid_in(page.name) == os.getpid()
        assert stats_reader.read_page(page.name).header.pid == os.getpid()
    finally:
        page.close()


def test_exports_of_the_same_name_in_one_process_have_pages_of_their_own() -> None:
    pages = [StatsPage.shared("same", 1, is_native=False) for _ in range(3)]
    try:
        assert len({page.name for page in pages}) == 3
        for number, page in enumerate(pages):
            page.queue(0)[0] = number
        found = [stats_reader.read_page(page.name) for page in pages]
        assert [copy.queues[0].operations["read"].requests for copy in found] == [0, 1, 2]
        assert all(copy.header.export == "same" for copy in found)
    finally:
        for page in pages:
            page.close()


def test_readers_need_neither_the_engine_nor_posix_ipc() -> None:
    code = (
        "import sys, vhostblk.export.stats_reader\n"
        "print([name for name in sys.modules if 'native' in name or name == 'posix_ipc'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---------------------------------------------------------------- what others have put there


def test_a_page_that_is_cut_short_is_refused(page: StatsPage, leftovers: list[str]) -> None:
    page.queue(1)
    raw = (SHM / page.name).read_bytes()
    leftovers.append(plant(f"vhostblk-{os.getpid()}-cut", raw[:12000]))
    with pytest.raises(PageError, match="ends before"):
        stats_reader.read_page(leftovers[0])


def test_links_and_pipes_are_not_followed_nor_waited_for(
    page: StatsPage, leftovers: list[str]
) -> None:
    pid = os.getpid()
    leftovers += [f"vhostblk-{pid}-link", f"vhostblk-{pid}-fifo", f"vhostblk-{pid}-folder"]
    (SHM / leftovers[0]).symlink_to(SHM / page.name)
    os.mkfifo(SHM / leftovers[1])
    with pytest.raises(OSError, match="symbolic links"):
        stats_reader.read_page(leftovers[0])
    with pytest.raises(PageError, match="not a file"):
        stats_reader.read_page(leftovers[1])
    remove_stale()
    assert os.path.lexists(SHM / leftovers[0])


# ---------------------------------------------------------------- left over


def test_a_page_without_its_daemon_is_known_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where no other daemon removes it first.
    monkeypatch.setattr(stats_reader, "DIRECTORY", str(tmp_path))
    pid = dead_pid()
    header = PageHeader("unit", pid, 1, 0, 1)
    name = f"vhostblk-{pid}-unit"
    (tmp_path / name).write_bytes(header.pack() + bytes(20000))
    assert not stats_reader.read_page(name).is_alive
    remove_stale()
    assert name not in stats_reader.page_names()


def test_the_page_of_a_daemon_that_lives_is_never_removed(page: StatsPage) -> None:
    """Also if its process id says nothing here: it may be one of another namespace."""
    other = f"vhostblk-{dead_pid()}-unit"
    os.rename(SHM / page.name, SHM / other)
    try:
        remove_stale()
        assert not remove_if_stale(other)
        assert stats_reader.read_page(other).is_alive
    finally:
        os.rename(SHM / other, SHM / page.name)


def test_a_page_that_is_just_being_made_is_not_removed(leftovers: list[str]) -> None:
    name = plant(f"vhostblk-{os.getpid()}-new", b"")
    leftovers.append(name)
    assert not remove_if_stale(name)
    assert (SHM / name).exists()


def test_a_page_of_a_process_that_had_our_number_is_replaced(leftovers: list[str]) -> None:
    header = PageHeader("unit", os.getpid(), 1, 0, 1)
    name = plant(f"vhostblk-{os.getpid()}-unit", header.pack() + bytes(20000))
    leftovers.append(name)
    page = StatsPage.shared("unit", 1, is_native=False)
    try:
        assert page.name == name
        assert stats_reader.read_page(name).header.created_ns > 1
    finally:
        page.close()


def test_a_name_that_somebody_sits_on_is_left_to_him(leftovers: list[str]) -> None:
    name = f"vhostblk-{os.getpid()}-unit"
    os.mkfifo(SHM / name)
    leftovers.append(name)
    page = StatsPage.shared("unit", 1, is_native=False)
    try:
        assert page.name == f"{name}~2"
    finally:
        page.close()


# ---------------------------------------------------------------- without shared memory


def use_privately(page: StatsPage) -> None:
    assert page.name == ""
    counters = QueueCounters(page.queue(3))
    counters.finished("write", 512, False, 1, counters.began())
    page.front_end_came()
    page.front_end_left()
    assert page.read()[3].operations["write"].bytes == 512
    page.close()


def test_without_posix_ipc_exports_count_in_private_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, expect_log: ExpectedLog
) -> None:
    monkeypatch.setattr(stats_page, "posix_ipc", None)
    pages = StatsPages()
    for export in ("a", "b"):
        use_privately(pages.create(export, 4, is_native=True))
    assert len(expect_log.messages) == 1
    expect_log.expect("export a: no shared memory for its statistics .posix_ipc is not installed")


@pytest.mark.warns("no shared memory for its statistics .No such file")
def test_without_dev_shm_exports_count_in_private(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats_reader, "DIRECTORY", "/nonexistent")
    assert stats_reader.page_names() == []
    use_privately(StatsPages().create("a", 4, is_native=True))


@pytest.mark.warns("no shared memory for its statistics .No space left")
def test_a_full_dev_shm_leaves_no_file_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", _full)
        use_privately(StatsPages().create("a", 4, is_native=True))
    assert not any(stats_reader.pid_in(name) == os.getpid() for name in stats_reader.page_names())


@pytest.mark.warns("no shared memory for its statistics .No space left")
def test_a_queue_that_finds_no_room_is_counted_in_private(
    monkeypatch: pytest.MonkeyPatch, expect_log: ExpectedLog
) -> None:
    page = StatsPages().create("a", 4, is_native=True)
    page.queue(0)[0] = 5
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", _full)
        for index in (1, 3):
            page.queue(index)[0] = 7
    copy = stats_reader.read_page(page.name)
    assert copy.is_partial
    assert copy.is_native
    assert {i: q.operations["read"].requests for i, q in copy.queues.items()} == {0: 5}
    requests = {i: q.operations["read"].requests for i, q in page.read().items()}
    assert requests == {0: 5, 1: 7, 3: 7}
    assert len(expect_log.messages) == 1
    page.close()


def _full(_fd: int, _offset: int, _length: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_reader_refuses_a_page_of_another_version_by_name(
    page: StatsPage, leftovers: list[str]
) -> None:
    raw = bytearray((SHM / page.name).read_bytes()[:512])
    raw[header_offset("version")] = 2
    leftovers.append(plant(f"vhostblk-{os.getpid()}-later", bytes(raw)))
    with pytest.raises(PageError, match="version 2"):
        stats_reader.read_page(leftovers[0])
