"""`vhostblk stats` on pages that the test has made; with daemons in tests/integration/test_stats.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.complaints import complain
from vhostblk.cli import main as cli
from vhostblk.cli import stats
from vhostblk.export import stats_reader
from vhostblk.export.statistics import QueueCounters
from vhostblk.export.stats_layout import PageError, VersionError
from vhostblk.export.stats_page import StatsPage

OURS = ("--pid", str(os.getpid()))


@pytest.fixture
def page() -> Iterator[StatsPage]:
    page = StatsPage.shared("unit", 4, is_native=True)
    yield page
    page.close()


def serve(page: StatsPage, queue: int, operation: str, length: int = 0, **more: Any) -> None:
    counters = QueueCounters(page.queue(queue))
    age = counters.began()
    counters.finished(operation, length, more.get("failed", False), more.get("ns", 1000), age)


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["stats", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def in_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    value = json.loads(shown(capsys, "--json", *words))
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--pid", "x"], "--pid: 'x' is not a positive number"),
        (["--pid", "0"], "--pid: '0' is not a positive number"),
        (["--watch", "0"], "--watch: '0' is not a number of seconds from 0.01 to 86400"),
        (["--watch", "nan"], "--watch: 'nan' is not a number of seconds from 0.01 to 86400"),
        (["--watch", "soon"], "--watch: 'soon' is not a number of seconds from 0.01 to 86400"),
        (["--count", "2"], "--count: only with --watch"),
        (["--export", "no-such"], "no statistics of export no-such"),
        (
            ["--export", "no-such", "--pid", "1", "--json"],
            "no statistics of export no-such in process 1",
        ),
    ],
)
def test_what_cannot_be_shown_is_told_in_one_line(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complain(cli.main, ["stats", *words], capsys) == complaint


def test_table_has_a_line_for_each_operation_that_occurred(
    page: StatsPage, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(page, 0, "read", 4096, ns=2000)
    serve(page, 0, "write", 512, failed=True)
    page.front_end_came()
    title, heads, read, write, notes = shown(capsys, *OURS).splitlines()
    assert title == (
        f"export unit (process {os.getpid()}, the engine): a front-end is connected, 1 so far"
    )
    assert heads.split()[:4] == ["queue", "operation", "requests", "IOPS"]
    assert read.split()[:3] == ["0", "read", "1"]
    assert read.split()[-1] == "2.0"
    assert write.split()[:2] == ["write", "1"]
    assert write.split()[4] == "1"  # errors, behind rate and throughput
    assert notes.split(",")[0].strip() == "in flight 0"


def test_table_of_several_queues_ends_with_their_sum(
    page: StatsPage, capsys: pytest.CaptureFixture[str]
) -> None:
    for queue in (0, 2, 2):
        serve(page, queue, "flush")
    lines = [line.split() for line in shown(capsys, *OURS).splitlines()]
    counts = {words[0]: words[2] for words in lines if "flush" in words}
    assert counts == {"0": "1", "2": "2", "all": "3"}


def test_export_without_requests_is_shown_to_have_none(
    page: StatsPage, capsys: pytest.CaptureFixture[str]
) -> None:
    QueueCounters(page.queue(1)).began()
    _, line = shown(capsys, *OURS).splitlines()
    assert line == "  no requests since it was opened, 1 in flight"


def test_json_has_what_was_counted(page: StatsPage, capsys: pytest.CaptureFixture[str]) -> None:
    for ns in (1000, 1000, 1000, 8000):
        serve(page, 3, "write", 4096, ns=ns)
    QueueCounters(page.queue(3)).called()
    page.queue(0)
    (export,) = in_json(capsys, *OURS)["exports"]
    assert (export["export"], export["page"], export["data_path"]) == ("unit", page.name, "native")
    assert [queue["queue"] for queue in export["queues"]] == [0, 1, 2, 3]
    queue = export["queues"][3]
    write = queue["operations"]["write"]
    assert (write["requests"], write["bytes"], write["errors"]) == (4, 16384, 0)
    assert write["iops"] == pytest.approx(4 / export["seconds"])
    assert write["bytes_per_second"] == pytest.approx(16384 / export["seconds"])
    assert write["latency_ns"]["mean"] == 2750
    assert write["latency_ns"]["max"] == 8000
    assert 1000 <= write["latency_ns"]["p50"] <= 1250
    assert write["latency_ns"]["p99"] == 8000
    assert [count for _, count in write["latency_ns"]["histogram"]] == [3, 1]
    assert (queue["hit_rate"], queue["calls_per_request"]) == (0, 0.25)
    assert export["queues"][0]["hit_rate"] is None
    assert 0 < queue.pop("idle_ns") <= export["total"].pop("idle_ns") < 60 * 10**9
    assert export["queues"][0]["idle_ns"] is None
    assert export["total"] == {key: value for key, value in queue.items() if key != "queue"}


def test_watch_shows_only_what_came_in_the_interval(
    page: StatsPage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(page, 0, "read", 512, ns=10**9)
    intervals = [0, 3, 1]

    def interval(_seconds: float) -> None:
        for _ in range(intervals.pop(0)):
            serve(page, 0, "read", 512)

    monkeypatch.setattr(time, "sleep", interval)
    lines = shown(capsys, "--json", "--watch", "0.5", "--count", "3", *OURS).splitlines()
    assert intervals == []
    found = [json.loads(line) for line in lines]
    reads = [f["exports"][0]["total"]["operations"]["read"] for f in found]
    assert [read["requests"] for read in reads] == [0, 3, 1]
    assert [f["interval"] for f in found] == [0.5] * 3
    assert max(read["latency_ns"]["max"] for read in reads) < 2000  # the slow one was before


def test_export_that_came_while_we_watched_is_shown_with_all_it_did(
    page: StatsPage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it took the name of one that went."""
    serve(page, 0, "read", 512)
    pages = [page]

    def interval(_seconds: float) -> None:
        pages.pop().close()
        pages.append(StatsPage.shared("unit", 4, is_native=False))
        serve(pages[0], 0, "read", 512)
        serve(pages[0], 0, "read", 512)

    monkeypatch.setattr(time, "sleep", interval)
    out = shown(capsys, "--json", "--watch", "0.5", "--count", "1", *OURS)
    (export,) = json.loads(out)["exports"]
    assert (export["data_path"], export["total"]["requests"]) == ("python", 2)
    pages[0].close()


def test_interrupted_watch_is_no_failure(
    page: StatsPage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    assert shown(capsys, "--watch", *OURS) == ""


def test_pages_that_cannot_be_shown_are_counted(
    page: StatsPage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals: dict[str, Exception] = {
        "vhostblk-1-a": PermissionError(),
        "vhostblk-1-b": VersionError("layout version 2"),
        "vhostblk-1-c": PermissionError(),
        "vhostblk-1-d": PageError("not a statistics page"),
        "vhostblk-1-e": FileNotFoundError(),
    }
    read_page = stats_reader.read_page

    def read(name: str) -> stats_reader.PageCopy:
        if name in refusals:
            raise refusals[name]
        return read_page(name)

    monkeypatch.setattr(stats, "read_page", read)
    monkeypatch.setattr(stats, "page_names", lambda: [*refusals, page.name])
    found = in_json(capsys)
    assert (found["unreadable"], found["foreign"], len(found["exports"])) == (2, 1, 1)
    assert shown(capsys).splitlines()[-2:] == [
        "2 more exports may not be read by this user",
        "1 more export of another version of vhostblk",
    ]
    # Of another process than the one asked for: no matter.
    assert in_json(capsys, *OURS)["unreadable"] == 0
    monkeypatch.setattr(stats, "page_names", lambda: ["vhostblk-1-a"])
    assert shown(capsys) == (
        "no statistics of any export; 1 more export may not be read by this user\n"
    )


def test_a_page_that_was_left_over_is_not_shown(
    page: StatsPage, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path("/dev/shm") / f"vhostblk-{os.getpid()}-copy"
    copy.write_bytes((Path("/dev/shm") / page.name).read_bytes())
    try:
        assert len(in_json(capsys, *OURS)["exports"]) == 1
    finally:
        copy.unlink()


def test_nothing_is_imported_that_is_not_needed() -> None:
    """It is run again and again by monitoring, and by people who wait."""
    script = (
        "import sys; from vhostblk.cli.main import main; main(['--log-level', 'error', 'stats']); "
        "print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=True
    )
    modules = set(done.stderr.split())
    assert "vhostblk.cli.stats" in modules
    assert not modules & {"asyncio", "cffi", "posix_ipc", "vhostblk.daemon", "vhostblk.native"}
    assert not any(name.startswith(("vhostblk.block", "vhostblk.vhost")) for name in modules)
