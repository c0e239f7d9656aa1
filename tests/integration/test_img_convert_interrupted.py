"""A conversion that is interrupted: the unfinished target is named, and a qcow2 image is a whole one."""

from __future__ import annotations

import random
import signal
import subprocess
from pathlib import Path

import pytest

from tests.integration.test_img_interrupted import Run
from tests.qcow2_images import MIB
from vhostblk.testing.requirements import require

SIZE = 4 * MIB
# Slow enough to be met at work, whatever else the machine does.
SPEED = MIB


def make_source(folder: Path) -> bytes:
    data = random.Random(1).randbytes(SIZE)
    (folder / "source").write_bytes(data)
    return data


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ((), signal.SIGINT),
        ((), signal.SIGKILL),
        (("-c",), signal.SIGKILL),
        (("-W",), signal.SIGTERM),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "".join(value),
)
def test_target_that_is_not_complete_is_named_and_whole(
    tmp_path: Path, options: tuple[str, ...], number: signal.Signals
) -> None:
    require("qemu-img")
    data = make_source(tmp_path)
    words = ["convert", "-p", "-f", "raw", "-O", "qcow2", *options, "source", "target"]
    run = Run(tmp_path, [*words, "-r", str(SPEED)])
    run.wait_until(20)
    run.process.send_signal(number)
    status, error = run.end()
    assert status == -number
    if number is not signal.SIGKILL:
        assert error.endswith("interrupted: 'target' is not complete\n")
    checked = subprocess.run(
        ["qemu-img", "check", "-q", "target"], cwd=tmp_path, capture_output=True, check=False
    )
    assert checked.returncode in ((0, 3) if number is signal.SIGKILL else (0,)), checked
    # And can be done anew.
    assert Run(tmp_path, words).end() == (0, "")
    subprocess.run(["qemu-img", "convert", "target", "again"], cwd=tmp_path, check=True)
    assert (tmp_path / "again").read_bytes() == data
