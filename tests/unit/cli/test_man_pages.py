"""The manual pages and the parsers say the same: every option is in both, with its values and default."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vhostblk import __version__
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.options import NodeOptions, describe_options
from vhostblk.cli import bench, check, serve, stats, storage_daemon
from vhostblk.cli.img.table import SYNOPSES, find_command
from vhostblk.cli.io import program as io
from vhostblk.cli.program import add_common_options
from vhostblk.export.options import _Options
from vhostblk.testing.requirements import require

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "docs" / "man"
PAGES = sorted(FOLDER.glob("*.1"))
NAMES = [
    "vhostblk-bench.1",
    "vhostblk-check.1",
    "vhostblk-img.1",
    "vhostblk-io.1",
    "vhostblk-serve.1",
    "vhostblk-stats.1",
    "vhostblk-storage-daemon.1",
    "vhostblk.1",
]


@dataclass
class Entry:
    """One tagged paragraph."""

    section: str
    tag: str
    text: str

    @property
    def names(self) -> list[str]:
        """Long options (`--socket`), or the key of a `key=value` option."""
        if self.tag.startswith("-"):
            return re.findall(r"--[a-z-]+", self.tag)
        return [self.tag.partition("=")[0]] if "=" in self.tag else []


def plain(line: str) -> str:
    """A line of man(7) source as a reader sees it, with single spaces."""
    words = re.findall(r'"[^"]*"|\S+', line)
    if words and re.fullmatch(r"\.[BIR]{1,2}", words[0]):
        # .BR and its sisters join their arguments; .B and .I separate them.
        joint = "" if len(words[0]) == 3 else " "
        line = joint.join(word.strip('"') for word in words[1:])
    for escape, character in (("\\-", "-"), ("\\(dq", '"'), ("\\~", " "), ("\\ ", " ")):
        line = line.replace(escape, character)
    return line.replace("\\e", "\\")


def entries(page: str) -> list[Entry]:
    """All tagged paragraphs of a page with the section or subsection they are in."""
    found: list[Entry] = []
    section = ""
    lines = iter((FOLDER / page).read_text().splitlines())
    for line in lines:
        if line.startswith((".SH", ".SS")):
            section = line[4:].replace("\\-", "-").strip('"')
            found.append(Entry(section, "", ""))
        elif line == ".TP":
            found.append(Entry(section, plain(next(lines)), ""))
        elif line in (".PP",):
            found.append(Entry(section, "", ""))
        elif found:
            found[-1].text += plain(line) + " "
    return [entry for entry in found if entry.tag]


def options_of(page: str, section: str) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for entry in entries(page):
        if entry.section == section:
            for name in entry.names:
                assert name not in found, f"{page}: {name} stands twice under {section}"
                found[name] = entry
    assert found, f"{page}: nothing under {section}"
    return found


def actions_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    for action in parser._actions:
        if action.option_strings and action.help != argparse.SUPPRESS:
            yield action.option_strings[-1], action


def declared(module: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    module.add_options(parser)
    return parser


def common() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_common_options(parser)
    return parser


def test_the_pages_are_those_that_are_checked_here() -> None:
    assert [page.name for page in PAGES] == NAMES


@pytest.mark.parametrize(
    ("page", "parser"),
    [
        ("vhostblk.1", common()),
        ("vhostblk-bench.1", declared(bench)),
        ("vhostblk-check.1", declared(check)),
        ("vhostblk-io.1", declared(io)),
        ("vhostblk-serve.1", declared(serve)),
        ("vhostblk-stats.1", declared(stats)),
        ("vhostblk-storage-daemon.1", declared(storage_daemon)),
    ],
    ids=["vhostblk", "bench", "check", "io", "serve", "stats", "storage-daemon"],
)
def test_page_has_exactly_the_options_of_the_parser(
    page: str, parser: argparse.ArgumentParser
) -> None:
    documented = options_of(page, "OPTIONS")
    actions = dict(actions_of(parser))
    assert documented.keys() == actions.keys()
    for name, action in actions.items():
        entry = documented[name]
        for choice in action.choices or ():
            assert re.search(rf"\b{choice}\b", entry.text), f"{name}: {choice} is missing"
        if action.default not in (None, False, argparse.SUPPRESS) and action.default != []:
            assert f"Default: {action.default}." in entry.text, name
        assert bool(action.metavar or action.choices) == (" " in entry.tag.replace(", ", "")), name


@pytest.mark.parametrize("command", SYNOPSES)
def test_img_page_has_exactly_the_options_of_each_subcommand(command: str) -> None:
    found = find_command(command)
    assert found is not None
    declared = {}
    for field in dataclasses.fields(found.takes):
        if "short" in field.metadata:
            dashed = ("-", field.metadata["short"]), ("--", field.metadata["long"])
            words = tuple(f"{dashes}{word}" for dashes, word in dashed if word)
            declared[words] = "read" in field.metadata
    tags = [entry.tag for entry in entries("vhostblk-img.1") if entry.section == command]
    documented = {
        tuple(re.findall(r"--?[A-Za-z-]+", tag)): " " in tag.replace(", ", "") for tag in tags
    }
    assert documented == declared
    assert len(tags) == len(documented)


@pytest.mark.parametrize(
    ("section", "options_type", "besides"),
    [
        ("Options of every node", NodeOptions, {"driver", "snapshot"}),
        ("file, host_device, host_cdrom", DRIVERS["file"].options_type, set()),
        ("file, host_device, host_cdrom", DRIVERS["host_device"].options_type, set()),
        ("raw", DRIVERS["raw"].options_type, set(DRIVERS["raw"].child_keys)),
        ("nbd", DRIVERS["nbd"].options_type, set()),
        ("null-co", DRIVERS["null-co"].options_type, set()),
        ("memory", DRIVERS["memory"].options_type, set()),
        ("throttle", DRIVERS["throttle"].options_type, set()),
        ("copy-on-read", DRIVERS["copy-on-read"].options_type, set()),
        ("copy-before-write", DRIVERS["copy-before-write"].options_type, set()),
        ("blkdebug", DRIVERS["blkdebug"].options_type, set()),
        ("EXPORTS", _Options, set()),
        ("OBJECTS", storage_daemon._IOThreadOptions, {"qom-type"}),
    ],
    ids=[
        "node",
        "file",
        "host_device",
        "raw",
        "nbd",
        "null-co",
        "memory",
        "throttle",
        "copy-on-read",
        "copy-before-write",
        "blkdebug",
        "export",
        "iothread",
    ],
)
def test_storage_daemon_page_has_exactly_the_typed_options(
    section: str, options_type: type[Any], besides: set[str]
) -> None:
    documented = options_of("vhostblk-storage-daemon.1", section)
    rows = {name: values for name, values, _ in describe_options(options_type)}
    assert documented.keys() == rows.keys() | besides
    for name, values in rows.items():
        check_values(documented[name], values)


def check_values(entry: Entry, values: str) -> None:
    """`values` is what `describe_options` says: type or words, then `(required)` or a default."""
    words = values.partition(" (")[0]
    if words not in ("string", "size", "number", "seconds"):
        assert entry.tag.partition("=")[2] == words
    if "(required)" in values:
        assert "Required." in entry.text, entry.tag
    elif match := re.search(r"\(default: (.*)\)", values):
        assert re.search(rf"Default: {re.escape(match[1])}( \(.*\))?\.", entry.text), entry.tag
    else:
        assert "Required." not in entry.text, entry.tag
        assert "Default: " not in entry.text, entry.tag


def test_storage_daemon_page_has_every_driver() -> None:
    subsections = " ".join(
        line[4:].replace("\\-", "-")
        for line in (FOLDER / "vhostblk-storage-daemon.1").read_text().splitlines()
        if line.startswith(".SS")
    )
    assert set(DRIVERS) <= set(re.findall(r"[\w-]+", subsections))
    documented = options_of("vhostblk-storage-daemon.1", "Options of every node")
    assert set(re.findall(r"\w[\w-]+", documented["driver"].text)) >= set(DRIVERS)


def test_what_is_refused_by_name_is_said_to_be() -> None:
    page = "".join(
        plain(line) for line in (FOLDER / "vhostblk-storage-daemon.1").read_text().splitlines()
    )
    for name in storage_daemon._NOT_YET:
        assert f"--{name}" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_is_of_this_version(page: Path) -> None:
    title = next(line for line in page.read_text().splitlines() if line.startswith(".TH"))
    assert f'"vhostblk {__version__}"' in title


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_renders_without_a_warning(page: Path) -> None:
    groff = require("groff")
    done = subprocess.run(
        [groff, "-ww", "-t", "-man", "-Tascii", "-P-cbou", "-rLL=78n", str(page)],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "serve" in done.stdout
    if mandoc := shutil.which("mandoc"):
        lint = subprocess.run(
            [mandoc, "-T", "lint", "-W", "warning", str(page)],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert lint.stdout == ""


def test_pages_are_installed_with_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["data-files"]["share/man/man1"]
    installed = {path for pattern in patterns for path in ROOT.glob(pattern)}
    assert installed == set(PAGES)
