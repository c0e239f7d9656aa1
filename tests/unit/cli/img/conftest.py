"""A fixture that runs vhostblk-img in this process."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from vhostblk.cli.img.program import main


class Said(NamedTuple):
    """What a run has shown."""

    status: int
    out: str
    err: str


Img = Callable[[str], Said]


@pytest.fixture
def img(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Img:
    """Runs a command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(words: str) -> Said:
        status = main(shlex.split(words), "img")
        return Said(status, *capsys.readouterr())

    return run
