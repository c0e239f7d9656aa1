"""The measurement of many idle exports, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.short_runs import SECONDS, run_shortly
from tests.requirements import require


@pytest.mark.timeout(2 * SECONDS)
def test_idle_exports_are_counted_and_use_no_processor(tmp_path: Path) -> None:
    require("engine")
    found = tmp_path / "found.json"
    words = ["--exports", "6", "--front-ends", "3", "--seconds", "0.3", "--runs", "1"]
    words += ["--only", "ours", "--json", str(found)]
    done = run_shortly("tests.bench.idle_exports", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "idle: PSS, MiB" in done.stdout
    ours = json.loads(found.read_text())["ours"]
    assert ours["idle"]["threads"] >= 6
    assert ours["attached"]["fds"] > ours["idle"]["fds"]
    for when in ("idle", "attached"):
        assert ours[when]["switches_per_s"] == 0
        assert ours[when]["cpu_us_per_s"] == 0
