"""The command line as a whole: help, version, tracing, objects, wrong words."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.img.conftest import Img
from vhostblk import __version__
from vhostblk.cli.img.table import SYNOPSES
from vhostblk.testing.plugin import ExpectedLog

_TRY = "Try 'img --help' for more information\n"


@pytest.mark.parametrize("words", ["--help", "-h", "--he", "create -q --help", "info -h nosuch"])
def test_help_names_all_subcommands_and_formats(img: Img, words: str) -> None:
    said = img(words)
    assert (said.status, said.err) == (0, "")
    assert [line.split()[0] for line in said.out.splitlines() if line.startswith("  ")][3:] == (
        sorted(SYNOPSES)
    )
    assert "\nSupported formats: blkdebug " in said.out


def test_version_is_that_of_the_model_and_our_own(img: Img) -> None:
    assert img("--version") == (0, f"img version 7.2.0 (vhostblk {__version__})\n", "")
    assert img("-V nosuch").out == img("--ver").out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "Not enough arguments"),
        ("nosuch", "Command not found: nosuch"),
        ("-Z", "unrecognized option '-Z'"),
        ("--help=1", "unrecognized option '--help=1'"),
        ("-T", "missing argument for option '-T'"),
        ("create --nosuch", "unrecognized option '--nosuch'"),
        ("create new -f", "missing argument for option '-f'"),
    ],
)
def test_words_that_make_no_sense(img: Img, words: str, message: str) -> None:
    assert img(words) == (1, "", f"img: {message}\n{_TRY}")


def test_options_are_looked_at_in_their_order(img: Img) -> None:
    assert img("create --object nosuch -Z").err.startswith("img: Parameter 'qom-type'")
    assert img("create -Z --object nosuch").err.startswith("img: unrecognized option '-Z'")


def test_trace_events_do_not_exist(img: Img, tmp_path: Path, expect_log: ExpectedLog) -> None:
    expect_log.expect("trace event 'bdrv_open' does not exist")
    assert img("-T bdrv_open") == (0, "", "img: warning: trace event 'bdrv_open' does not exist\n")
    assert img("-T 'bdrv_*'") == (0, "", "")
    assert img("-T nosuch=1").err == "img: Invalid parameter 'nosuch'\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iothread,id=a", "Parameter 'qom-type' does not accept value 'iothread'"),
        ("secret,id=a", "Either 'file' or 'data' must be provided"),
        ("id=a", "Parameter 'qom-type' is missing"),
        ("throttle-group", "Parameter 'id' is missing"),
        ("throttle-group,id=a,x=1", "Parameter 'x' is unexpected"),
        (
            "throttle-group,id=1",
            "Parameter 'id' expects an identifier\n"
            "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
        ),
    ],
)
def test_objects_that_cannot_be_made(img: Img, text: str, message: str) -> None:
    assert img(f"create --object {text} new 1M") == (1, "", f"img: {message}\n")


def test_two_objects_have_two_names(img: Img) -> None:
    group = "--object throttle-group,id=a"
    assert "attempt to add duplicate property 'a'" in img(f"create {group} {group} new 1M").err
    assert img(f"create {group} -q new 1M").status == 0
