"""Options read as getopt_long(3) reads them; what is blamed was tried with glibc's."""

from __future__ import annotations

import pytest

from vhostblk.cli.option_reader import OptionError, OptionReader

LETTERS = "hqf:o:"
NAMES = {"help": False, "object": True, "output": True, "image-opts": False}


def read(*words: str, in_order: bool = False) -> tuple[list[tuple[str, str]], list[str]]:
    reader = OptionReader("create", words, LETTERS, NAMES, in_order=in_order)
    return list(reader), reader.rest


@pytest.mark.parametrize(
    ("words", "options", "rest"),
    [
        ("", [], []),
        ("a b", [], ["a", "b"]),
        ("a -q b", [("-q", "")], ["a", "b"]),
        ("-qfraw a", [("-q", ""), ("-f", "raw")], ["a"]),
        ("-qf raw a", [("-q", ""), ("-f", "raw")], ["a"]),
        ("-f -q a", [("-f", "-q")], ["a"]),
        ("-q -- -f a", [("-q", "")], ["-f", "a"]),
        ("- -q", [("-q", "")], ["-"]),
        ("--object a --output=b c", [("--object", "a"), ("--output", "b")], ["c"]),
        ("--object=", [("--object", "")], []),
        ("--im --he", [("--image-opts", ""), ("--help", "")], []),
        ("--obj -- a", [("--object", "--")], ["a"]),
    ],
)
def test_options_stand_anywhere(
    words: str, options: list[tuple[str, str]], rest: list[str]
) -> None:
    assert read(*words.split()) == (options, rest)


def test_options_behind_the_first_word_are_for_somebody_else() -> None:
    assert read("-q", "create", "-f", "raw", in_order=True) == (
        [("-q", "")],
        ["create", "-f", "raw"],
    )


@pytest.mark.parametrize(
    ("words", "blamed", "message"),
    [
        ("-Z", "-Z", "invalid option -- 'Z'"),
        ("-Zq", "create", "invalid option -- 'Z'"),
        ("-qZ", "-qZ", "invalid option -- 'Z'"),
        ("x -Zq", "x", "invalid option -- 'Z'"),
        ("-f raw -Zq", "raw", "invalid option -- 'Z'"),
        ("-q x -Zq", "x", "invalid option -- 'Z'"),
        ("-:", "-:", "invalid option -- ':'"),
        ("--what=1 -q", "--what=1", "unrecognized option '--what=1'"),
        ("--o", "--o", "option '--o' is ambiguous; possibilities: '--object' '--output'"),
        ("--help=1", "--help=1", "option '--help' doesn't allow an argument"),
    ],
)
def test_the_word_where_reading_stopped_is_blamed(words: str, blamed: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        read(*words.split())
    assert (caught.value.word, str(caught.value)) == (blamed, message)
    assert not caught.value.lacks_value


@pytest.mark.parametrize(
    ("words", "blamed", "message"),
    [
        ("a -f", "-f", "option requires an argument -- 'f'"),
        ("-qf", "-qf", "option requires an argument -- 'f'"),
        ("--out", "--out", "option '--output' requires an argument"),
    ],
)
def test_values_may_be_missing(words: str, blamed: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        read(*words.split())
    assert (caught.value.word, str(caught.value)) == (blamed, message)
    assert caught.value.lacks_value


def test_options_before_the_wrong_one_have_been_looked_at() -> None:
    reader = iter(OptionReader("create", ["-q", "-Z"], LETTERS, NAMES))
    assert next(reader) == ("-q", "")
    with pytest.raises(OptionError):
        next(reader)
