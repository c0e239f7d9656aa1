"""Numbers as qemu-img takes them, and what it says of others."""

from __future__ import annotations

import re

from vhostblk.block.sizes import read_size
from vhostblk.cli.img.arguments import ImgError

INT_MAX = (1 << 31) - 1
INT64_MAX = (1 << 63) - 1
_INTEGER = r"[\t\n\v\f\r ]*([+-]?)(?:0[xX]([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*))\Z"
# Python refuses to read thousands of digits; these are too large anyway.
_MOST_DIGITS = 40


def size(what: str, text: str, least: int = 0, most: int = INT64_MAX) -> int:
    """Bytes: `512`, `0x200`, `1.5k`.

    Args:
        what: how the message calls it (`rate limit`).

    Raises:
        ImgError: it is no such number, or is outside what is allowed.
    """
    try:
        value = read_size(text)
    except ValueError:
        raise ImgError(
            f"Invalid {what} specified. You may use k, M, G, T, P or E suffixes for",
            more=["kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."],
        ) from None
    except OverflowError:
        value = -1
    if not least <= value <= most:
        raise ImgError(f"Invalid {what} specified. Must be between {least} and {most}.")
    return value


def integer(text: str) -> int:
    """A whole number as strtol(3) reads it: decimal, octal behind a 0, hexadecimal behind a 0x.

    Raises:
        ValueError: it is no such number.
    """
    match = re.match(_INTEGER, text)
    if match is None:
        raise ValueError(text)
    sign, hexadecimal, octal, decimal = match.groups()
    value = (
        int(hexadecimal, 16)
        if hexadecimal
        else int(octal, 8)
        if octal
        else int(decimal[:_MOST_DIGITS])
    )
    return -value if sign == "-" else value
