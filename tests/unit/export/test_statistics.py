"""Latency buckets and sums."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vhostblk.export.statistics import (
    LATENCY_BUCKETS,
    OperationStatistics,
    QueueStatistics,
    describe,
    latency_bound,
    latency_bucket,
    total,
)


@given(st.integers(0, latency_bound(LATENCY_BUCKETS) - 1))
def test_a_latency_lies_between_the_bounds_of_its_bucket(ns: int) -> None:
    bucket = latency_bucket(ns)
    assert latency_bound(bucket) <= ns < latency_bound(bucket + 1)


def test_a_bucket_is_at_most_a_quarter_wide() -> None:
    for bucket in range(4, LATENCY_BUCKETS):
        low, high = latency_bound(bucket), latency_bound(bucket + 1)
        assert (high - low) * 4 <= low


def test_latencies_beyond_the_last_bucket_are_in_it() -> None:
    assert latency_bucket(1 << 60) == LATENCY_BUCKETS - 1


@given(st.lists(st.integers(0, 10**10), min_size=1), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_not_below_the_true_one_and_at_most_a_quarter_above(
    latencies: list[int], fraction: float
) -> None:
    operation = OperationStatistics()
    for ns in latencies:
        operation.record(1, False, ns)
    ranked = sorted(latencies)
    true = ranked[max(0, -(-int(fraction * 1000) * len(ranked) // 1000) - 1)]
    assert true <= operation.quantile(fraction) <= true + true // 4 + 1


def test_failed_requests_count_no_bytes() -> None:
    operation = OperationStatistics()
    operation.record(4096, True, 10)
    operation.record(512, False, 10)
    assert (operation.requests, operation.errors, operation.bytes) == (2, 1, 512)


def test_the_total_is_the_sum_of_the_queues() -> None:
    queues = [QueueStatistics(kicks=1, hits=2), QueueStatistics(kicks=3, misses=4)]
    queues[0].operations["read"].record(512, False, 100)
    queues[1].operations["read"].record(1024, False, 50)
    queues[1].operations["flush"].record(0, False, 7)
    whole = total(queues)
    assert (whole.kicks, whole.hits, whole.misses, whole.requests) == (4, 2, 4, 3)
    assert whole.operations["read"].bytes == 1536
    assert whole.operations["read"].latency_max_ns == 100


def test_the_table_shows_only_operations_that_occurred() -> None:
    queue = QueueStatistics()
    queue.operations["write"].record(512, False, 2500)
    lines = describe(queue)
    assert any(line.startswith("write") and " 2.5 " in line + " " for line in lines)
    assert not any(line.startswith("read") for line in lines)
