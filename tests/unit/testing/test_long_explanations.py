"""Images that differ are told of at once, wherever the tests run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]


def test_images_that_differ_are_no_riddle_for_minutes_in_continuous_integration(
    tmp_path: Path,
) -> None:
    (tmp_path / "conftest.py").write_text((REPOSITORY / "tests/conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(
        "def test_it():\n assert bytes(512 << 10) == b'w' * (512 << 10)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.fspath(REPOSITORY), "CI": "true"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert "1 failed" in done.stdout
    assert done.stdout.count("\n") < 50
