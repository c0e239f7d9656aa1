"""Image tools that are interrupted, and whose output nobody reads: they end by the signal, and images show what they
did."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import pytest

from tests.locks import wait_until_unlocked
from tests.qcow2_images import MIB, contents, create, qemu_io
from vhostblk.testing.requirements import require

DEADLINE = 60.0
SIZE = 8 * MIB
# Slow enough to be met at work, whatever else the machine does.
SPEED = MIB
PROGRAM = "import sys; from vhostblk.cli.quick_start import img_main; sys.exit(img_main())"
_PERCENT = re.compile(rb"\((\d+)\.\d\d/100%\)")

COMMIT = ["commit", "-p", "-r", str(SPEED), "top"]
COMMIT_DOWN = ["commit", "-p", "-r", str(SPEED), "-b", "base", "top"]
REBASE = [
    *("rebase", "-p", "-b", "other", "-F", "qcow2", "--image-opts"),
    *("--object", f"throttle-group,id=slow,x-bps-write={SPEED}"),
    "driver=qcow2,file.driver=throttle,file.throttle-group=slow,"
    "file.file.driver=file,file.file.filename=top",
]


class Run:
    """A process of vhostblk-img in a folder.

    Args:
        before: called in it before it begins.
    """

    def __init__(
        self,
        folder: Path,
        words: Sequence[str],
        stdout: int | IO[bytes] = subprocess.PIPE,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        self._folder = folder

        def prepare() -> None:
            # Whoever runs us in the background may ignore some.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            # Until there is somebody for it, it would end the process.
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            before()

        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            preexec_fn=prepare,
        )

    def wait_until(self, percent: int) -> None:
        """Return when it says that so much is done."""
        assert self.process.stdout is not None
        said = b""
        while not any(int(match) >= percent for match in _PERCENT.findall(said)):
            more = os.read(self.process.stdout.fileno(), 4096)
            assert more, (said, self.process.stderr and self.process.stderr.read())
            said += more

    def end(self) -> tuple[int, str]:
        """How it has ended, and what is on standard error; nobody holds its images any more."""
        _, error = self.process.communicate(timeout=DEADLINE)
        for path in self._folder.iterdir():
            wait_until_unlocked(path)
        return self.process.returncode, error.decode()


def make_chain(folder: Path) -> bytes:
    """Three layers, and one that has nothing to do with them; returns what the first one shows."""
    require("qemu-img")
    require("qemu-io")
    for number, (name, below) in enumerate(
        (("base", ""), ("mid", "base"), ("top", "mid"), ("other", ""))
    ):
        create(folder / name, SIZE, *(("-b", below, "-F", "qcow2") if below else ()))
        writes = (f"write -P {16 * number + at} {at}M 512k" for at in range(SIZE // MIB))
        qemu_io(folder / name, *writes)
    return contents(folder / "top", folder)


@pytest.mark.parametrize(
    ("words", "number"),
    [
        (COMMIT, signal.SIGINT),
        (COMMIT, signal.SIGHUP),
        (COMMIT, signal.SIGKILL),
        (COMMIT_DOWN, signal.SIGTERM),
        (REBASE, signal.SIGINT),
        (REBASE, signal.SIGKILL),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else value[0],
)
def test_image_shows_the_same_whatever_ends_the_tool(
    tmp_path: Path, words: Sequence[str], number: signal.Signals
) -> None:
    before = make_chain(tmp_path)
    run = Run(tmp_path, words)
    run.wait_until(20)
    run.process.send_signal(number)
    assert run.end() == (-number, "")
    assert contents(tmp_path / "top", tmp_path) == before
    for name in ("top", "mid", "base"):
        checked = subprocess.run(
            ["qemu-img", "check", "-q", name], cwd=tmp_path, capture_output=True, check=False
        )
        # Leaks, if nothing was tidied up.
        assert checked.returncode in ((0, 3) if number is signal.SIGKILL else (0,)), checked
    # And can be done anew.
    again = [word for word in words if word not in ("-r", str(SPEED))]
    assert Run(tmp_path, again).end() == (0, "")
    assert contents(tmp_path / "top", tmp_path) == before


def test_signal_that_is_ignored_from_the_start_stays_ignored(tmp_path: Path) -> None:
    before = make_chain(tmp_path)
    run = Run(tmp_path, COMMIT, before=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    run.wait_until(20)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == (0, "")
    assert contents(tmp_path / "mid", tmp_path) == before


def test_sigusr1_shows_once_how_far_it_is(tmp_path: Path) -> None:
    make_chain(tmp_path)
    run = Run(tmp_path, [word for word in COMMIT if word != "-p"])
    error = run.process.stderr
    assert error is not None
    os.set_blocking(error.fileno(), False)
    said = b""
    while not said.endswith(b"/100%)\n"):
        assert run.process.poll() is None
        run.process.send_signal(signal.SIGUSR1)
        said += error.read() or b""
    run.process.send_signal(signal.SIGTERM)
    os.set_blocking(error.fileno(), True)
    assert run.end()[0] == -signal.SIGTERM
    assert re.fullmatch(rb"(    \(\d+\.\d\d/100%\)\n)+", said)


def test_work_goes_on_when_nobody_reads_its_progress(tmp_path: Path) -> None:
    before = make_chain(tmp_path)
    run = Run(tmp_path, ["commit", "-p", "top"])
    assert run.process.stdout is not None
    run.process.stdout.close()
    assert (run.process.wait(DEADLINE), run.process.stderr and run.process.stderr.read()) == (
        0,
        b"",
    )
    assert run.process.stderr is not None
    run.process.stderr.close()
    assert contents(tmp_path / "mid", tmp_path) == before


def test_output_that_has_no_room_is_an_error_after_the_work(tmp_path: Path) -> None:
    before = make_chain(tmp_path)
    with open("/dev/full", "wb") as full:
        status, said = Run(tmp_path, ["commit", "top"], stdout=full).end()
    assert (status, said) == (1, "-c: standard output: No space left on device\n")
    assert contents(tmp_path / "mid", tmp_path) == before


def test_image_does_not_become_standard_output_where_that_is_closed(tmp_path: Path) -> None:
    before = make_chain(tmp_path)
    closed = Run(tmp_path, ["commit", "-p", "top"], before=lambda: os.closerange(0, 2))
    assert closed.end() == (0, "")
    assert contents(tmp_path / "mid", tmp_path) == before
    assert contents(tmp_path / "top", tmp_path) == before


_STUBBORN = """
import sys
from vhostblk.cli.interruption import run_interruptible
async def work():
    print("begun", flush=True)
    while True:
        try:
            {step}
        except BaseException:
            pass
run_interruptible(work(), lambda: print("ended"))
"""


@pytest.mark.parametrize("step", ["pass", "await __import__('asyncio').sleep(0)"])
def test_work_that_does_not_listen_is_ended_all_the_same(step: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _STUBBORN.format(step=step)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + DEADLINE
        while step != "pass" and process.poll() is None and time.monotonic() < deadline:
            # It lets others have a turn, so it may be closing something: the second signal ends it, and what comes
            # before the first was seen is no second one.
            process.send_signal(signal.SIGTERM)
        status = process.wait(DEADLINE)
        said = process.stdout.read()
        assert status == -signal.SIGTERM
        assert said == (b"ended\n" if step == "pass" else b"")
