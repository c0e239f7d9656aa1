"""Counters, what is made of copies of them, and the table for people."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostblk.export.statistics import (
    OperationStatistics,
    QueueCounters,
    QueueStatistics,
    describe,
    total,
)
from vhostblk.export.stats_layout import QUEUE_WORDS, WORD, latency_bound


class Queue:
    """Words, what counts in them, and what a reader finds there."""

    def __init__(self) -> None:
        self.words = memoryview(bytearray(QUEUE_WORDS * WORD)).cast("Q")
        self.counters = QueueCounters(self.words)

    def serve(self, operation: str, length: int = 0, failed: bool = False, ns: int = 1) -> None:
        age = self.counters.began()
        self.counters.finished(operation, length, failed, ns, age)

    @property
    def read(self) -> QueueStatistics:
        return QueueStatistics.of(self.words)


@given(st.lists(st.integers(0, 10**14), min_size=1), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_not_below_the_true_one_and_at_most_a_quarter_above(
    latencies: list[int], fraction: float
) -> None:
    queue = Queue()
    for ns in latencies:
        queue.serve("write", 1, ns=ns)
    ranked = sorted(latencies)
    true = ranked[max(0, -(-int(fraction * 1000) * len(ranked) // 1000) - 1)]
    found = queue.read.operations["write"].quantile(fraction)
    assert true <= found
    assert found <= true + true // 4 + 1 or true >= latency_bound(159)


def test_no_requests_have_no_latency() -> None:
    nothing = OperationStatistics()
    assert (nothing.quantile(0.99), nothing.mean_ns) == (0, 0.0)
    queue = QueueStatistics()
    assert (queue.hit_rate, queue.per_request(3)) == (None, None)


def test_failed_requests_count_no_bytes() -> None:
    queue = Queue()
    queue.serve("discard", 4096, failed=True)
    queue.serve("discard", 512)
    operation = queue.read.operations["discard"]
    assert (operation.requests, operation.errors, operation.bytes) == (2, 1, 512)


def test_a_request_is_in_flight_until_it_is_finished() -> None:
    queue = Queue()
    queue.counters.began()
    queue.counters.began()
    assert (queue.read.in_flight, queue.read.requests) == (2, 0)
    queue.counters.finished("flush", 0, False, 5, 0)
    assert (queue.read.in_flight, queue.read.requests, queue.read.misses) == (1, 1, 2)


def test_notifications_are_counted_where_readers_look_for_them() -> None:
    queue = Queue()
    queue.counters.kicked()
    for _ in range(2):
        queue.counters.called()
    for _ in range(3):
        queue.counters.call_suppressed()
    read = queue.read
    assert (read.kicks, read.calls, read.calls_suppressed) == (1, 2, 3)


def test_the_total_is_the_sum_of_the_queues() -> None:
    one, two = Queue(), Queue()
    one.serve("read", 512, ns=100)
    two.serve("read", 1024, ns=50)
    two.serve("flush", ns=7)
    whole = total([one.read, two.read])
    assert (whole.hits, whole.misses, whole.requests) == (0, 3, 3)
    assert whole.operations["read"].bytes == 1536
    assert whole.operations["read"].latency_max_ns == 100
    assert whole.operations["read"].quantile(0.5) <= 63
    assert whole.hit_rate == 0
    assert whole.per_request(6) == 2


def test_what_came_since_an_earlier_copy_is_without_what_was_before() -> None:
    queue = Queue()
    queue.serve("read", 512, ns=1_000_000)
    queue.counters.kicked()
    before = queue.read
    queue.serve("read", 1024, ns=100)
    queue.counters.began()
    queue.counters.kicked()
    since = queue.read.since(before)
    read = since.operations["read"]
    assert (since.requests, since.kicks, since.misses, since.in_flight) == (1, 1, 2, 1)
    assert (read.bytes, read.latency_ns, read.mean_ns) == (1024, 100, 100)
    # The slow one was before; the bucket of 100 ns ends at 112.
    assert 100 <= read.latency_max_ns <= 112
    assert 100 <= read.quantile(0.5) <= 112
    assert queue.read.since(queue.read).operations["read"].latency_max_ns == 0


def test_counters_that_begin_again_are_not_negative() -> None:
    """The page of a new daemon under the name of one that ended."""
    queue = Queue()
    queue.serve("read", 512)
    since = QueueStatistics().since(queue.read)
    assert since == QueueStatistics()


@pytest.mark.parametrize("operation", ["write", "get_id", "other"])
def test_the_table_shows_only_operations_that_occurred(operation: str) -> None:
    queue = Queue()
    queue.serve(operation, 512, ns=2500)
    lines = describe(queue.read)
    assert any(line.startswith(operation) and " 2.5 " in line + " " for line in lines)
    assert not any(line.startswith("read") for line in lines)
