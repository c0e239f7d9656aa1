"""An image, and QEMU as its other user."""

from __future__ import annotations

import fcntl
import itertools
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemons import eventually
from tests.requirements import require

__all__ = ["held_by_qemu", "image", "locked_bytes", "qemu_io", "wait_until_unlocked"]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image of 64 KiB."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(65536))
    return path


def qemu_io(image: Path, *options: str) -> str:
    """What qemu-io complains about when it opens the image."""
    words = [require("qemu-io", group="qemu"), *options, "-f", "raw", "-c", "read 0 512"]
    done = subprocess.run(
        [*words, str(image)], capture_output=True, text=True, timeout=30, check=False
    )
    return done.stderr


@contextmanager
def held_by_qemu(image: Path, *options: str) -> Iterator[None]:
    """A qemu-io that has the image open, for writing unless told otherwise, and waits for commands."""
    words = [require("qemu-io", group="qemu"), *options, "-f", "raw", str(image)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        while "iB" not in process.stdout.readline():
            assert process.poll() is None
        yield
        process.stdin.close()
        process.wait(30)


def locked_bytes(fd: int) -> set[int]:
    """Which bytes others have locked, seen through this opening."""
    found = set()
    for offset in itertools.chain(range(100, 108), range(200, 208)):
        request = struct.pack("@hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0)
        kind = struct.unpack("@hhqqi4x", fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request))[0]
        if kind != fcntl.F_UNLCK:
            found.add(offset)
    return found


def wait_until_unlocked(path: Path) -> None:
    """Whoever was killed may be gone before its last request, which keeps the lock (docs/restart.md)."""
    with path.open("rb") as file:
        eventually(lambda: not locked_bytes(file.fileno()), f"nobody has locked {path}")
