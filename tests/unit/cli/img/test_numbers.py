"""Sizes as qemu-img reads them, and what it says of others."""

from __future__ import annotations

import pytest

from vhostblk.cli.img.arguments import ImgError
from vhostblk.cli.img.numbers import size


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("1.5k", 1536), ("0x10", 16), ("\t7", 7), ("9223372036854775807", (1 << 63) - 1)],
)
def test_a_size_is_bytes_with_a_suffix(text: str, value: int) -> None:
    assert size("rate limit", text) == value


@pytest.mark.parametrize("text", ["", "-1", "k", "1.5", "1 k", "0x1.8k"])
def test_what_is_no_size_is_refused_in_two_lines(text: str) -> None:
    with pytest.raises(ImgError) as refused:
        size("rate limit", text)
    assert str(refused.value) == (
        "Invalid rate limit specified. You may use k, M, G, T, P or E suffixes for"
    )
    assert list(refused.value.more) == [
        "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
    ]


@pytest.mark.parametrize("text", ["8E", "16E", "99999999999999999999999", "511"])
def test_a_size_out_of_range_is_refused_with_the_range(text: str) -> None:
    with pytest.raises(ImgError) as refused:
        size("buffer size", text, 512)
    assert str(refused.value) == (
        "Invalid buffer size specified. Must be between 512 and 9223372036854775807."
    )
