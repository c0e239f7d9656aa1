"""Two back-ends in turn, the same benchmark on each, so that both see the same weather.

Knows nothing of how results are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from vhostblk.client.bench.options import BenchOptions
from vhostblk.client.bench.result import BenchResult
from vhostblk.client.bench.run import Tell, bench

__all__ = ["METRICS", "Comparison", "compare", "metrics_of", "side"]

METRICS = (
    *("iops", "bytes_per_second", "mean_us", "p50_us", "p90_us", "p99_us", "p99.9_us", "p99.99_us"),
    *("max_us", "backend_cpu_us", "client_cpu_us", "client_busy_us"),
    *("kicks_per_request", "calls_per_request"),
)
"""What is compared: names as in `metrics_of`."""


def metrics_of(result: BenchResult) -> dict[str, float | None]:
    """One number for each of `METRICS`; None where it is not known."""
    latency = result.latency
    values: dict[str, float | None] = {
        "iops": result.iops,
        "bytes_per_second": result.bytes_per_second,
        "mean_us": latency.mean_us,
        **{f"p{name}_us": value for name, value in latency.percentiles_us.items()},
        "max_us": latency.max_us,
        "backend_cpu_us": result.backend_cpu_us,
        "client_cpu_us": result.client_cpu_us,
        "client_busy_us": result.client_busy_us,
        "kicks_per_request": result.kicks_per_request,
        "calls_per_request": result.calls_per_request,
    }
    return {name: values[name] for name in METRICS}


def medians(results: Sequence[BenchResult]) -> dict[str, float | None]:
    """The median of each metric."""
    rows = [metrics_of(result) for result in results]
    found: dict[str, float | None] = {}
    for name in METRICS:
        known = [value for row in rows if (value := row[name]) is not None]
        found[name] = median(known) if known else None
    return found


@dataclass(frozen=True)
class Comparison:
    """All runs of both."""

    first: list[BenchResult]
    second: list[BenchResult]

    @property
    def medians(self) -> tuple[dict[str, float | None], dict[str, float | None]]:
        """Of each metric: the first's, the second's."""
        return medians(self.first), medians(self.second)

    @property
    def ratios(self) -> dict[str, float | None]:
        """The first's median divided by the second's; None where there is nothing to divide by."""
        ours, theirs = self.medians
        found: dict[str, float | None] = {}
        for name in METRICS:
            a, b = ours[name], theirs[name]
            found[name] = a / b if a is not None and b else None
        return found


def side(path: str, options: BenchOptions, tell: Tell | None = None) -> Callable[[], BenchResult]:
    """One run of a benchmark, to be called later."""
    return lambda: bench(path, options, tell)


def compare(
    first: Callable[[], BenchResult], second: Callable[[], BenchResult], runs: int
) -> Comparison:
    """Run both in turn, and who begins alternates, too.

    Raises:
        Whatever `first` and `second` raise.
    """
    ours: list[BenchResult] = []
    theirs: list[BenchResult] = []
    for number in range(runs):
        pair = [(first, ours), (second, theirs)]
        for function, results in pair if number % 2 == 0 else reversed(pair):
            results.append(function())
    return Comparison(ours, theirs)
