"""Typed options: values, defaults, messages."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from vhostblk.block.options import (
    BOOLEAN,
    INTEGER,
    SIZE,
    STRING,
    NodeOptions,
    choice,
    consume,
    describe_options,
    leftover,
    option,
    to_boolean,
    to_integer,
    to_size,
    words_of,
)
from vhostblk.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sample:
    path: str = option(STRING, about="where")
    max_size: int = option(SIZE, 4096, about="how much")
    count: int = option(INTEGER, 1, about="how many")
    fast: bool = option(BOOLEAN, True, about="at once", name="mode.fast")
    colour: str | None = option(choice("red", "blue"), None, about="which")


def test_consume_takes_its_options_and_leaves_the_rest() -> None:
    flat: dict[str, Any] = {"path": "x", "max-size": "2k", "mode.fast": "off", "other": "1"}
    assert consume(Sample, flat) == Sample("x", 2048, 1, False, None)
    assert flat == {"other": "1"}


def test_list_without_items_is_that_of_an_option_or_of_none() -> None:
    @dataclasses.dataclass(frozen=True)
    class Listed:
        words: tuple[str, ...] = option(words_of("red", "blue"), ("red",), about="which")

    flat: dict[str, Any] = {"words": [], "other": []}
    leftover({"words": []}, "sample", "", "", Listed)
    assert consume(Listed, flat) == Listed(())
    with pytest.raises(ConfigError, match="does not support the option 'other'"):
        leftover(flat, "sample", "", "", Listed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Parameter 'f.path' is missing"),
        ({"path": 5}, "Parameter 'f.path' expects a string, not '5'"),
        ({"path": "x", "max-size": "-1"}, "'f.max-size' expects a size .*, not '-1'"),
        ({"path": "x", "count": "1k"}, "'f.count' expects a number .*, not '1k'"),
        ({"path": "x", "mode.fast": "maybe"}, "'f.mode.fast' expects 'on' or 'off', not 'maybe'"),
        ({"path": "x", "colour": "green"}, r"value 'green' \(allowed: red, blue\)"),
    ],
)
def test_bad_values_are_named_with_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        consume(Sample, options, "f.")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("1k", 1024),
        ("1K", 1024),
        ("1M", 1 << 20),
        ("2g", 2 << 30),
        ("1T", 1 << 40),
        ("1P", 1 << 50),
        ("7E", 7 << 60),
        ("1.5G", 3 << 29),
        ("0x200", 512),
        ("10b", 10),
        (77, 77),
    ],
)
def test_sizes_have_qemus_suffixes(text: Any, size: int) -> None:
    assert to_size("s", text) == size


@pytest.mark.parametrize(
    "text", ["", "k", "1kk", "1 k", "-1", "8E", "1.5.5", -1, True, None, [], "\u0661"]
)
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match="'s' expects a size"):
        to_size("s", text)


def test_booleans_are_qemus_words_and_json_booleans() -> None:
    assert all(to_boolean("b", word) for word in ("on", "yes", "true", "y", True))
    assert not any(to_boolean("b", word) for word in ("off", "no", "false", "n", False))
    for wrong in (1, "1", None, ""):
        with pytest.raises(ConfigError):
            to_boolean("b", wrong)


def test_integers_are_plain_ascii_digits() -> None:
    assert to_integer("i", "42") == to_integer("i", 42) == 42
    for wrong in ("-1", -1, True, "4.2", "", "\u0664"):
        with pytest.raises(ConfigError):
            to_integer("i", wrong)


def test_first_leftover_is_named_with_the_driver() -> None:
    flat = {"path": "x", "bogus": "1", "worse": "2"}
    with pytest.raises(ConfigError) as caught:
        leftover(flat, "file", "disk0", "file.", Sample)
    assert str(caught.value) == (
        "Block driver 'file' (node 'disk0') does not support the option 'file.bogus'"
    )


def test_description_shows_every_option_with_its_default() -> None:
    assert describe_options(Sample) == [
        ("path", "string (required)", "where"),
        ("max-size", "size (default: 4096)", "how much"),
        ("count", "number (default: 1)", "how many"),
        ("mode.fast", "on|off (default: on)", "at once"),
        ("colour", "red|blue", "which"),
    ]


def test_node_options_understand_both_pairs_of_discard_words() -> None:
    assert consume(NodeOptions, {"discard": "on"}).discard == "unmap"
    assert consume(NodeOptions, {"discard": "off"}).discard == "ignore"


def test_what_cannot_work_yet_or_never_is_refused() -> None:
    with pytest.raises(ConfigError, match="'detect-zeroes=unmap' can only be used with 'discard"):
        consume(NodeOptions, {"detect-zeroes": "unmap"})
    with pytest.raises(ConfigError, match="'force-share=on' can only be used with 'read-only=on'"):
        consume(NodeOptions, {"force-share": "on"})
