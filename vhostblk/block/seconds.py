"""Durations, as options take them.

Knows nothing about what they are for.
"""

from __future__ import annotations

import re
from typing import Any

from vhostblk.block.options import OptionType
from vhostblk.errors import ConfigError

MAX_SECONDS = 31_536_000
"""A year."""
_DECIMAL = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?\Z")


def seconds(text: str) -> float:
    """A duration, with decimals if need be.

    Raises:
        ValueError: it is none, or longer than a year.
    """
    value = float(text) if _DECIMAL.match(text) else -1.0
    if not 0 <= value <= MAX_SECONDS:
        raise ValueError(f"'{text}' is not a number of seconds from 0 to {MAX_SECONDS}")
    return value


def to_seconds(name: str, value: Any) -> float:
    """The same as a parameter; a number in JSON will do."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return seconds(str(value) if is_number else value if isinstance(value, str) else "")
    except ValueError:
        raise ConfigError(
            f"Parameter '{name}' expects seconds from 0 to {MAX_SECONDS}, not '{value}'"
        ) from None


SECONDS = OptionType(to_seconds, "seconds")
