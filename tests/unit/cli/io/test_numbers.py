"""Numbers as qemu-io reads them: the accepted ones are what qemu-io 7.2 made of them."""

from __future__ import annotations

import pytest

from vhostblk.cli.io.command import CommandError
from vhostblk.cli.io.numbers import milliseconds, pattern_byte, size

EIB = 1 << 60


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("010", 10),
        ("007k", 7168),
        ("+5", 5),
        ("\t8k", 8192),
        ("\t0x10", 16),
        ("1.", 1),
        ("1.0b", 1),
        ("1.k", 1024),
        ("1.5K", 1536),
        ("0.3k", 307),
        ("0.0005k", 1),
        ("1.00049k", 1025),
        ("1.999999k", 2048),
        ("1.999999999999999999999k", 1024),
        ("3M", 3 << 20),
        ("1g", 1 << 30),
        ("5p", 5 << 50),
        ("1e", EIB),
        ("1.E", EIB),
        ("0x1F", 31),
        ("0x1b", 27),
        ("0x1e", 30),
        ("+0x1", 1),
        ("0x7fffffffffffffff", 8 * EIB - 1),
        ("7.9999999999999999999E", 7 * EIB),
    ],
)
def test_size(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "-",
            "+",
            "-1",
            "--",
            ".5",
            ".5k",
            ".",
            "1.5",
            "1.5b",
            "1e3",
            "1.5e3",
            "1.5e+3",
            "1kk",
            "1KB",
            "1z",
        ),
        *(
            "0x",
            "0xg",
            "0x1.8",
            "0x-1",
            "0b1",
            "1_000",
            "1,5",
            "nan",
            "infinity",
            "1.+5k",
            "1.5.5",
            "1k1",
            "\u0661",
        ),
        *("99999999999999999999z", "0x10000000000000000z"),
    ],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(CommandError, match="non-numeric argument"):
        size(text)


@pytest.mark.parametrize(
    "text",
    [
        "8E",
        "9223372036854775808",
        "99999999999999999999",
        "0x8000000000000000",
        "9" * 5000,
        "0x" + "f" * 5000,
    ],
)
def test_size_that_does_not_fit(text: str) -> None:
    with pytest.raises(CommandError, match="argument too large"):
        size(text)


@pytest.mark.warns("multiplier suffix on hex numbers is deprecated: 0x1k")
def test_suffix_of_a_hexadecimal_number_is_taken_and_complained_about() -> None:
    assert size("0x1k") == 1024


def test_pattern_is_a_byte_in_any_base_of_c() -> None:
    assert [pattern_byte(text) for text in ("0", "205", "0xcd", "0315", "+5")] == [
        0,
        205,
        205,
        205,
        5,
    ]
    for text in ("256", "-1", "08", "0x", "x", "1k", "", "9" * 5000):
        with pytest.raises(CommandError, match="is not a valid pattern byte"):
            pattern_byte(text)


def test_milliseconds_are_not_negative() -> None:
    assert milliseconds("0x10") == 16
    for text in ("-5", "x", "1s"):
        with pytest.raises(CommandError, match="is not a valid number"):
            milliseconds(text)
