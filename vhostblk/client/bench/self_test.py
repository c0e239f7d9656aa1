"""What the generator itself costs: its requests are answered at once, by a thread of this process.

The echo touches what a device must touch: rings, descriptors, status. So every cache line that goes
from one processor to the other with a real back-end does so here. Other programs only ever add to
the time a request takes, hence the least of several short runs is the answer.

Knows nothing of vhost-user.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from vhostblk.client.bench.options import BenchOptions
from vhostblk.client.bench.session import load_options
from vhostblk.errors import PeerError
from vhostblk.native import load as native
from vhostblk.native.load import Load, LoadEcho, LoadOptions, LoadPhase, LoadRing
from vhostblk.virtio.driver import DriverQueue

__all__ = ["SelfTest", "self_test"]

_RUNS = 20
_SECONDS = 0.05
_RANGE = 1 << 30


@dataclass(frozen=True)
class SelfTest:
    """What was found."""

    busy_us: float
    """Time at work on each request."""
    iops: float
    """Requests that the echo answered in a second, in the best run."""
    batch: float
    """Completions found at once, on average."""
    clock: str
    """What the times were taken with."""
    ticks_per_second: float
    look_ns: float
    """What a look at the clock costs."""


def self_test(options: BenchOptions) -> SelfTest:
    """Measure the generator with these options (their queues, depth, indirection, segments, pattern).

    Raises:
        ConfigError: the options contradict each other.
    """
    options.check()
    size = max(options.size or _RANGE, options.block_max) // options.block_min * options.block_min
    # The echo has a split ring; what a packed one costs the generator is about the same.
    shape = replace(load_options(options, options.offset, size), packed=False)
    rings = _Rings(options, shape)
    frequency = native.calibrate()
    echo = LoadEcho(rings.rings)
    try:
        found = [_once(shape, rings.rings, frequency) for _ in range(_RUNS)]
    finally:
        echo.close()
        rings.close()
    best = min(found, key=lambda run: run.busy_us)
    return replace(best, iops=max(run.iops for run in found))


def _once(shape: LoadOptions, rings: list[LoadRing], frequency: float) -> SelfTest:
    load = Load(shape, rings)
    try:
        load.set_phase(LoadPhase.MEASURE)
        time.sleep(_SECONDS)
        # On a busy machine nothing may have been done by now.
        _wait_until(lambda: load.stats(LoadPhase.MEASURE).requests > 0 or not load.running)
        load.set_phase(LoadPhase.DRAIN)
        _wait_until(lambda: not load.running)
        if error := load.error:
            raise PeerError(f"the generator against its echo: {error.failure.name}")
        stats = load.stats(LoadPhase.MEASURE)
    finally:
        load.close()
    requests = max(stats.requests, 1)
    return SelfTest(
        busy_us=stats.busy_ticks * 1e6 / frequency / requests,
        iops=requests * frequency / (stats.end - stats.begin),
        batch=requests / max(stats.batches, 1),
        clock="time stamp counter" if native.clock_is_tsc() else "CLOCK_MONOTONIC",
        ticks_per_second=frequency,
        look_ns=native.clock_cost() * 1e9 / frequency,
    )


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        if time.monotonic() > deadline:
            raise PeerError("the echo does not answer")
        time.sleep(0.001)


class _Rings:
    """Memory and eventfds; guest physical addresses are this process's."""

    def __init__(self, options: BenchOptions, shape: LoadOptions) -> None:
        self._fds: list[int] = []
        self._maps: list[mmap.mmap] = []
        self._views: list[memoryview] = []
        self.rings = []
        for _ in range(options.queues):
            area = self._memory(DriverQueue.area_size(options.ring_size))
            driver = DriverQueue(area, 0, options.ring_size, event_idx=options.event_idx)
            at = native.address_of(area)
            slots = native.address_of(self._memory(native.slots_size(shape)))
            kick, call = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
            self._fds += [kick, call]
            self.rings.append(
                LoadRing(
                    at + driver.desc_offset,
                    at + driver.avail_offset,
                    at + driver.used_offset,
                    driver.size,
                    kick,
                    call,
                    slots,
                    slots,
                )
            )
            driver.close()

    def _memory(self, size: int) -> memoryview:
        self._maps.append(mmap.mmap(-1, size))
        self._views.append(memoryview(self._maps[-1]))
        return self._views[-1]

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        for view in self._views:
            view.release()
        for memory in self._maps:
            memory.close()
