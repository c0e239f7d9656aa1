"""Numbers as qemu-io's commands take them, and what it says of others.

A size is decimal or hexadecimal, with a suffix for powers of 1024; a fraction needs a suffix. Offsets and lengths are
sizes. Other numbers are as strtol(3) reads them: octal after a zero.
"""

from __future__ import annotations

import re

from vhostblk.block.sizes import read_size
from vhostblk.cli.io.command import CommandError

_INT64_MAX = (1 << 63) - 1
# Python refuses to read thousands of digits; these are too large anyway.
_MOST_DIGITS = 40

# Space before the digits is skipped: arguments are separated by spaces, tabs are a part of them.
_STRTOL = re.compile(r"[\t\n\v\f\r ]*[+-]?(?:0x[0-9a-f]+|0[0-7]*|[1-9][0-9]*)\Z", re.IGNORECASE)


def size(text: str) -> int:
    """Bytes: `512`, `0x200`, `1.5k`.

    Raises:
        CommandError: it is no such number, or does not fit into 63 bits.
    """
    try:
        value = read_size(text)
    except ValueError:
        raise CommandError(
            f"Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}"
        ) from None
    except OverflowError:
        value = _INT64_MAX + 1
    if value > _INT64_MAX:
        raise CommandError(f"Parsing error: argument too large -- {text}")
    return value


def pattern_byte(text: str) -> int:
    """What a pattern repeats: 0 to 255.

    Raises:
        CommandError: it is no such number.
    """
    value = _strtol(text)
    if value is None or not 0 <= value <= 255:
        raise CommandError(f"{text} is not a valid pattern byte")
    return value


def milliseconds(text: str) -> int:
    """How long to sleep.

    Raises:
        CommandError: it is not a number.
    """
    value = _strtol(text)
    if value is None or value < 0:
        raise CommandError(f"{text} is not a valid number")
    return value


def _strtol(text: str) -> int | None:
    if not _STRTOL.match(text) or len(text) > _MOST_DIGITS:
        return None
    text = text.lstrip()
    digits = text.lstrip("+-").lower()
    base = 16 if digits.startswith("0x") else 8 if digits.startswith("0") else 10
    value = int(digits, base)
    return -value if text.startswith("-") else value
