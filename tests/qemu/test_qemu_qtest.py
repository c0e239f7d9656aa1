"""QEMU's own vhost-user-blk tests pass against the storage daemon: see tests/qtest/README."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vhostblk.testing.daemon_process import VHOSTBLK
from vhostblk.testing.requirements import require

RUN = Path(__file__).resolve().parents[1] / "qtest" / "run"
BUILT = RUN.parents[2] / "build" / "qtest" / "built-for"


@pytest.mark.parametrize("case", ["basic", "indirect", "idx", "nxvirtq", "hotplug", "multiqueue"])
def test_qtest_case_passes(case: str) -> None:
    require("qemu-system-x86_64")
    if not BUILT.exists():
        require("qos-test", group="qtest")  # `make qtest` builds it, which takes two minutes
    done = subprocess.run(
        [sys.executable, RUN, "--case", case, *VHOSTBLK, "storage-daemon"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"ok: {case}\n1 passed, 0 failed" in done.stdout
