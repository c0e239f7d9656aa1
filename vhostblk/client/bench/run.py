"""Performing a benchmark: the generator is started, watched, and asked what it counted.

Theory of operation: this thread sleeps, looks twice a second at the counters, which are memory that
the generator writes, and at once at what happens on its fds: the back-end hangs up, declares a queue
broken, or a thread of the generator has ended. CPU clocks are read when the measured phase begins and
when it ends.

Knows nothing of how results are shown.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from vhostblk.client.bench.cpu import cpu_seconds
from vhostblk.client.bench.options import OPS, BenchOptions
from vhostblk.client.bench.result import CURVE, BenchResult, OpResult, percentiles
from vhostblk.client.bench.session import BenchSession
from vhostblk.errors import PeerError, SessionError
from vhostblk.native import load as native
from vhostblk.native.load import (
    Load,
    LoadError,
    LoadFailure,
    LoadModel,
    LoadOp,
    LoadOptions,
    LoadPhase,
)

__all__ = ["Progress", "Tell", "bench", "describe_failure"]

_TICK = 0.5
_STATUS_NAMES = {1: "IOERR", 2: "UNSUPP"}


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    phase: str
    """ramp, run or verify."""
    seconds: float
    """Since the phase began."""
    iops: float
    """Since the last report."""
    bytes_per_second: float
    requests: int


Tell = Callable[[Progress], None]


def bench(path: str, options: BenchOptions, tell: Tell | None = None) -> BenchResult:
    """Run one benchmark against one back-end.

    Args:
        path: its socket.
        options: what to do.
        tell: called twice a second.

    Raises:
        ConfigError: the options contradict each other, or the back-end.
        PeerError: a request failed, data were wrong, or the back-end broke the ring's rules.
        SessionError: it left.
        TimeoutError: nothing finishes any more, or the client itself had no chance to work.
        OSError: nobody listens.
    """
    options.check()
    with BenchSession(path, options) as session:
        model = None
        if options.verify:
            shape = session.load_options
            stamp = time.time_ns() // 1_000_000_000 & 0xFFFFFFFF
            model = LoadModel(
                shape.offset, shape.size, shape.block_min, seed=options.seed, stamp=stamp
            )
        try:
            return _bench(session, model, tell)
        finally:
            if model is not None:
                model.close()


def _bench(session: BenchSession, model: LoadModel | None, tell: Tell | None) -> BenchResult:
    options = session.options
    changes = any(
        options.pattern.has(op) for op in (LoadOp.WRITE, LoadOp.DISCARD, LoadOp.WRITE_ZEROES)
    )
    # A run that ends by itself must not begin before it is counted.
    no_ramp = options.has_end or not options.ramp
    shape = replace(session.load_options, known_only=changes, no_ramp=no_ramp)
    result = _Run(session, shape, model, tell).measure(options)
    if model is None or not changes:
        return result
    # What was written must still be there, and be what was written last.
    again = replace(
        shape,
        weights=(1, 0, 0, 0, 0),
        random=False,
        once=True,
        block_max=shape.block_min,
        flush_every=0,
        requests=0,
        rate=0,
        no_ramp=True,
        skip_unknown=True,
    )
    known = model.known
    _Run(session, again, model, tell).finish("verify")
    return replace(result, verified_blocks=known)


class _Run:
    """One generator on a session."""

    def __init__(
        self,
        session: BenchSession,
        options: LoadOptions,
        model: LoadModel | None,
        tell: Tell | None,
    ) -> None:
        self._session = session
        self._options = options
        self._tell = tell
        self._samples: list[tuple[float, float]] = []
        self._poll = select.poll()
        self._poll.register(session.connection, select.POLLIN | select.POLLRDHUP)
        for queue in session.client.queues:
            self._poll.register(queue.err_fd, select.POLLIN)
        self._began = time.monotonic_ns(), native.ticks()
        self._cpu = cpu_seconds(session.pid)
        session.renew_rings()
        self._load = Load(options, session.rings, model)
        self._poll.register(self._load.fd, select.POLLIN)

    # ---------------------------------------------------------------- what a run is

    def measure(self, options: BenchOptions) -> BenchResult:
        """Warm up, measure, drain."""
        load, pid = self._load, self._session.pid
        try:
            began, cpu = self._began, self._cpu
            if not self._options.no_ramp:
                self._watch("ramp", LoadPhase.RAMP, options.ramp)
                cpu = cpu_seconds(pid)
                load.set_phase(LoadPhase.MEASURE)
            self._watch("run", LoadPhase.MEASURE, None if options.has_end else options.duration)
            after = cpu_seconds(pid)
            ended = time.monotonic_ns(), native.ticks()
            load.set_phase(LoadPhase.DRAIN)
            self._watch("drain", LoadPhase.DRAIN, None)
            frequency = (ended[1] - began[1]) * 1e9 / (ended[0] - began[0])
            spent = None if cpu is None or after is None else after - cpu
            return self._result(frequency, spent)
        finally:
            load.close()

    def finish(self, name: str) -> None:
        """Run until the generator has nothing more to do."""
        try:
            self._watch(name, LoadPhase.MEASURE, None)
        finally:
            self._load.close()

    # ---------------------------------------------------------------- watching

    def _watch(self, name: str, phase: LoadPhase, seconds: float | None) -> None:
        """Wait so many seconds, or until the generator has ended; raise if something is wrong."""
        load = self._load
        began = last = moved = time.monotonic()
        requests = done = bytes_done = 0
        while load.running:
            now = time.monotonic()
            left = _TICK if seconds is None else min(_TICK, began + seconds - now)
            if left <= 0:
                break
            self._sleep(left)
            now = time.monotonic()
            stats = load.stats(phase)
            if stats.requests != requests or (self._options.rate and not load.in_flight):
                requests, moved = stats.requests, now
            elif now - moved > self._session.options.timeout:
                raise TimeoutError(
                    f"no request has finished for {self._session.options.timeout:g} s,"
                    f" {load.in_flight} are in flight"
                )
            if now - last >= _TICK * 0.9:
                passed = now - last
                iops = (stats.requests - done) / passed
                if phase == LoadPhase.MEASURE:
                    self._samples.append((now - began, iops))
                if self._tell and phase != LoadPhase.DRAIN:
                    bandwidth = (stats.bytes - bytes_done) / passed
                    self._tell(Progress(name, now - began, iops, bandwidth, stats.requests))
                last, done, bytes_done = now, stats.requests, stats.bytes
        if load.phase == LoadPhase.ABANDON and not load.running and (error := load.error):
            raise PeerError(describe_failure(error))

    def _sleep(self, seconds: float) -> None:
        session, load = self._session, self._load
        ready = {fd for fd, _ in self._poll.poll(seconds * 1000)}
        if load.fd in ready:
            # Some threads may go on for a while: not to be told again and again.
            self._poll.modify(load.fd, 0)
        if session.connection in ready:
            raise SessionError(f"the back-end left with {load.in_flight} requests in flight")
        for queue in session.client.queues:
            if queue.err_fd in ready:
                raise PeerError(f"the back-end declared queue {queue.index} broken")

    # ---------------------------------------------------------------- what came out

    def _result(self, frequency: float, backend_cpu: float | None) -> BenchResult:
        stats = self._load.stats(LoadPhase.MEASURE)
        if stats.end <= stats.begin:
            raise TimeoutError("the client got no processor while it was measured: run it longer")
        seconds = (stats.end - stats.begin) / frequency
        requests = stats.requests
        each = max(requests, 1)
        operations: dict[str, OpResult] = {}
        total: list[int] = [0] * native.BUCKETS
        for name, op in OPS.items():
            counted = stats.op[op]
            if not counted.requests:
                continue
            histogram = self._load.histogram(LoadPhase.MEASURE, op)
            total = [a + b for a, b in zip(total, histogram, strict=True)]
            operations[name] = _op_result(counted, histogram, seconds, frequency)
        together = native.OpStats(
            requests,
            stats.bytes,
            sum(op.latency_ticks for op in stats.op),
            max(op.latency_max for op in stats.op),
        )
        return BenchResult(
            socket=self._session.path,
            seconds=seconds,
            requests=requests,
            iops=requests / seconds,
            bytes_per_second=stats.bytes / seconds,
            latency=_op_result(together, total, seconds, frequency),
            operations=operations,
            backend_cpu_us=None if backend_cpu is None else backend_cpu * 1e6 / each,
            backend_cpu_percent=None if backend_cpu is None else backend_cpu * 100 / seconds,
            client_cpu_us=(stats.cpu_user_us + stats.cpu_system_us) / each,
            client_busy_us=stats.busy_ticks * 1e6 / frequency / each,
            kicks_per_request=stats.kicks / each,
            calls_per_request=stats.calls / each,
            batch=requests / max(stats.batches, 1),
            compared=stats.compared,
            curve=[(p, t * 1e6 / frequency) for p, t in percentiles(total, CURVE).items()],
            samples=self._samples,
        )


def _op_result(
    counted: native.OpStats, histogram: list[int], seconds: float, frequency: float
) -> OpResult:
    most = counted.latency_max
    found = percentiles(histogram)
    return OpResult(
        requests=counted.requests,
        bytes=counted.bytes,
        iops=counted.requests / seconds,
        bytes_per_second=counted.bytes / seconds,
        mean_us=counted.latency_ticks * 1e6 / frequency / max(counted.requests, 1),
        percentiles_us={f"{p:g}": min(t, most) * 1e6 / frequency for p, t in found.items()},
        max_us=most * 1e6 / frequency,
    )


def describe_failure(error: LoadError) -> str:
    """One line that says what went wrong."""
    op = error.op.name.lower().replace("_", " ")
    where = f"{op} of {error.length} bytes at offset {error.offset}"
    match error.failure:
        case LoadFailure.STATUS:
            status = _STATUS_NAMES.get(error.found, "unknown to VIRTIO")
            return f"{where} failed: status {error.found} ({status})"
        case LoadFailure.NO_STATUS:
            return f"{where} was completed without a status"
        case LoadFailure.USED_IDX:
            return f"queue {error.queue}: {error.found} chains were used, more than were in flight"
        case LoadFailure.USED_ID:
            return f"queue {error.queue}: chain {error.found} was used, which is not in flight"
        case LoadFailure.MISMATCH:
            return _describe_mismatch(error)
    return f"the generator failed: error {error.found}"


def _describe_mismatch(error: LoadError) -> str:
    at = error.at
    found = _describe_sector(error)
    if error.expected_zero:
        expected = "zeroes"
    elif error.expected_generation:
        expected = f"generation {error.expected_generation:#x}"
    else:
        expected = "what some write with this seed left there"
    return (
        f"wrong data at offset {error.offset}: expected {expected}, got {found};"
        f" byte {at} is {error.sector[at]:#04x}, not {error.expected[at]:#04x}"
    )


def _describe_sector(error: LoadError) -> str:
    if not any(error.sector):
        return "zeroes"
    offset = int.from_bytes(error.sector[:8], "little")
    generation = int.from_bytes(error.sector[8:16], "little")
    if offset == error.offset:
        if error.expected_generation and generation != error.expected_generation:
            return f"generation {generation:#x} of it"
        return "other data of that offset (damaged, or written with another seed)"
    if offset % 512 == 0 and offset < 1 << 50 and generation >> 32:
        return f"what belongs to offset {offset}, generation {generation:#x}"
    return "something that no benchmark wrote"
