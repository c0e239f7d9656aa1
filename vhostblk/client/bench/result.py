"""What came out of a benchmark, as numbers for people and programs.

Knows nothing of how they are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from vhostblk.native.load import BUCKETS, bucket_bound

__all__ = ["CURVE", "PERCENTILES", "BenchResult", "OpResult", "percentiles"]

PERCENTILES = (50.0, 90.0, 99.0, 99.9, 99.99)


def percentiles(
    histogram: Sequence[int], wanted: Sequence[float] = PERCENTILES
) -> dict[float, int]:
    """Find the latencies that so many percent of the requests did not exceed.

    Args:
        histogram: requests in each of the generator's buckets.
        wanted: percent, each more than 0 and at most 100.

    Returns:
        Ticks; the upper end of the bucket, so too much by 1.6 % at most. 0 where nothing happened.
    """
    sums = list(accumulate(histogram))
    total = sums[-1]
    found = {}
    for percent in wanted:
        # The request that is reached first when so many percent are counted.
        rank = max(1, -(-total * round(percent * 10000) // 1_000_000))
        bucket = next((i for i, count in enumerate(sums) if count >= rank), -1)
        last = bucket + 1 if bucket + 1 < BUCKETS else bucket
        found[percent] = bucket_bound(last) - 1 if total and bucket >= 0 else 0
    return found


@dataclass(frozen=True)
class OpResult:
    """One operation. Latencies are microseconds."""

    requests: int
    bytes: int
    iops: float
    bytes_per_second: float
    mean_us: float
    percentiles_us: dict[str, float]
    """By percent: "50", "99.9"."""
    max_us: float


CURVE = tuple(
    sorted(
        {float(p) for p in range(0, 100, 5)}
        | {1, 90, 95, 98, 99, 99.5, 99.8, 99.9, 99.95, 99.98, 99.99}
    )
)[1:]
"""Percent of the points that a latency curve is drawn through."""


@dataclass(frozen=True)
class BenchResult:
    """One run against one back-end. Times of a request are microseconds, of both sides together or one."""

    socket: str
    seconds: float
    requests: int
    iops: float
    bytes_per_second: float
    latency: OpResult
    """All operations together."""
    operations: dict[str, OpResult]
    """By name; those that occurred."""
    backend_cpu_us: float | None
    """CPU time of the back-end's process for each request; None if the process cannot be seen."""
    backend_cpu_percent: float | None
    """Of one processor."""
    client_cpu_us: float
    """CPU time of the generator's threads for each request, waiting (polling) included."""
    client_busy_us: float
    """Time the generator was at work on each request: what it adds to the measurement."""
    kicks_per_request: float
    calls_per_request: float
    batch: float
    """Completions found at once, on average."""
    compared: int
    """Bytes that were compared with what they must be."""
    curve: list[tuple[float, float]]
    """(percent, microseconds) of all operations, for a drawing."""
    samples: list[tuple[float, float]]
    """(seconds since the measured part began, IOPS since the sample before)."""
    verified_blocks: int = 0
    """Blocks read once more after the run."""
