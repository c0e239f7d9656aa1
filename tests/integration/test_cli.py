"""The programs as people start them: their names, what they say of themselves, and that nothing else is said."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostblk import __version__
from vhostblk.block.drivers import DRIVERS
from vhostblk.cli.main import build_parser, build_storage_daemon_parser

MODULE = (sys.executable, "-m", "vhostblk")
FOLDER = Path(sys.executable).parent


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)


def program(name: str) -> str:
    path = shutil.which(name, path=str(FOLDER))
    if path is None:
        pytest.skip(f"{name} is not installed beside {sys.executable}")
    return path


@pytest.mark.parametrize("place", [(), ("serve",), ("storage-daemon",)])
def test_version(place: tuple[str, ...]) -> None:
    done = run(*MODULE, *place, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"vhostblk {__version__}\n", "")


def test_the_installed_programs_are_the_module() -> None:
    for words in (("--version",), ("--help",), ("serve", "--help"), ("storage-daemon", "--help")):
        installed, module = run(program("vhostblk"), *words), run(*MODULE, *words)
        assert installed.returncode == module.returncode == 0
        assert (installed.stdout, installed.stderr) == (module.stdout, module.stderr)


def test_storage_daemon_is_a_program_of_its_own() -> None:
    own = program("vhostblk-storage-daemon")
    assert run(own, "--version").stdout == f"vhostblk {__version__}\n"
    for words in (("--help",), ("--blockdev", "ftp"), ("--monitor", "chardev=m"), ("--typo",)):
        one, other = run(own, *words), run(*MODULE, "storage-daemon", *words)
        assert one.returncode == other.returncode

        def unnamed(text: str) -> str:
            """Without the program's name, and what its length does to the layout."""
            text = re.sub(r"^vhostblk( |-)storage-daemon: |^vhostblk: ", "", text)
            return " ".join(
                text.replace("vhostblk-storage-daemon", "vhostblk storage-daemon").split()
            )

        assert unnamed(one.stdout) == unnamed(other.stdout)
        assert unnamed(one.stderr) == unnamed(other.stderr)


def parsers() -> Iterator[argparse.ArgumentParser]:
    """All of them, those of the commands, too."""
    yield build_storage_daemon_parser()
    parser = build_parser()
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


@pytest.mark.parametrize("parser", list(parsers()), ids=lambda parser: str(parser.prog))
def test_every_option_has_a_help_text(parser: argparse.ArgumentParser) -> None:
    text = parser.format_help()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                assert choice.help
                assert choice.help in text
            continue
        assert action.help, action.option_strings
        if action.help == argparse.SUPPRESS:
            continue
        for name in action.option_strings:
            assert name in text
    assert max(map(len, text.splitlines())) <= 120


def test_help_teaches() -> None:
    serve = run(*MODULE, "serve", "--help").stdout
    assert (
        "memory-backend-memfd" in serve
    )  # the guest's memory must be shared, which nobody guesses
    assert "SIGHUP" in serve
    daemon = run(*MODULE, "storage-daemon", "--help").stdout
    assert "--export type=vhost-user-blk" in daemon
    for driver in DRIVERS:
        assert driver in daemon


@pytest.mark.parametrize("level", ["error", "warning", "info"])
def test_log_level_may_stand_before_and_behind_the_command(level: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.img")
    for words in (("--log-level", level, "serve"), ("serve", "--log-level", level)):
        done = run(*MODULE, *words, missing, "--socket", str(tmp_path / "s"))
        assert done.returncode == 1
        assert done.stderr == f"vhostblk: IMAGE '{missing}': No such file or directory\n"


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.img")
    for words in (("--log-level", "debug", "serve"), ("serve", "--log-level", "debug")):
        done = run(*MODULE, *words, missing, "--socket", str(tmp_path / "s"))
        assert done.returncode == 1
        assert "vhostblk: DEBUG: " in done.stderr
        assert done.stderr.endswith(f"vhostblk: IMAGE '{missing}': No such file or directory\n")
