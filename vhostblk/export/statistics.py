"""What an export has served: counts, bytes, errors and latencies per operation.

Latencies are kept in logarithmic buckets, four per power of two, so a quantile is at most a quarter too high. The
engine counts in the same buckets (`struct vb_op_stats` in native/engine.h).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

# Order of enum vb_op.
OPERATIONS = ("read", "write", "flush", "discard", "write_zeroes", "get_id", "other")
LATENCY_BUCKETS = 160


def latency_bucket(ns: int) -> int:
    """The bucket a latency falls into."""
    if ns < 4:
        return max(ns, 0)
    exponent = ns.bit_length() - 1
    return min((exponent - 1) * 4 + ((ns >> (exponent - 2)) & 3), LATENCY_BUCKETS - 1)


def latency_bound(bucket: int) -> int:
    """The smallest latency, in ns, that falls into a bucket."""
    if bucket < 4:
        return bucket
    return (4 + bucket % 4) << (bucket // 4 - 1)


@dataclass(slots=True)
class OperationStatistics:
    """One kind of request."""

    requests: int = 0
    bytes: int = 0
    errors: int = 0
    latency_ns: int = 0  # sum
    latency_max_ns: int = 0
    latency: list[int] = field(default_factory=lambda: [0] * LATENCY_BUCKETS)

    def record(self, length: int, failed: bool, ns: int) -> None:
        """Count one finished request."""
        self.requests += 1
        self.bytes += 0 if failed else length
        self.errors += failed
        self.latency_ns += ns
        self.latency_max_ns = max(self.latency_max_ns, ns)
        self.latency[latency_bucket(ns)] += 1

    def add(self, other: OperationStatistics) -> None:
        """Count all that another has counted."""
        self.requests += other.requests
        self.bytes += other.bytes
        self.errors += other.errors
        self.latency_ns += other.latency_ns
        self.latency_max_ns = max(self.latency_max_ns, other.latency_max_ns)
        for bucket, count in enumerate(other.latency):
            self.latency[bucket] += count

    def quantile(self, fraction: float) -> int:
        """The latency in ns that this fraction of the requests did not exceed; 0 if there were none."""
        rank = fraction * self.requests
        seen = 0
        for bucket, count in enumerate(self.latency):
            seen += count
            if count and seen >= rank:
                return min(latency_bound(bucket + 1), self.latency_max_ns)
        return self.latency_max_ns


@dataclass(slots=True)
class QueueStatistics:
    """One virtqueue, or the sum of several."""

    operations: dict[str, OperationStatistics] = field(
        default_factory=lambda: {name: OperationStatistics() for name in OPERATIONS}
    )
    kicks: int = 0  # notifications received
    calls: int = 0  # notifications sent
    calls_suppressed: int = 0  # not sent because the driver did not want them
    hits: int = 0  # served by the engine alone
    misses: int = 0  # served with the help of Python
    in_flight: int = 0

    def add(self, other: QueueStatistics) -> None:
        """Count all that another has counted."""
        for name, operation in other.operations.items():
            self.operations[name].add(operation)
        self.kicks += other.kicks
        self.calls += other.calls
        self.calls_suppressed += other.calls_suppressed
        self.hits += other.hits
        self.misses += other.misses
        self.in_flight += other.in_flight

    @property
    def requests(self) -> int:
        """All operations together."""
        return sum(operation.requests for operation in self.operations.values())


def total(queues: Iterable[QueueStatistics]) -> QueueStatistics:
    """The sum over several queues."""
    result = QueueStatistics()
    for queue in queues:
        result.add(queue)
    return result


def describe(statistics: QueueStatistics) -> list[str]:
    """A small table for people: one line per operation that occurred, then the notifications."""
    lines = [
        f"{'operation':<13}{'requests':>10}{'bytes':>15}{'errors':>8}{'mean us':>10}{'p99 us':>10}"
        f"{'max us':>10}"
    ]
    for name, operation in statistics.operations.items():
        if operation.requests:
            lines.append(
                f"{name:<13}{operation.requests:>10}{operation.bytes:>15}{operation.errors:>8}"
                f"{operation.latency_ns / operation.requests / 1000:>10.1f}"
                f"{operation.quantile(0.99) / 1000:>10.1f}{operation.latency_max_ns / 1000:>10.1f}"
            )
    lines.append(
        f"served by the engine alone {statistics.hits}, with Python {statistics.misses}; "
        f"kicks {statistics.kicks}, calls {statistics.calls} "
        f"({statistics.calls_suppressed} suppressed)"
    )
    return lines
