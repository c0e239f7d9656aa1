"""Run one script through qemu-io and vhostblk-io, each on an image of its own, and compare all there is to see."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hypothesis import reject

from vhostblk.block.limits import SECTOR_SIZE
from vhostblk.cli.io.program import main

NAME = "qemu-io"  # what both call themselves in messages
DEADLINE = 60.0

#: A folder in memory, if there is one: files there have holes and nothing else that is not data.
MEMORY = Path("/dev/shm")

#: Says on standard output that everything before it is over.
MARK = "sleep mark"
_MARKED = "mark is not a valid number"

_RATE = re.compile(r"; [0-9:.]+( sec)? \(.*\)$")
_MACHINE = re.compile(r"^(\d+,\d+),[0-9:.]+,[0-9.]+,[0-9.]+$")
_USAGE = re.compile(r"^([a-z_]+(?: .*)?) -- .*$")
_NODE = re.compile(r"#block\d+")


@dataclass(frozen=True)
class Outcome:
    """What a run has shown, without what may differ: times, help texts, generated names."""

    out: tuple[str, ...]
    err: tuple[str, ...]
    status: int
    content: bytes
    #: Where it is allocated, and on how many blocks; nothing where that is up to the file system: ext4 writes zeroes
    #: where it would have to split an extent.
    extents: tuple[tuple[int, int], ...]
    blocks: int

    def __str__(self) -> str:
        lines = [f"exit status {self.status}", *self.out, *(f"stderr: {line}" for line in self.err)]
        return "\n".join([*lines, f"extents {self.extents}, {self.blocks} blocks"])


def mask(text: str) -> Iterator[str]:
    """Lines without what may differ."""
    for line in text.splitlines():
        line = _RATE.sub("; X", line)
        line = _MACHINE.sub(r"\1,X", line)
        yield _NODE.sub("NODE", _USAGE.sub(r"\1 --", line))


def unordered(lines: Sequence[str]) -> tuple[str, ...]:
    """Lines of a script with requests in the background, which come in any order between two marks."""
    parts: list[list[str]] = [[]]
    for line in lines:
        if line == _MARKED:
            parts[-1].sort()
            parts.append([line])
        else:
            parts[-1].append(line)
    return tuple(line for part in parts for line in part)


def outcome(image: Path, out: str, err: str, status: int) -> Outcome:
    fd = os.open(image, os.O_RDONLY)
    try:
        is_exact = image.is_relative_to(MEMORY)
        extents = tuple(find_extents(fd)) if is_exact else ()
        blocks = os.fstat(fd).st_blocks if is_exact else 0
    finally:
        os.close(fd)
    content = image.read_bytes()
    # A zero-write that may unmap, into a last sector that the file has a part of: QEMU does not make it longer.
    content += bytes(-len(content) % SECTOR_SIZE)
    lines = unordered(list(mask(out)))
    return Outcome(lines, tuple(mask(err)), status, content, extents, blocks)


def find_extents(fd: int) -> Iterator[tuple[int, int]]:
    """Where a file has data: (begin, end)."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


Said = tuple[int, str, str]
"""Exit status, standard output, standard error."""


def ask_qemu_io(arguments: Sequence[str]) -> Said:
    """Run qemu-io."""
    done = subprocess.run(
        [NAME, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def ask_vhostblk_io(arguments: Sequence[str]) -> Said:
    """Run vhostblk-io, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(arguments, NAME)
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue(), err.getvalue()


def compare(
    folder: Path, make: Callable[[Path], None], arguments: Callable[[Path], Sequence[str]]
) -> Outcome:
    """Both programs on equal images; fails unless all is the same.

    Args:
        make: makes the image.
        arguments: the command line for an image.

    Returns:
        what was the same.
    """
    outcomes = []
    for ask in (ask_qemu_io, ask_vhostblk_io):
        # The same name, because messages have it in them.
        image = folder / "image"
        image.unlink(missing_ok=True)
        make(image)
        status, out, err = ask(arguments(image))
        outcomes.append(outcome(image, out, err, status))
    theirs, ours = outcomes
    if theirs.status < 0:
        reject()  # qemu-io 7.2 divides by zero for some limits
    shown = "\n".join(
        difflib.unified_diff(str(theirs).split("\n"), str(ours).split("\n"), "theirs", "ours")
    )
    assert not shown, shown
    assert ours.content == theirs.content, "the files have other bytes"
    return ours


def command_line(commands: Sequence[str], options: Mapping[str, str]) -> list[str]:
    """Options of an image, and a script."""
    text = ",".join(f"{name}={value}" for name, value in options.items())
    return ["--image-opts", text, *(word for command in commands for word in ("-c", command))]
