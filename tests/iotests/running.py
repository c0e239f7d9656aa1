"""One test of QEMU's iotests: run within a time, judged by `check`, and nothing of it left running."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.iotests.suite import BUILD, CHECK, Tools

PASSED = "pass"
FAILED = "fail"
NOT_RUN = "not run"
EMULATOR = "emulator"
"""It tried to start a system emulator."""

_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Result:
    """How a test ended, and what there is to say about it in one line."""

    status: str
    seconds: float
    remark: str = ""


def adopt_orphans() -> None:
    """From now on daemons that a test starts and forgets are children of this process."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def list_tests(tools: Tools, image_format: str, groups: str) -> list[str]:
    """The tests of some groups, as `check` finds them."""
    command = [sys.executable, "check", f"-{image_format}", "-n", "-g", groups]
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, **tools.environment, "TEST_DIR": scratch}
        done = subprocess.run(
            command, cwd=CHECK, env=environment, capture_output=True, text=True, check=True
        )
    return [Path(line).name for line in done.stdout.splitlines()]


def run_test(tools: Tools, image_format: str, test: str, limit: float) -> Result:
    """Runs one test.

    What `check` said is kept below build/iotests/said: the difference to what was expected, if it failed.

    Args:
        tools: whose programs.
        image_format: raw or qcow2.
        test: its name.
        limit: seconds; a test that takes longer is ended, and has failed.
    """
    images = BUILD / "scratch"
    images.mkdir(exist_ok=True)
    said = BUILD / "said" / tools.name / image_format / f"{test}.log"
    said.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="iot-") as folder,
        tempfile.TemporaryDirectory(dir=images, prefix="t-") as scratch,
    ):
        calls = Path(folder, "emulator-calls")
        sockets = Path(folder, "s")
        sockets.mkdir()
        environment = {
            **os.environ,
            **tools.environment,
            "TEST_DIR": scratch,
            "SOCK_DIR": str(sockets),
            "VHOSTBLK_EMULATOR_CALLS": str(calls),
        }
        began = time.monotonic()
        with said.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "check", f"-{image_format}", test],
                cwd=CHECK,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                in_time = _wait(process, calls, began + limit)
            finally:
                _end(process)
                _unmount(Path(scratch), sockets)
        seconds = round(time.monotonic() - began, 1)
        if calls.exists():
            return Result(EMULATOR, seconds)
    if not in_time:
        return Result(FAILED, seconds, f"no end within {limit:.0f} s")
    return judge(said.read_text(errors="replace"), seconds)


def _wait(process: subprocess.Popen[bytes], calls: Path, deadline: float) -> bool:
    """Whether it ended by itself; a test that calls for an emulator need not go on."""
    while time.monotonic() < deadline:
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
            return True
        if calls.exists():
            return True
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # What has left the session was adopted, and those that it leaves behind will be.
    while children := _children():
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(child, 0)


def _unmount(*folders: Path) -> None:
    """Take away what storage daemons that were ended had exported with FUSE."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind = line.split()[:3]
        if kind.startswith("fuse") and any(Path(point).is_relative_to(part) for part in folders):
            subprocess.run(["umount", "--lazy", point], check=True)


def _children() -> list[int]:
    return [int(word) for word in Path("/proc/thread-self/children").read_text().split()]


def judge(said: str, seconds: float) -> Result:
    """What `check` says of one test."""
    skipped = re.findall(r"\[case not run\] *(.*)", said)
    remark = f"{len(skipped)} cases not run" if skipped else ""
    if re.search(r"^Passed all 1 iotests$", said, re.MULTILINE):
        return Result(PASSED, seconds, remark)
    if re.search(r"^Not run: ", said, re.MULTILINE):
        found = re.search(r" not run +(?:\[[^]]*\] *)*(?:\.\.\.)? *(.*)$", said, re.MULTILINE)
        return Result(NOT_RUN, seconds, found[1] if found else "")
    return Result(FAILED, seconds, remark)
