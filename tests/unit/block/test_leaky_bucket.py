"""Leaky buckets (row B30.4): rates, bursts, and limits that contradict each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostblk.block.leaky_bucket import LARGEST, LeakyBucket, ThrottleLimits
from vhostblk.block.options import consume
from vhostblk.errors import ConfigError


def serve(bucket: LeakyBucket, seconds: float) -> int:
    """How many requests of one unit come through in this time, if there are always more."""
    now, count = 0.0, 0
    while now < seconds:
        wait = bucket.wait()
        if wait:
            wait = max(wait, 1e-7)
            bucket.leak(wait)
            now += wait
        else:
            bucket.fill(1)
            count += 1
    return count


def test_without_a_burst_a_tenth_of_a_second_comes_at_once() -> None:
    assert serve(LeakyBucket(100), 1e-9) == 11
    assert serve(LeakyBucket(0), 0) == 0
    assert LeakyBucket(0).wait() == 0


def test_a_burst_lasts_as_long_as_it_may_and_then_the_rate_holds() -> None:
    # 1000 a second for 2 seconds, then 100 a second.
    during = serve(LeakyBucket(100, 1000, 2), 2)
    assert 1990 <= during <= 2310
    total = serve(LeakyBucket(100, 1000, 2), 12)
    assert 2900 <= total <= 3310
    # A burst of one second may all come at once.
    assert 1000 <= serve(LeakyBucket(100, 1000, 1), 1e-9) <= 1001


@given(st.integers(1, 500), st.integers(0, 4), st.integers(1, 4), st.integers(1, 5))
def test_no_bucket_lets_through_more_than_rate_and_burst_allow(
    rate: int, factor: int, burst: int, seconds: int
) -> None:
    maximum = rate * factor
    count = serve(LeakyBucket(rate, maximum, burst if factor else 1), seconds)
    room = maximum * burst if factor else rate / 10
    assert count <= rate * seconds + room + 2
    assert count >= rate * seconds * 0.98 - 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bps-total": 1, "bps-read": 1}, "'bps-total' cannot be used with 'bps-read'"),
        ({"iops-total-max": 5, "iops-total": 1, "iops-write-max": 1, "iops-write": 1}, "cannot be"),
        ({"iops-read-max": 5}, "'iops-read-max' requires 'iops-read'"),
        ({"iops-read": 9, "iops-read-max": 5}, "cannot be lower than 'iops-read'"),
        ({"iops-read": 9, "iops-read-max-length": 5}, "requires 'iops-read-max'"),
        ({"iops-read": 9, "iops-read-max-length": 0}, "cannot be 0"),
        ({"iops-read": LARGEST + 1}, "must be within"),
        (
            {"bps-read": 1, "bps-read-max": LARGEST, "bps-read-max-length": 2},
            "'bps-read-max-length' is too high",
        ),
        ({"iops-size": 4096, "bps-total": 1}, "'iops-size' requires an iops limit"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(
    options: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        consume(ThrottleLimits, dict(options))
