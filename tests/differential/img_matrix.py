"""The same command line through qemu-img and vhostblk-img, each in a folder of its own with equal images; everything
that is to be seen must be the same: output, messages, exit code, files.

A `Row` is a command line. The images it names are there before it runs if `img_images.IMAGES` says how to make them:
that is done once, by stock tools, and copied. File names are relative, so that no path has to be masked.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.differential.tools import find_extents
from tests.stock_tools import run_stock
from vhostblk.cli.img.program import main

__all__ = ["Row", "Templates", "compare", "rows"]

NAME = "qemu-img"  # what both call themselves in messages
DEADLINE = 60.0

COMMANDS = {
    *("amend", "bench", "bitmap", "check", "commit", "compare", "convert", "create", "dd"),
    *("info", "map", "measure", "rebase", "resize", "snapshot"),
}

_DATE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
_SECONDS = re.compile(r"(?<=in )\d+\.\d{3}(?= seconds)")
_FRAGMENTED = re.compile(r"\d+\.\d\d% fragmented, ")
_ALLOCATED = re.compile(r"\n\d+/\d+ = .* clusters$", re.MULTILINE)
# All but the last: how many there are depends on how fast it is, and on how large the pieces are.
_PROGRESS = re.compile(r" +\(\d+\.\d\d/100%\)\r(?= +\(\d+\.\d\d/100%\)\r)")
_FILE_NODE = re.compile(r"#block\d+")


@dataclass(frozen=True)
class Row:
    """A command line that both programs are given.

    Attributes:
        command: the words behind the program's name, as a shell splits them.
        given: commands that prepare the folder: of stock tools, or `poke FILE OFFSET HEX`.
        held: a command of qemu-io that has an image open meanwhile.
        process: ours is a process, too.
        on_disk: the folder is not in memory, where there is no O_DIRECT.
        differs: why the outcome is another one, on purpose or not yet: the row has to fail.
        is_loose: how many clusters of qcow2 images have a place, and are compressed, is not compared.
    """

    command: str
    given: Sequence[str] = ()
    held: str = ""
    process: bool = False
    on_disk: bool = False
    differs: str = ""
    is_loose: bool = False

    def is_possible(self, commands: Collection[str]) -> bool:
        """Whether it is about one of these subcommands, or about none."""
        first = shlex.split(self.command)[:1]
        return not COMMANDS.issuperset(first) or not first or first[0] in commands

    def __str__(self) -> str:
        shown = [*self.given, *([f"{self.held} &"] if self.held else []), self.command]
        return "; ".join(shown)


def rows(text: str, **same: Any) -> tuple[Row, ...]:
    """One for each line that is neither empty nor a comment.

    Args:
        same: what all of them have in common.
    """
    lines = (line.strip() for line in text.splitlines())
    return tuple(Row(line, **same) for line in lines if line and not line.startswith("#"))


class Templates:
    """Images, made when they are first asked for.

    Args:
        images: file name to the commands that make the file.
        folder: where they are kept.
    """

    def __init__(self, images: Mapping[str, Sequence[str]], folder: Path) -> None:
        self._images = images
        self._folder = folder
        self._made: set[str] = set()
        names = "|".join(re.escape(name) for name in sorted(images, key=len, reverse=True))
        self._name = re.compile(rf"(?<![\w.-])(?:{names})(?![\w.-])")

    def put(self, text: str, folder: Path) -> None:
        """Copy every image that a text names into a folder, and what those need."""
        for name in self._needed(text):
            _copy(self._make(name), folder / name)

    def _needed(self, text: str) -> list[str]:
        """Names in a text, and those in the commands that make them, and so on."""
        found = dict.fromkeys(self._name.findall(text))
        waiting = list(found)
        while waiting:
            for name in self._name.findall(" ".join(self._images[waiting.pop()])):
                if name not in found:
                    found[name] = None
                    waiting.append(name)
        return list(found)

    def _make(self, name: str) -> Path:
        path = self._folder / name
        if name not in self._made:
            self._made.add(name)
            commands = self._images[name]
            for other in self._name.findall(" ".join(commands)):
                self._make(other)
            for command in commands:
                prepare(command, self._folder)
        return path


def _copy(source: Path, target: Path) -> None:
    """Copy a file with its holes."""
    with source.open("rb") as old, target.open("wb") as new:
        size = os.fstat(old.fileno()).st_size
        for start, end in find_extents(old.fileno()):
            old.seek(start)
            new.seek(start)
            new.write(old.read(end - start))
        new.truncate(size)


def prepare(command: str, folder: Path) -> None:
    """Run one command in a folder; see `img_images` for those that are no programs."""
    program, *words = shlex.split(command)
    if program == "with":
        return
    if program == "poke":
        name, offset, data = words
        with (folder / name).open("r+b") as file:
            file.seek(int(offset, 0))
            file.write(bytes.fromhex(data))
        return
    done = _run([program, *words], folder)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def _run(words: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    done = run_stock(words, folder, DEADLINE)
    # Not by subprocess: it would take the ends of `-p`'s lines for ends of lines.
    texts = [text.decode(errors="surrogateescape") for text in (done.stdout, done.stderr)]
    return subprocess.CompletedProcess(words, done.returncode, *texts)


@dataclass(frozen=True)
class Outcome:
    """What a run has shown."""

    out: str
    err: str
    status: int

    def __str__(self) -> str:
        text = f"exit status {self.status}\n--- standard output\n{self.out}"
        return _masked(f"{text}\n--- standard error\n{self.err}\n")


def _masked(text: str) -> str:
    """Without what differs from one run to the next."""
    text = _SECONDS.sub("SECONDS", _DATE.sub("DATE", _PROGRESS.sub("", text)))
    return _FILE_NODE.sub("#block", text)


def theirs(row: Row, folder: Path) -> Outcome:
    """Run stock qemu-img."""
    done = _run([NAME, *shlex.split(row.command)], folder)
    return Outcome(done.stdout, done.stderr, done.returncode)


def ours(row: Row, folder: Path) -> Outcome:
    """Run vhostblk-img, in this process if possible."""
    words = shlex.split(row.command)
    if row.process:
        code = (
            f"import sys; sys.argv[0] = '{NAME}'; "
            "from vhostblk.cli.quick_start import img_main; sys.exit(img_main())"
        )
        done = _run([sys.executable, "-c", code, *words], folder)
        return Outcome(done.stdout, done.stderr, done.returncode)
    with _captured() as (out, err), contextlib.chdir(folder):
        status = main(words, NAME)
    return Outcome(out.getvalue(), err.getvalue(), status)


@contextmanager
def _captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """Standard output and error of this process, and logging as if nobody had set it up."""
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield out, err
    finally:
        root.handlers = handlers


@contextmanager
def _held(command: str, folder: Path) -> Iterator[None]:
    """A stock qemu-io that has opened its image, and waits for commands."""
    if not command:
        yield
        return
    with subprocess.Popen(
        shlex.split(command), cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.read(len("qemu-io> ")) == b"qemu-io> "
        yield
        process.stdin.close()
        process.wait(DEADLINE)


def compare(row: Row, templates: Templates, folder: Path) -> None:
    """Run a row in both; fails unless all is the same."""
    outcomes = []
    folders = (folder / "theirs", folder / "ours")
    for place, run in zip(folders, (theirs, ours), strict=True):
        place.mkdir()
        templates.put(" ".join([*row.given, row.held, row.command]), place)
        for command in row.given:
            prepare(command, place)
        with _held(row.held, place):
            outcomes.append(run(row, place))
    shown = _difference(str(outcomes[0]), str(outcomes[1]))
    shown = shown or _files_that_differ(*folders, row.is_loose)
    if shown:
        pytest.fail(f"{NAME} {row}\n{shown}", pytrace=False)


def _difference(old: str, new: str) -> str:
    lines = difflib.unified_diff(old.split("\n"), new.split("\n"), "theirs", "ours", lineterm="")
    return "\n".join(lines)


# ---------------------------------------------------------------------- files


def _files_that_differ(old: Path, new: Path, is_loose: bool) -> str:
    names = [
        sorted(str(path.relative_to(place)) for path in place.rglob("*")) for place in (old, new)
    ]
    if names[0] != names[1]:
        return f"other files: {names[0]}, ours: {names[1]}"
    for name in names[0]:
        if found := _difference_of_files(name, old, new, is_loose):
            return f"{name}: {found}"
    return ""


def _difference_of_files(name: str, old: Path, new: Path, is_loose: bool) -> str:
    if (old / name).lstat().st_mode != (new / name).lstat().st_mode:
        return f"mode {(old / name).lstat().st_mode:o}, ours: {(new / name).lstat().st_mode:o}"
    if not (old / name).is_file() or _is_same(old / name, new / name):
        return ""
    seen = [_look(name, place) for place in (old, new)]
    if is_loose:
        seen = [_ALLOCATED.sub("", text) for text in seen]
    if seen[0] != seen[1]:
        return _difference(*seen)
    if "data-file" in seen[0]:
        return ""  # which is one of the files
    formats = [json.loads(text.split("\n---", 1)[0])["format"] for text in seen]
    words = [NAME, "compare", "-s", "-f", formats[0], "-F", formats[1]]
    done = _run([*words, f"theirs/{name}", f"ours/{name}"], old.parent)
    if done.returncode > 1 and formats == ["qcow2", "qcow2"]:
        # Backed by what is not there, or not seen from here: what they have themselves.
        alone = [
            json.dumps({"driver": "qcow2", "backing": None, "file.filename": f"{folder}/{name}"})
            for folder in ("theirs", "ours")
        ]
        done = _run([NAME, "compare", "-s", *(f"json:{text}" for text in alone)], old.parent)
    if "status mismatch" in done.stdout:
        # Which may be about the file below: where it ends, where it has holes.
        done = _run([word for word in done.args if word != "-s"], old.parent)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def _is_same(old: Path, new: Path) -> bool:
    """Whether two files have the same bytes; holes are not read."""
    if old.stat().st_size != new.stat().st_size:
        return False
    with old.open("rb") as first, new.open("rb") as second:
        ranges = sorted([*find_extents(first.fileno()), *find_extents(second.fileno())])
        at = 0
        for start, end in ranges:
            if end > (start := max(start, at)):
                first.seek(start)
                second.seek(start)
                if first.read(end - start) != second.read(end - start):
                    return False
                at = end
    return True


def _look(name: str, folder: Path) -> str:
    """What stock tools say of an image that is not the same byte by byte."""
    done = _run([NAME, "info", "--output=json", name], folder)
    try:
        info = _without_what_varies(json.loads(done.stdout))
    except ValueError:
        return done.stdout + done.stderr
    check = _run([NAME, "check", "-f", info["format"], name], folder)
    shown = json.dumps(info, indent=1)
    # Where clusters are depends on which of several requests is served first.
    text = _FRAGMENTED.sub("", check.stdout)
    found = [line for line in text.splitlines() if not line.startswith("Image end offset")]
    return f"{shown}\n---\n{check.returncode} {check.stderr}" + "\n".join(found)


def _without_what_varies(info: Any) -> Any:
    if isinstance(info, list):
        return [_without_what_varies(item) for item in info]
    if isinstance(info, dict):
        varies = ("actual-size", "date-sec", "date-nsec")
        return {
            name: _without_what_varies(value) for name, value in info.items() if name not in varies
        }
    return info
