"""The layout of a statistics page: what is where, as docs/statistics.md has it for readers in other languages.

A page is a header and then, for each queue, a `struct vb_queue_stats` (native/engine.h). Both are made of native
integers at multiples of their size, so whoever maps a page reads each counter in one piece.

Sans-io, and without the engine: writers and readers of pages share this module and nothing else.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntFlag

MAGIC = b"VBSTATS\0"
VERSION = 1

# Order of enum vb_op.
OPERATIONS = ("read", "write", "flush", "discard", "write_zeroes", "get_id", "other")

# Latencies are kept in logarithmic buckets: one per nanosecond below 4 ns, then four per power of two, so each is at
# most a quarter wide. The last one has everything beyond.
LATENCY_BUCKETS = 160
LATENCY_DIVISIONS = 4

WORD = 8
"""Bytes of a counter. Offsets within a queue's counters are in words."""

OPERATION_FIELDS = ("requests", "bytes", "errors", "latency_ns", "latency_max_ns")
"""`struct vb_op_stats`, before its latency buckets."""
OPERATION_WORDS = len(OPERATION_FIELDS) + LATENCY_BUCKETS
QUEUE_FIELDS = (
    *("kicks", "calls", "calls_suppressed", "hits", "misses", "in_flight"),
    *(f"invalid[{at}]" for at in range(len(OPERATIONS))),
    *("last_ns", "oldest_ns"),
)
"""`struct vb_queue_stats`, behind its operations."""
QUEUE_FIELDS_AT = len(OPERATIONS) * OPERATION_WORDS
QUEUE_WORDS = QUEUE_FIELDS_AT + len(QUEUE_FIELDS)

HEADER_SIZE = 512
QUEUE_STRIDE = -(-QUEUE_WORDS * WORD // 64) * 64
"""Bytes from one queue to the next: two engine threads never write the same cache line."""
MAX_QUEUES = 256
"""vhost-user's: an index of a queue has 8 bits."""

HEADER_FIELDS = (
    ("magic", "8s"),
    ("version", "I"),
    ("header_size", "I"),
    ("flags", "I"),
    ("pid", "I"),
    ("created_ns", "Q"),
    ("queues", "I"),
    ("queues_started", "I"),
    ("queue_stride", "I"),
    ("queue_size", "I"),
    ("operations", "I"),
    ("operation_size", "I"),
    ("latency_buckets", "I"),
    ("latency_divisions", "I"),
    ("sessions", "Q"),
    ("connected", "Q"),
    ("export", "256s"),
)
"""Name and format of each field, in order, without gaps."""
HEADER = struct.Struct("@" + "".join(form for _, form in HEADER_FIELDS))


def header_offset(name: str) -> int:
    """Where a field of the header is, bytes."""
    names = [field for field, _ in HEADER_FIELDS]
    return struct.calcsize("@" + "".join(form for _, form in HEADER_FIELDS[: names.index(name)]))


class PageFlag(IntFlag):
    """The header's `flags`. Readers ignore those they do not know."""

    PARTIAL = 1  # there was no room for some queues: their counters are not in the page
    NATIVE = 2  # the engine serves; without: the Python data path


class PageError(ValueError):
    """This is no statistics page, or one of another version."""


class VersionError(PageError):
    """A page of another version."""


@dataclass(frozen=True, slots=True)
class PageHeader:
    """What a page says of itself.

    Attributes:
        created_ns: when the export was opened, nanoseconds since 1970.
        queues: how many an export may have; the page has room for so many.
        queues_started: counters of queues from this index on are zero, and may not even have memory.
        sessions: front-ends that have connected so far.
        connected: front-ends that are connected.
    """

    export: str
    pid: int
    created_ns: int
    flags: int
    queues: int
    queues_started: int = 0
    sessions: int = 0
    connected: int = 0
    header_size: int = HEADER_SIZE
    queue_stride: int = QUEUE_STRIDE

    def pack(self) -> bytes:
        """The header as it is in memory; a longer name is cut."""
        return HEADER.pack(
            MAGIC,
            VERSION,
            self.header_size,
            self.flags,
            self.pid,
            self.created_ns,
            self.queues,
            self.queues_started,
            self.queue_stride,
            QUEUE_WORDS * WORD,
            len(OPERATIONS),
            OPERATION_WORDS * WORD,
            LATENCY_BUCKETS,
            LATENCY_DIVISIONS,
            self.sessions,
            self.connected,
            self.export.encode("utf-8", "replace")[:255],
        )

    @classmethod
    def parse(cls, raw: bytes) -> PageHeader:
        """Understand the beginning of a page. Anybody may have written it.

        Raises:
            VersionError: it is one of another version.
            PageError: it is none.
        """
        if len(raw) < HEADER.size or not raw.startswith(MAGIC):
            raise PageError("not a statistics page")
        names = (name for name, _ in HEADER_FIELDS)
        found = dict(zip(names, HEADER.unpack_from(raw), strict=True))
        if found["version"] != VERSION:
            raise VersionError(f"layout version {found['version']}; this reader knows {VERSION}")
        # A later page of this version may have more at the end of the header and of each queue.
        fits = (
            found["header_size"] >= HEADER.size
            and found["header_size"] % WORD == 0
            and found["queue_size"] >= QUEUE_WORDS * WORD
            and found["queue_stride"] >= found["queue_size"]
            and found["queue_stride"] % WORD == 0
            and found["operations"] == len(OPERATIONS)
            and found["operation_size"] == OPERATION_WORDS * WORD
            and found["latency_buckets"] == LATENCY_BUCKETS
            and found["latency_divisions"] == LATENCY_DIVISIONS
            and found["queues_started"] <= found["queues"] <= MAX_QUEUES
        )
        if not fits:
            raise PageError("its header contradicts itself")
        name = found["export"].partition(b"\0")[0].decode("utf-8", "replace")
        return cls(
            export="".join(char if char.isprintable() else "?" for char in name),
            pid=found["pid"],
            created_ns=found["created_ns"],
            flags=found["flags"],
            queues=found["queues"],
            queues_started=found["queues_started"],
            sessions=found["sessions"],
            connected=found["connected"],
            header_size=found["header_size"],
            queue_stride=found["queue_stride"],
        )

    def queue_offset(self, index: int) -> int:
        """Where the counters of a queue begin, bytes."""
        return self.header_size + index * self.queue_stride

    @property
    def size(self) -> int:
        """Bytes of the whole page."""
        return self.queue_offset(self.queues)


def latency_bucket(ns: int) -> int:
    """The bucket a latency falls into."""
    if ns < LATENCY_DIVISIONS:
        return max(ns, 0)
    exponent = ns.bit_length() - 1
    return min((exponent - 1) * 4 + ((ns >> (exponent - 2)) & 3), LATENCY_BUCKETS - 1)


def latency_bound(bucket: int) -> int:
    """The smallest latency, in ns, that falls into a bucket."""
    if bucket < LATENCY_DIVISIONS:
        return bucket
    return (4 + bucket % 4) << (bucket // 4 - 1)
