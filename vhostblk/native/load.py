"""The load generator of `vhostblk bench`: `load.h` as Python sees it.

Names here are its names. The generator's threads run without Python; what they count is read where
they count it, at any time.

Knows nothing of vhost-user, nor of how options are spelled.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vhostblk.errors import StateError
from vhostblk.native.binding import check

__all__ = [
    "BUCKETS",
    "Load",
    "LoadEcho",
    "LoadError",
    "LoadFailure",
    "LoadModel",
    "LoadOp",
    "LoadOptions",
    "LoadPhase",
    "LoadRing",
    "LoadStats",
    "OpStats",
    "address_of",
    "available",
    "bucket_bound",
    "bucket_of",
    "calibrate",
    "clock_cost",
    "clock_is_tsc",
    "ring_entries",
    "slots_size",
    "ticks",
]

BUCKETS = 2496
"""Length of a latency histogram."""


class LoadOp(enum.IntEnum):
    """`enum vb_load_op`."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    WRITE_ZEROES = 4


class LoadPhase(enum.IntEnum):
    """`enum vb_load_phase`."""

    RAMP = 0
    MEASURE = 1
    DRAIN = 2
    ABANDON = 3


class LoadFailure(enum.IntEnum):
    """`enum vb_load_failure`."""

    OK = 0
    STATUS = 1
    MISMATCH = 2
    USED_IDX = 3
    USED_ID = 4
    NO_STATUS = 5
    OS = 6


@dataclass(frozen=True)
class LoadOptions:
    """`struct vb_load_options`, without its model."""

    offset: int
    size: int
    block_min: int
    block_max: int
    weights: tuple[int, int, int, int, int]
    random: bool = True
    once: bool = False
    flush_every: int = 0
    unmap: bool = False
    segments: int = 1
    depth: int = 32
    batch: int = 0
    indirect: bool = True
    event_idx: bool = True
    packed: bool = False
    sleep: bool = False
    threads: int = 1
    rate: int = 0
    requests: int = 0
    no_ramp: bool = False
    seed: int = 0
    known_only: bool = False
    skip_unknown: bool = False


class LoadRing(NamedTuple):
    """`struct vb_load_ring`."""

    desc: int
    avail: int
    used: int
    size: int
    kick_fd: int
    call_fd: int
    slots: int
    slots_gpa: int


@dataclass
class OpStats:
    """`struct vb_load_op_stats`, of all threads."""

    requests: int = 0
    bytes: int = 0
    latency_ticks: int = 0
    latency_max: int = 0
    """Ticks."""


@dataclass
class LoadStats:
    """`struct vb_load_stats`, of all threads."""

    op: list[OpStats]
    begin: int = 0
    """Ticks; the first thread's."""
    end: int = 0
    """Ticks; the last thread's, 0 while one is at it."""
    busy_ticks: int = 0
    batches: int = 0
    kicks: int = 0
    calls: int = 0
    sleeps: int = 0
    cpu_user_us: int = 0
    cpu_system_us: int = 0
    compared: int = 0
    """Bytes."""

    @property
    def requests(self) -> int:
        """Of all operations."""
        return sum(op.requests for op in self.op)

    @property
    def bytes(self) -> int:
        """Of all operations."""
        return sum(op.bytes for op in self.op)


_SUMMED = (
    *("busy_ticks", "batches", "kicks", "calls", "sleeps", "cpu_user_us", "cpu_system_us"),
    "compared",
)


@dataclass(frozen=True)
class LoadError:
    """`struct vb_load_error`."""

    failure: LoadFailure
    op: LoadOp
    queue: int
    length: int
    offset: int
    found: int
    expected_generation: int
    expected_zero: bool
    at: int
    expected: bytes
    sector: bytes


@functools.cache
def _extension() -> Any:
    """Load it when it is needed first: commands that need none do not have it in their memory."""
    try:
        return importlib.import_module("vhostblk.native._load")
    except ImportError as error:
        raise StateError(f"the load generator was not built: {error}") from None


def available() -> bool:
    """Whether the extension was built and can be loaded."""
    try:
        _extension()
    except StateError:
        return False
    return True


def address_of(buffer: memoryview) -> int:
    """Where a buffer is in this process."""
    ffi = _extension().ffi
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))


def ticks() -> int:
    """The generator's clock."""
    return int(_extension().lib.vb_load_ticks())


def calibrate() -> float:
    """Ticks of a second; takes 20 ms."""
    return float(_extension().lib.vb_load_calibrate())


def clock_cost() -> float:
    """Ticks that a look at the clock takes; the least of many."""
    return float(_extension().lib.vb_load_clock_cost())


def clock_is_tsc() -> bool:
    """Whether ticks are the processor's counter's, not nanoseconds."""
    return bool(_extension().lib.vb_load_clock_is_tsc())


def bucket_of(latency: int) -> int:
    """Index of the bucket that so many ticks are counted in."""
    return int(_extension().lib.vb_load_bucket(latency))


def bucket_bound(bucket: int) -> int:
    """The least number of ticks that is counted in a bucket."""
    return int(_extension().lib.vb_load_bucket_bound(bucket))


def slots_size(options: LoadOptions) -> int:
    """Bytes of guest memory that each queue's requests need."""
    return int(_extension().lib.vb_load_slots_size(_c_options(options)))


def ring_entries(options: LoadOptions) -> int:
    """Entries a ring must have at least."""
    return int(_extension().lib.vb_load_ring_entries(_c_options(options)))


def _c_options(options: LoadOptions, model: LoadModel | None = None) -> Any:
    ffi = _extension().ffi
    fields = dataclasses.asdict(options)
    fields["model"] = ffi.NULL if model is None else model._model
    return ffi.new("struct vb_load_options *", fields)


def _c_rings(rings: Sequence[LoadRing]) -> Any:
    return _extension().ffi.new("struct vb_load_ring[]", [ring._asdict() for ring in rings])


class LoadModel:
    """What each block of a range must contain.

    Args:
        offset, size: of the range, bytes.
        block: bytes of the smallest write.
        seed: of the contents.
        stamp: tells generations of one run from another's.

    Raises:
        OSError: no memory, or sizes that do not fit together.

    Context: one thread; generators may use it meanwhile. Must outlive them.
    """

    def __init__(self, offset: int, size: int, block: int, *, seed: int, stamp: int) -> None:
        ret = _new("struct vb_load_model **")
        check(
            _extension().lib.vb_load_model_create(offset, size, block, seed, stamp, ret),
            "what to expect",
        )
        self._model = ret[0]

    @property
    def known(self) -> int:
        """Blocks whose content is known."""
        return int(_extension().lib.vb_load_model_known(self._model))

    def sector(self, offset: int, generation: int) -> bytes:
        """Content of 512 bytes after a write."""
        ffi = _extension().ffi
        buffer = ffi.new("char[512]")
        _extension().lib.vb_load_model_sector(self._model, offset, generation, buffer)
        return bytes(ffi.buffer(buffer))

    def close(self) -> None:
        """Free it. Idempotent."""
        if self._model is not None:
            _extension().lib.vb_load_model_destroy(self._model)
            self._model = None


class Load:
    """Threads that make requests, from now on.

    Args:
        options: see `load.h`.
        rings: nothing is in flight there; memory and fds are borrowed.
        model: what reads are compared with; borrowed.

    Raises:
        OSError: EINVAL for options that contradict each other, EBUSY for rings in use.

    Context: one thread. Owns: the threads.
    """

    def __init__(
        self, options: LoadOptions, rings: Sequence[LoadRing], model: LoadModel | None = None
    ) -> None:
        ret = _new("struct vb_load **")
        c_options, c_rings = _c_options(options, model), _c_rings(rings)
        check(
            _extension().lib.vb_load_create(c_options, c_rings, len(rings), ret), "load generator"
        )
        self._load = ret[0]
        self._threads = options.threads
        self.fd: int = _extension().lib.vb_load_fd(self._load)
        """Becomes readable when a thread has ended."""

    @property
    def running(self) -> int:
        """Threads that have not ended."""
        return int(_extension().lib.vb_load_running(self._load))

    @property
    def in_flight(self) -> int:
        """Requests on all queues."""
        return int(_extension().lib.vb_load_in_flight(self._load))

    @property
    def phase(self) -> LoadPhase:
        """Where it is; a failure makes it ABANDON."""
        return LoadPhase(_extension().lib.vb_load_phase(self._load))

    def set_phase(self, phase: LoadPhase) -> None:
        """Go on to a later phase."""
        _extension().lib.vb_load_set_phase(self._load, phase)

    def stats(self, phase: LoadPhase) -> LoadStats:
        """What was counted in a phase up to now."""
        sums = LoadStats([OpStats() for _ in LoadOp])
        ends = []
        for thread in range(self._threads):
            part = _extension().lib.vb_load_stats(self._load, thread, phase)
            for name in _SUMMED:
                setattr(sums, name, getattr(sums, name) + getattr(part, name))
            for op, theirs in zip(sums.op, part.op, strict=True):
                op.requests += theirs.requests
                op.bytes += theirs.bytes
                op.latency_ticks += theirs.latency_ticks
                op.latency_max = max(op.latency_max, theirs.latency_max)
            if part.begin:
                sums.begin = min(part.begin, sums.begin or part.begin)
                ends.append(part.end)
        sums.end = max(ends) if ends and all(ends) else 0
        return sums

    def histogram(self, phase: LoadPhase, op: LoadOp) -> list[int]:
        """Requests in each bucket."""
        sums = [0] * BUCKETS
        buffer = _extension().ffi.buffer
        for thread in range(self._threads):
            part = _extension().lib.vb_load_histogram(self._load, thread, phase, op)
            counts = array("Q", bytes(buffer(part, 8 * BUCKETS)))
            sums = [a + b for a, b in zip(sums, counts, strict=True)]
        return sums

    @property
    def error(self) -> LoadError | None:
        """What went wrong first; final once `running` is 0."""
        error = _extension().lib.vb_load_error(self._load)
        if not error.failure:
            return None
        return LoadError(
            LoadFailure(error.failure),
            LoadOp(error.op),
            error.queue,
            error.length,
            error.offset,
            error.found,
            error.expected_generation,
            bool(error.expected_zero),
            error.at,
            bytes(error.expected),
            bytes(error.sector),
        )

    def close(self) -> None:
        """Leave what is in flight, and wait for the threads. Idempotent."""
        if self._load is not None:
            self.set_phase(LoadPhase.ABANDON)
            _extension().lib.vb_load_destroy(self._load)
            self._load = None


class LoadEcho:
    """A device that completes everything at once.

    Args:
        rings: whose guest physical addresses are addresses of this process; borrowed.

    Owns: its thread.
    """

    def __init__(self, rings: Sequence[LoadRing]) -> None:
        ret = _new("struct vb_load_echo **")
        check(_extension().lib.vb_load_echo_create(_c_rings(rings), len(rings), ret), "echo")
        self._echo = ret[0]

    def close(self) -> None:
        """End it. Idempotent."""
        if self._echo is not None:
            _extension().lib.vb_load_echo_destroy(self._echo)
            self._echo = None


def _new(what: str) -> Any:
    return _extension().ffi.new(what)
