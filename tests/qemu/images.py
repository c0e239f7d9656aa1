"""Disk images, what the host finds in them, and a pattern that guest and host both know.

The pattern is the lines of `seq FIRST ...`, cut at a length: any shell can make it, each place of it differs from each
other, and FIRST is its seed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

__all__ = [
    "allocated",
    "faults_of_ext4",
    "fresh_image",
    "pattern",
    "same",
    "sha256_of_files",
    "write_pattern",
]

_ENVIRONMENT = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}


def fresh_image(path: Path, size: int) -> Path:
    """A sparse file of this many bytes."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def allocated(path: Path) -> int:
    """Bytes that the file takes on the host."""
    return path.stat().st_blocks * 512


def pattern(first: int, length: int) -> bytes:
    """What `seq FIRST ... | head -c LENGTH` says."""
    return "".join(f"{number}\n" for number in range(first, _last(first, length))).encode()[:length]


def _last(first: int, length: int) -> int:
    # No line of the pattern is shorter than its first.
    return first + length // len(f"{first}\n") + 1


def write_pattern(first: int, length: int, target: str, *, offset: int = 0, flags: str = "") -> str:
    """A shell command for the guest: writes the pattern to byte `offset` of `target` (both multiples of 4096).

    Args:
        flags: more operands of dd, for example "conv=fsync" or "oflag=direct".
    """
    assert not length % 4096
    assert not offset % 4096
    # The file in RAM makes every one of dd's writes full.
    return (
        f"seq {first} {_last(first, length)} | head -c {length} >/tmp/pattern{first} && "
        f"dd if=/tmp/pattern{first} of={target} bs=4k seek={offset // 4096} conv=notrunc,fsync "
        f"{flags} 2>/tmp/dd.log || {{ cat /tmp/dd.log; false; }}"
    )


def same(one: Path, other: Path) -> bool:
    """Whether two raw images have the same contents for a guest: `qemu-img compare`."""
    command = ["qemu-img", "compare", "-f", "raw", "-F", "raw", os.fspath(one), os.fspath(other)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 0


def faults_of_ext4(image: Path) -> str:
    """What e2fsck complains about; empty if nothing."""
    command = ["e2fsck", "-fn", os.fspath(image)]
    done = subprocess.run(
        command, env=_ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr if done.returncode else ""


def sha256_of_files(image: Path, folder: Path) -> dict[str, str]:
    """The files of an ext4 image, by their path in it, with their checksums.

    Args:
        folder: where they are dumped to; it must not exist.
    """
    folder.mkdir()
    command = ["debugfs", "-R", f"rdump / {folder}", os.fspath(image)]
    subprocess.run(command, env=_ENVIRONMENT, capture_output=True, timeout=60, check=True)
    return {
        os.fspath(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
