"""Alternating, medians, ratios."""

from __future__ import annotations

from collections.abc import Callable

from tests.unit.client.bench.results import result
from vhostblk.client.bench.compare import METRICS, Comparison, compare, metrics_of
from vhostblk.client.bench.result import BenchResult


def test_two_sides_take_turns_and_so_does_who_begins() -> None:
    order = []

    def side(name: str) -> Callable[[], BenchResult]:
        def run() -> BenchResult:
            order.append(name)
            return result(len(order))

        return run

    comparison = compare(side("a"), side("b"), 3)

    assert "".join(order) == "abbaab"
    assert [r.iops for r in comparison.first] == [1, 4, 5]
    assert [r.iops for r in comparison.second] == [2, 3, 6]


def test_ratio_is_that_of_the_medians() -> None:
    comparison = Comparison(
        [result(iops) for iops in (300, 100, 900)], [result(iops) for iops in (50, 150, 100)]
    )
    ours, theirs = comparison.medians
    assert (ours["iops"], theirs["iops"]) == (300, 100)
    assert comparison.ratios["iops"] == 3


def test_what_is_not_known_or_zero_has_no_ratio() -> None:
    comparison = Comparison([result(cpu=None)], [result(cpu=0.5)])
    assert comparison.medians[0]["backend_cpu_us"] is None
    assert comparison.ratios["backend_cpu_us"] is None
    assert comparison.ratios["calls_per_request"] is None


def test_every_metric_of_a_result_is_compared() -> None:
    assert tuple(metrics_of(result())) == METRICS
