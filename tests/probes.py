"""What the kernel was asked to do by a daemon: system calls (strace), and flushes that a loop device saw.

strace does not see what goes through io_uring, a loop device's counter sees everything, but says only how often.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemons import eventually
from tests.requirements import require, require_no_sandbox

__all__ = ["LoopDevice", "Trace", "loop_device", "mounted"]


class Trace:
    """System calls of a daemon and all its threads, while it runs.

    A call is in the file before it returns, so what a request did is there when the request has completed.

    Args:
        path: file for strace's output.
        calls: names of system calls.
        inject: what strace shall do to them (`fdatasync:error=EIO:when=1`) while the daemon serves.
        io_uring: whether the kernel shall allow it.
    """

    def __init__(
        self, path: Path, *calls: str, inject: str | None = None, io_uring: bool = True
    ) -> None:
        self._path = path
        if inject is not None:
            require_no_sandbox(
                "strace injects by making system call -1 instead, which is forbidden"
            )
        if not io_uring:  # a thing of the start, before there is a sandbox
            calls = (*calls, "io_uring_setup")
        # -D: the daemon is our child, and strace somebody else's.
        self.command = [require("strace"), "-D", "-f", "-qq", "-o", str(path)]
        self.command += ["-e", f"trace={','.join(calls)}", "-e", "signal=none"]
        if inject is not None:
            self.command += ["-e", f"inject={inject}"]
        if not io_uring:
            self.command += ["-e", "inject=io_uring_setup:error=EPERM"]
        self._seen = 0

    def text(self) -> str:
        """Everything so far."""
        return self._path.read_text() if self._path.exists() else ""

    def new(self) -> list[str]:
        """Lines since the last call of this; calls that were interrupted by others count where they end."""
        lines = [line for line in self.text().splitlines() if "<unfinished" not in line]
        new, self._seen = lines[self._seen :], len(lines)
        return new

    def syncs(self) -> int:
        """How many fdatasync or fsync have succeeded since the last look."""
        return sum(bool(re.search(r"\b(fdatasync|fsync)\b.* = 0", line)) for line in self.new())


@contextmanager
def mounted(device: str, folder: Path, *options: str) -> Iterator[Path]:
    """A mounted file system; `device` is a block device, an image (with `-o loop`) or "none"."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [require("mount", "root"), *options, device, str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        # Whoever had a file there open may be gone before its last reference, which an io_uring keeps for a moment.
        eventually(lambda: _is_unmounted(folder), f"{folder} is unmounted")


def _is_unmounted(folder: Path) -> bool:
    done = subprocess.run(["umount", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "busy" in done.stderr, done.stderr
    return done.returncode == 0


class LoopDevice:
    """A block device whose bytes are in a file."""

    def __init__(self, path: str, image: Path) -> None:
        self.path = path
        self.image = image
        self.sysfs = Path(f"/sys/block/{Path(path).name}")

    def resize(self, size: int) -> None:
        """Change its size; the kernel tells whoever listens."""
        os.truncate(self.image, size)
        subprocess.run(["losetup", "--set-capacity", self.path], check=True)

    def announce(self, action: str) -> None:
        """Have the kernel send a uevent ("change", "remove", ...) for no reason."""
        (self.sysfs / "uevent").write_text(action)

    @property
    def flushes(self) -> int:
        """Cache flushes that it has completed (Linux, Documentation/block/stat.rst)."""
        stat = (self.sysfs / "stat").read_text().split()
        return int(stat[15])


@contextmanager
def loop_device(image: Path, *options: str) -> Iterator[LoopDevice]:
    """A loop device over an image."""
    done = subprocess.run(
        [require("losetup", "root"), "--find", "--show", *options, str(image)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    device = LoopDevice(done.stdout.strip(), image)
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device.path], check=True)


@contextmanager
def watched_device(folder: Path, size: int) -> Iterator[LoopDevice]:
    """A block device full of "d" whose changes a daemon hears of."""
    require("engine")
    pytest.importorskip("pyroute2")
    image = folder / "device.img"
    image.write_bytes(b"d" * size)
    with loop_device(image) as found:
        yield found
