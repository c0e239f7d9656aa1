"""Percentiles from the generator's buckets."""

from __future__ import annotations

import random

import pytest

from vhostblk.client.bench.result import CURVE, PERCENTILES, percentiles
from vhostblk.native import load

pytestmark = pytest.mark.skipif(not load.available(), reason="the generator is not built")


def histogram_of(values: list[int]) -> list[int]:
    histogram = [0] * load.BUCKETS
    for value in values:
        histogram[load.bucket_of(value)] += 1
    return histogram


def test_percentiles_of_nothing_are_zero() -> None:
    assert set(percentiles([0] * load.BUCKETS).values()) == {0}


def test_percentile_is_the_request_that_is_reached_then() -> None:
    # Below 128 ticks each value has a bucket of its own.
    histogram = histogram_of(list(range(1, 101)))
    assert percentiles(histogram, [1, 50, 99, 99.5, 100]) == {
        1: 1,
        50: 50,
        99: 99,
        99.5: 100,
        100: 100,
    }


def test_percentiles_are_too_large_by_two_percent_at_most() -> None:
    chance = random.Random(5)
    values = sorted(int(chance.lognormvariate(10, 2)) + 1 for _ in range(20000))
    found = percentiles(histogram_of(values))
    for percent in PERCENTILES:
        exact = values[-(-len(values) * round(percent * 100) // 10000) - 1]
        assert exact <= found[percent] <= exact * 1.02 + 1


def test_latency_that_is_off_the_scale_is_in_the_last_bucket() -> None:
    histogram = histogram_of([1 << 60])
    assert histogram[-1] == 1
    assert percentiles(histogram, [50])[50] == load.bucket_bound(load.BUCKETS - 1) - 1


def test_curve_begins_where_anything_is_and_ends_at_the_last_percentile() -> None:
    assert 0 < CURVE[0] < CURVE[-1] == max(PERCENTILES)
    assert list(CURVE) == sorted(CURVE)
