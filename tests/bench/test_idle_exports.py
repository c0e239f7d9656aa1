"""The measurement of many idle exports, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.requirements import require


def test_idle_exports_are_counted_and_use_no_processor(tmp_path: Path) -> None:
    require("engine")
    found = tmp_path / "found.json"
    words = ["--exports", "6", "--front-ends", "3", "--seconds", "0.3", "--runs", "1"]
    words += ["--duration", "0.2", "--only", "ours", "--json", str(found)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.idle_exports", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "idle: PSS, MiB" in done.stdout
    ours = json.loads(found.read_text())["ours"]
    assert ours["idle"]["threads"] >= 6
    assert ours["attached"]["fds"] > ours["idle"]["fds"]
    for when in ("idle", "attached"):
        assert ours[when]["switches_per_s"] == 0
        assert ours[when]["cpu_us_per_s"] == 0
