"""Every vhostblk command line that the documentation shows is one that the program understands."""

from __future__ import annotations

import re
import shlex
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.documents import ROOT
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.keyval import parse_options
from vhostblk.cli import main
from vhostblk.cli.io.program import build_io_parser
from vhostblk.export.options import parse_export

PAGES = sorted(
    [
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "docs" / "man").glob("*.1"),
        *(ROOT / "contrib").glob("*.sh"),
    ]
)
_COMMAND = re.compile(
    r"^ *(?:\$ )?(?P<line>vhostblk(?:-storage-daemon|-io| bench| check| io| serve| stats| storage-daemon) "
    r"(?:[^\n\\]|\\\n)*)",
    re.MULTILINE,
)


PARSERS: dict[str, Callable[[], ArgumentParser]] = {
    "vhostblk": main.build_parser,
    "vhostblk-io": build_io_parser,
    "vhostblk-storage-daemon": main.build_storage_daemon_parser,
}


def command_lines(path: Path) -> list[list[str]]:
    text = path.read_text()
    if path.suffix == ".1":
        # Only what .EX sets off; elsewhere are synopses.
        text = "\n".join(re.findall(r"^\.EX\n(.*?)^\.EE$", text, re.MULTILINE | re.DOTALL))
        text = text.replace("\\-", "-").replace("\\e", "\\")
    found = []
    for match in _COMMAND.finditer(text):
        line = match["line"].replace("\\\n", " ")
        line = re.split(r" (?:&|\||#|>)|…", line)[0]
        found.append(shlex.split(line.replace('"$', '"')))
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_command_lines_are_understood(path: Path) -> None:
    for words in command_lines(path):
        if any(word in ("--monitor",) or "typo=" in word for word in words):
            continue  # shown because it is refused
        program, *arguments = words
        args = PARSERS[program]().parse_args(arguments)
        for text in getattr(args, "blockdev", ()):
            assert parse_options(text, "driver")["driver"] in DRIVERS
        exports = getattr(args, "export", ())
        for text in exports if isinstance(exports, list) else ():  # one name, for `vhostblk stats`
            parse_export(parse_options(text, "type"))


def test_there_are_command_lines_to_look_at() -> None:
    found = {path.name: len(command_lines(path)) for path in PAGES}
    assert found["README.md"] == 3
    assert found["vhostblk-serve.1"] == 3
    assert found["vhostblk-stats.1"] == 2
    assert found["vhostblk-io.1"] == 1
    assert found["vhostblk-io.md"] == 4
    assert found["statistics.md"] == 3
    assert found["vhostblk-storage-daemon.1"] == 2
    assert found["storage-daemon.md"] >= 6
    assert found["qemu-example.sh"] == 1
