"""Runs a command line that must fail, in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from vhostblk.cli import main as cli

__all__ = ["complain"]


def complain(
    program: Callable[[Sequence[str]], int],
    words: Sequence[str],
    capsys: pytest.CaptureFixture[str],
) -> str:
    """What the one line says, without the program's name."""
    try:
        status: object = program(words)
    except SystemExit as exc:
        status = exc.code
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1, err
    name = "vhostblk-storage-daemon: " if program is cli.storage_daemon_main else "vhostblk: "
    assert err.startswith(name)
    return err.removeprefix(name).rstrip("\n")
