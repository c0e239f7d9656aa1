"""Arguments of commands: getopt's order, getopt's words."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from vhostblk.cli.io.command import (
    Arguments,
    CommandError,
    ComplaintError,
    UsageError,
    flag,
    operand,
    operands,
    parse,
    valued,
)
from vhostblk.cli.io.numbers import pattern_byte, size
from vhostblk.cli.io.table import COMMANDS


@dataclass
class Some(Arguments):
    """Of all kinds."""

    quiet: bool = flag("q")
    stop: bool = flag("i", ends=True)
    pattern: int | None = valued("P", pattern_byte)
    offset: int = operand(size)
    rest: tuple[str, ...] = operands(1)

    def check(self) -> None:
        if self.quiet and self.pattern == 0:
            raise CommandError("not together")


@pytest.mark.parametrize(
    "words",
    ["-q -P 5 1k a b", "1k a b -qP5", "1k -P 5 a -q b", "-qP 5 -- 1k a b"],
)
def test_options_are_taken_in_any_place(words: str) -> None:
    found = parse(Some, "some", words.split())
    assert (found.quiet, found.pattern, found.offset, found.rest) == (True, 5, 1024, ("a", "b"))


def test_what_was_not_given_is_none_or_false() -> None:
    found = parse(Some, "some", ["0", "-"])
    assert (found.quiet, found.stop, found.pattern, found.rest) == (False, False, None, ("-",))


def test_option_that_ends_hides_what_is_wrong_behind_it() -> None:
    assert parse(Some, "some", ["-i", "-x"]).stop


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ("-x 1 2", UsageError, "some: invalid option -- 'x'"),
        ("-1 2 3", UsageError, "some: invalid option -- '1'"),
        ("1 2 -P", UsageError, "some: option requires an argument -- 'P'"),
        ("-P x -x", CommandError, "x is not a valid pattern byte"),
        ("-x -P x", UsageError, "some: invalid option -- 'x'"),
        ("1", UsageError, "^$"),
        ("-qP0 1", UsageError, "^$"),
        ("-qP0 x 1", CommandError, "not together"),
        ("x 1", CommandError, "non-numeric argument"),
    ],
)
def test_first_thing_that_is_wrong_is_what_is_said(
    words: str, kind: type[CommandError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        parse(Some, "some", words.split())


def test_commands_without_options_take_dashes_as_they_are() -> None:
    found = parse(COMMANDS["alloc"].takes, "alloc", ["--"])
    assert found.words == ("--",)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        ("read", 1, "expected at least 2 arguments"),
        ("f", 1, "bad argument count 1 to f, expected 0 arguments"),
        ("alloc", 3, "expected between 1 and 2 arguments"),
        ("break", 1, "expected 2 arguments"),
    ],
)
def test_number_of_words_is_checked_first(name: str, count: int, expected: str) -> None:
    with pytest.raises(ComplaintError, match=expected):
        COMMANDS[name].check_words(name, count)


def test_every_command_explains_itself() -> None:
    for row in COMMANDS.values():
        assert row.usage.startswith(row.name)
        assert not row.about.endswith(".")
        for line in row.details.splitlines():
            assert len(line) <= 100, line
        letters = {
            field.metadata["letter"]
            for field in row.takes.__dataclass_fields__.values()
            if "letter" in field.metadata
        }
        for letter in letters:
            assert f" -{letter}" in row.details or f", -{letter}" in row.details, (row.name, letter)
