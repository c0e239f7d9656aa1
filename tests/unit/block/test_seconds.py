"""Durations are decimal numbers, not negative, and not longer than a year."""

from __future__ import annotations

from typing import Any

import pytest

from vhostblk.block.seconds import MAX_SECONDS, seconds, to_seconds
from vhostblk.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "expected"),
    [("0", 0), ("60", 60), ("0.05", 0.05), ("007", 7), (60, 60), (0.5, 0.5), (MAX_SECONDS,) * 2],
)
def test_durations(value: Any, expected: float) -> None:
    assert to_seconds("t", value) == expected


@pytest.mark.parametrize(
    "value",
    [
        *("", "-1", "1e3", "nan", "inf", "1s", " 1", "1.", ".5", "1_0", "٣", "9" * 40, "31536001"),
        *(-1, True, None, 1e300, float("nan"), float("inf"), [], {}),
    ],
)
def test_whatever_is_none_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ConfigError, match="Parameter 't' expects seconds from 0 to 31536000"):
        to_seconds("t", value)
    if isinstance(value, str):
        with pytest.raises(ValueError, match="is not a number of seconds"):
            seconds(value)
