"""Numbers as qemu-io's commands take them, and what it says of others.

A size is decimal or hexadecimal, with a suffix for powers of 1024; a fraction needs a suffix. Offsets and lengths are
sizes. Other numbers are as strtol(3) reads them: octal after a zero.
"""

from __future__ import annotations

import logging
import re

from vhostblk.cli.io.command import CommandError

log = logging.getLogger(__name__)

# Space before the digits is skipped, as strtol(3) does: arguments are separated by spaces, tabs are a part of them.
_SPACE = r"[\t\n\v\f\r ]*"
_DECIMAL = re.compile(_SPACE + r"\+?([0-9]+)(?:\.([0-9]*))?([bkmgtpe]?)\Z", re.IGNORECASE)
# After hexadecimal digits b and e are two more of them.
_HEXADECIMAL = re.compile(_SPACE + r"\+?0x([0-9a-f]+)([kmgtp]?)\Z", re.IGNORECASE)
_DEPRECATED = re.compile(_SPACE + r"\+?0x[0-9a-f]+[kmgtp]", re.IGNORECASE)
_SUFFIXES = "BKMGTPE"
_INT64_MAX = (1 << 63) - 1
_UINT64 = 1 << 64
# Python refuses to read thousands of digits; these are too large anyway.
_MOST_DIGITS = 40

_STRTOL = re.compile(_SPACE + r"[+-]?(?:0x[0-9a-f]+|0[0-7]*|[1-9][0-9]*)\Z", re.IGNORECASE)


def size(text: str) -> int:
    """Bytes: `512`, `0x200`, `1.5k`.

    Raises:
        CommandError: it is no such number, or does not fit into 63 bits.
    """
    if _DEPRECATED.match(text):
        log.warning("Using a multiplier suffix on hex numbers is deprecated: %s", text)
    if match := _HEXADECIMAL.match(text):
        digits, suffix, fraction = match[1], match[2], 0
        base = 16
    elif match := _DECIMAL.match(text):
        digits, suffix, base = match[1], match[3], 10
        # QEMU's precision: 64 bits behind the point, of a double; .999… that rounds to 1 is lost.
        fraction = int(float(f"0.{match[2] or 0}") * _UINT64) % _UINT64
    else:
        raise _not_a_number(text)
    scale: int = 1024 ** _SUFFIXES.index(suffix.upper() or "B")
    if fraction and scale == 1:
        raise _not_a_number(text)
    digits = digits.lstrip("0") or "0"
    value = int(digits[:_MOST_DIGITS], base) * scale + (fraction * scale + _UINT64 // 2) // _UINT64
    if value > _INT64_MAX:
        raise CommandError(f"Parsing error: argument too large -- {text}")
    return value


def _not_a_number(text: str) -> CommandError:
    return CommandError(
        f"Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}"
    )


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
