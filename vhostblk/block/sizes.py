"""Sizes as QEMU's image tools read them: decimal or hexadecimal, with a suffix for powers of 1024.

A fraction needs a suffix. Knows nothing about what tools say of those that they cannot read.
"""

from __future__ import annotations

import logging
import re

log = logging.getLogger(__name__)

# Space before the digits is skipped, as strtoull(3) does.
_SPACE = r"[\t\n\v\f\r ]*"
_DECIMAL = _SPACE + r"\+?([0-9]+)(?:\.([0-9]*))?([bkmgtpe]?)\Z"
# After hexadecimal digits b and e are two more of them.
_HEXADECIMAL = _SPACE + r"\+?0x([0-9a-f]+)([kmgtp]?)\Z"
_DEPRECATED = _SPACE + r"\+?0x[0-9a-f]+[kmgtp]"
_SUFFIXES = "BKMGTPE"
_UINT64 = 1 << 64
# Python refuses to read thousands of digits; these are too large anyway.
_MOST_DIGITS = 40


def read_size(text: str) -> int:
    """Bytes: `512`, `0x200`, `1.5k`.

    Raises:
        ValueError: it is no such number.
        OverflowError: it does not fit into 64 bits.
    """
    if re.match(_DEPRECATED, text, re.IGNORECASE):
        warning = f"Using a multiplier suffix on hex numbers is deprecated: {text}"
        log.warning("%s", warning, extra={"qemu_warns": warning})
    if match := re.match(_HEXADECIMAL, text, re.IGNORECASE):
        digits, suffix, fraction = match[1], match[2], 0
        base = 16
    elif match := re.match(_DECIMAL, text, re.IGNORECASE):
        digits, suffix, base = match[1], match[3], 10
        # QEMU's precision: 64 bits behind the point, of a double; .999… that rounds to 1 is lost.
        fraction = int(float(f"0.{match[2] or 0}") * _UINT64) % _UINT64
    else:
        raise ValueError(text)
    scale: int = 1024 ** _SUFFIXES.index(suffix.upper() or "B")
    if fraction and scale == 1:
        raise ValueError(text)
    digits = digits.lstrip("0") or "0"
    value = int(digits[:_MOST_DIGITS], base) * scale + (fraction * scale + _UINT64 // 2) // _UINT64
    if value >= _UINT64:
        raise OverflowError(text)
    return value
