"""What queues have served: counts, bytes, errors and latencies per operation.

Whoever moves the data counts in a queue's words of a statistics page (stats_layout.py): the engine by itself, the
Python data path through `QueueCounters`. Everybody else copies them out, and adds, subtracts or shows the copies.

Knows nothing of shared memory, nor of the engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from vhostblk.export.ages import Ages
from vhostblk.export.stats_layout import (
    LATENCY_BUCKETS,
    OPERATION_FIELDS,
    OPERATION_WORDS,
    OPERATIONS,
    QUEUE_FIELDS_AT,
    latency_bound,
    latency_bucket,
)
from vhostblk.virtio.blk import RequestType

#: What a request is called, here and in the log; all others are "other".
OPERATION_OF: Mapping[int, str] = MappingProxyType(
    {
        RequestType.IN: "read",
        RequestType.OUT: "write",
        RequestType.FLUSH: "flush",
        RequestType.DISCARD: "discard",
        RequestType.WRITE_ZEROES: "write_zeroes",
        RequestType.GET_ID: "get_id",
    }
)
assert set(OPERATION_OF.values()) < set(OPERATIONS)

# Words of an operation and of a queue.
_REQUESTS, _BYTES, _ERRORS, _LATENCY, _LATENCY_MAX = range(len(OPERATION_FIELDS))
_BUCKETS = len(OPERATION_FIELDS)
_KICKS, _CALLS, _CALLS_SUPPRESSED, _HITS, _MISSES, _IN_FLIGHT = range(
    QUEUE_FIELDS_AT, QUEUE_FIELDS_AT + 6
)
_INVALID = QUEUE_FIELDS_AT + 6
_LAST, _OLDEST = _INVALID + len(OPERATIONS), _INVALID + len(OPERATIONS) + 1


class QueueCounters:
    """A queue's words, for the data path in Python to count in.

    Args:
        words: `QUEUE_WORDS` 64-bit integers; readers may look at any time.

    Context: the control loop, one writer.
    """

    __slots__ = ("_ages", "_words")

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self._ages = Ages()

    def kicked(self) -> None:
        """The driver has notified us."""
        self._words[_KICKS] += 1

    def called(self) -> None:
        """The driver was notified."""
        self._words[_CALLS] += 1

    def call_suppressed(self) -> None:
        """The driver did not want to be notified."""
        self._words[_CALLS_SUPPRESSED] += 1

    def began(self) -> int:
        """A request was taken; gives what `finished` has to be told. All go through Python here, so none is a hit."""
        age = self._ages.begin(time.monotonic_ns())
        self._words[_MISSES] += 1
        self._words[_IN_FLIGHT] += 1
        self._words[_OLDEST] = self._ages.oldest
        return age

    def suspended(self) -> None:
        """A request was left in flight, and is somebody else's."""
        self._words[_IN_FLIGHT] -= 1

    def finished(
        self, operation: str, length: int, failed: bool, ns: int, age: int, *, refused: bool = False
    ) -> None:
        """A request was answered.

        Args:
            operation: one of `OPERATIONS`.
            length: bytes, not counted if it failed.
            ns: how long it took.
            age: what `began` has given.
            refused: it broke a rule, and so was not tried; it has failed, too.
        """
        words, number = self._words, OPERATIONS.index(operation)
        at = number * OPERATION_WORDS
        words[at + _REQUESTS] += 1
        words[at + _BYTES] += 0 if failed else length
        words[at + _ERRORS] += failed
        words[at + _LATENCY] += ns
        words[at + _LATENCY_MAX] = max(words[at + _LATENCY_MAX], ns)
        words[at + _BUCKETS + latency_bucket(ns)] += 1
        words[_IN_FLIGHT] -= 1
        self._ages.end(age)
        words[_OLDEST] = self._ages.oldest
        words[_INVALID + number] += refused
        words[_LAST] = time.monotonic_ns()


def in_flight_in(words: memoryview) -> tuple[int, int]:
    """Of a queue's words: how many requests are in flight, and `oldest_ns`."""
    return words[_IN_FLIGHT], words[_OLDEST]


@dataclass(slots=True)
class OperationStatistics:
    """One kind of request."""

    requests: int = 0
    bytes: int = 0
    errors: int = 0
    latency_ns: int = 0  # sum
    latency_max_ns: int = 0
    latency: list[int] = field(default_factory=lambda: [0] * LATENCY_BUCKETS)
    invalid: int = 0  # of the errors: refused without being tried

    @classmethod
    def of(cls, words: Sequence[int], invalid: int = 0) -> OperationStatistics:
        """A copy of `struct vb_op_stats`, and what is elsewhere."""
        requests, length, errors, latency_ns, latency_max_ns, *latency = words
        return cls(requests, length, errors, latency_ns, latency_max_ns, latency, invalid)

    def add(self, other: OperationStatistics) -> None:
        """Count all that another has counted."""
        if not other.requests:
            return  # whoever counts begins with this one
        self.requests += other.requests
        self.bytes += other.bytes
        self.errors += other.errors
        self.invalid += other.invalid
        self.latency_ns += other.latency_ns
        self.latency_max_ns = max(self.latency_max_ns, other.latency_max_ns)
        for bucket, count in enumerate(other.latency):
            self.latency[bucket] += count

    def since(self, earlier: OperationStatistics) -> OperationStatistics:
        """What was counted after an earlier copy. The longest latency of that time is known up to its bucket."""
        latency = [
            max(now - then, 0) for now, then in zip(self.latency, earlier.latency, strict=True)
        ]
        longest = max((bucket for bucket, count in enumerate(latency) if count), default=-1)
        return OperationStatistics(
            max(self.requests - earlier.requests, 0),
            max(self.bytes - earlier.bytes, 0),
            max(self.errors - earlier.errors, 0),
            max(self.latency_ns - earlier.latency_ns, 0),
            min(latency_bound(longest + 1), self.latency_max_ns) if longest >= 0 else 0,
            latency,
            max(self.invalid - earlier.invalid, 0),
        )

    @property
    def mean_ns(self) -> float:
        """The mean latency; 0 if there were no requests."""
        return self.latency_ns / self.requests if self.requests else 0.0

    def quantile(self, fraction: float) -> int:
        """The latency in ns that this fraction of the requests did not exceed; 0 if there were none.

        At most a quarter too high.
        """
        if not self.requests:
            return 0
        # Not `requests`: a copy of counters that are being written may have more of them.
        rank = fraction * sum(self.latency)
        seen = 0
        for bucket, count in enumerate(self.latency):
            seen += count
            if count and seen >= rank:
                # The last bucket has no upper bound.
                last = bucket == LATENCY_BUCKETS - 1
                return (
                    self.latency_max_ns
                    if last
                    else min(latency_bound(bucket + 1), self.latency_max_ns)
                )
        return 0


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
    last_ns: int = 0  # CLOCK_MONOTONIC, when a request was answered last; 0: none was
    oldest_ns: int = (
        0  # the same, when the oldest in flight was taken, at the earliest; 0: none is in flight
    )

    @classmethod
    def of(cls, words: memoryview | Sequence[int]) -> QueueStatistics:
        """A copy of `struct vb_queue_stats`. Each number is whole; together they are not of one instant."""
        copy = words.tolist() if isinstance(words, memoryview) else words
        operations = {
            name: OperationStatistics.of(
                copy[at * OPERATION_WORDS : (at + 1) * OPERATION_WORDS], copy[_INVALID + at]
            )
            for at, name in enumerate(OPERATIONS)
        }
        return cls(operations, *(*copy[QUEUE_FIELDS_AT:_INVALID], copy[_LAST], copy[_OLDEST]))

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
        self.last_ns = max(self.last_ns, other.last_ns)
        both = [at for at in (self.oldest_ns, other.oldest_ns) if at]
        self.oldest_ns = min(both, default=0)

    def since(self, earlier: QueueStatistics) -> QueueStatistics:
        """What was counted after an earlier copy; what is in flight is so now."""
        operations = {
            name: operation.since(earlier.operations[name])
            for name, operation in self.operations.items()
        }
        return QueueStatistics(
            operations,
            max(self.kicks - earlier.kicks, 0),
            max(self.calls - earlier.calls, 0),
            max(self.calls_suppressed - earlier.calls_suppressed, 0),
            max(self.hits - earlier.hits, 0),
            max(self.misses - earlier.misses, 0),
            self.in_flight,
            self.last_ns,
            self.oldest_ns,
        )

    @property
    def idle_ns(self) -> int | None:
        """How long ago the last request was answered, until now; None if there was none."""
        return max(time.monotonic_ns() - self.last_ns, 0) if self.last_ns else None

    @property
    def oldest_age_ns(self) -> int | None:
        """How long the oldest request has been in flight, at most, until now; None if none is."""
        return max(time.monotonic_ns() - self.oldest_ns, 0) if self.oldest_ns else None

    @property
    def requests(self) -> int:
        """All operations together."""
        return sum(operation.requests for operation in self.operations.values())

    @property
    def hit_rate(self) -> float | None:
        """The part of the requests that the engine served alone, 0 to 1; None if there were none."""
        known = self.hits + self.misses
        return self.hits / known if known else None

    def per_request(self, events: int) -> float | None:
        """How many events there were for each request; None if there were no requests."""
        return events / self.requests if self.requests else None


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
                f"{operation.mean_ns / 1000:>10.1f}"
                f"{operation.quantile(0.99) / 1000:>10.1f}{operation.latency_max_ns / 1000:>10.1f}"
            )
    lines.append(
        f"served by the engine alone {statistics.hits}, with Python {statistics.misses}; "
        f"kicks {statistics.kicks}, calls {statistics.calls} "
        f"({statistics.calls_suppressed} suppressed)"
    )
    return lines
