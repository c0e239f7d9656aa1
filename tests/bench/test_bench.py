"""`make bench` itself: rows are sound, bounds are what they say, and the table comes out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.rows import ROWS, Row, Target
from tests.bench.short_runs import SECONDS, run_shortly
from tests.bench.weather import Weather
from tests.requirements import require
from vhostblk.client.bench.compare import METRICS
from vhostblk.native import load


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_can_be_run_and_its_targets_are_measured(row: Row) -> None:
    row.options.check()
    assert {target.metric for target in row.targets} <= set(METRICS)


def test_names_of_rows_are_their_own() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_bound_is_included() -> None:
    assert Target("iops", 2.0).is_met(2.0)
    assert not Target("iops", 2.0).is_met(1.99)
    assert Target("p50_us", at_most=0.7).is_met(0.7)
    assert not Target("p50_us", at_most=0.7).is_met(0.71)
    assert Target("iops").is_met(0.1)


def test_others_are_seen_at_work() -> None:
    script = "import time\nwhile time.process_time() < 0.3: pass\nprint(1, flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        # The one that knows it looks for a shorter time: what the rest of the machine does is not held against it.
        unknown = Weather()
        known = Weather(other.pid)
        assert other.stdout
        other.stdout.readline()
        without = known.others()
        assert unknown.others() - without > 0.2
        other.communicate(b"\n")


@pytest.mark.skipif(not load.available(), reason="the generator is not built")
@pytest.mark.timeout(2 * SECONDS)
def test_table_has_ratios_against_qemu_storage_daemon(tmp_path: Path) -> None:
    require("qemu-storage-daemon", group="qemu")
    words = ["--quick", "--runs", "1", "--folder", str(tmp_path)]
    words += ["--only", "latency", "--only", "idle", "--json", str(tmp_path / "runs.json")]
    done = run_shortly("tests.bench", *words)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    (row,) = [line for line in lines if line.startswith("null-co, depth 1, eventfd")]
    assert "p50_us" in row
    assert row.rstrip().endswith(("met", "MISSED"))
    assert any(line.startswith("idle, a guest attached") for line in lines)
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert runs["latency"]["ours"][0]["iops"] > 0
    assert runs["latency"]["qemu"][0]["iops"] > 0


@pytest.mark.skipif(not load.available(), reason="the generator is not built")
@pytest.mark.timeout(2 * SECONDS)
def test_disk_made_of_python_is_measured_in_turn_with_that_of_nbdkit() -> None:
    require("nbdkit", "fio")
    words = ["--python", "--quick", "--runs", "1", "--only", "python-write"]
    done = run_shortly("tests.bench", *words)
    assert (done.returncode, done.stderr) == (0, "")
    iops, cpu = [line for line in done.stdout.splitlines() if line.startswith("random write")]
    assert "n/a" not in iops + cpu
    assert iops.rstrip().endswith(("met", "MISSED"))
