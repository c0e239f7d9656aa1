"""What `vhostblk serve` makes of its options."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhostblk.cli import main, serve
from vhostblk.daemon import DaemonConfig


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ([], "pin_memory", False),
        (["--pin-memory"], "pin_memory", True),
        ([], "own_threads", 1),
        (["--iothreads", "3"], "own_threads", 3),
    ],
)
def test_options_reach_the_export(
    words: list[str], field: str, value: object, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[DaemonConfig] = []
    monkeypatch.setattr(serve, "run_daemon", made.append)
    assert main.main(["serve", "disk.img", "--socket", "s", *words]) == 0
    (config,) = made
    (export,) = config.exports
    assert getattr(export, field) == value
