"""Runs that alternate: all programs of a row are measured in turn, so that they see the same weather.

Theory of operation: run by run, each program once, and every second run in the opposite order. A run that other
programs disturbed is repeated, at most twice; then it counts, and is marked. With real-time priority others cannot
take the processors from us; nothing is repeated then. Knows nothing of tables and targets.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

from tests.bench.rows import Disk, Fio
from tests.bench.servers import Daemon, Files, Server, give_up, serving, warm
from tests.bench.servers import fio as run_fio
from tests.bench.weather import Weather
from vhostblk.client.bench.compare import metrics_of
from vhostblk.client.bench.cpu import cpu_seconds
from vhostblk.client.bench.options import BenchOptions
from vhostblk.client.bench.report import rate
from vhostblk.client.bench.run import bench
from vhostblk.client.client import Client

__all__ = ["Measure", "Metrics", "Runner", "Settings", "Side", "become_realtime"]

_DISTURBED = 0.2
"""Of a processor, used by others."""
_TRIES = 3
_RT_MOST = 20_000_000
"""Microseconds that a thread with real-time priority may go on without sleeping."""
Metrics = dict[str, float | None]
Runner = Callable[[], Metrics]


@dataclass(frozen=True)
class Settings:
    """What the command line says about all rows. Times are seconds."""

    runs: int = 5
    duration: float = 3.0
    ramp: float = 1.0
    quick: bool = False
    realtime: bool = False
    qemu_aio: str = "io_uring"


@dataclass
class Side:
    """All runs of one program in a row."""

    runs: list[Metrics] = field(default_factory=list)
    disturbed: bool = False

    def median(self, metric: str) -> float | None:
        """Of a metric that all runs have."""
        values = [value for run in self.runs if (value := run.get(metric)) is not None]
        return median(values) if values else None


class Measure:
    """Measures rows, and keeps what every run found.

    Args:
        folder: for sockets.
    """

    def __init__(self, settings: Settings, files: Files, folder: Path) -> None:
        self.settings = settings
        self.files = files
        self.results: dict[str, dict[str, list[Metrics]]] = {}
        """Of each row: of each program all runs."""
        self._folder = folder

    @contextmanager
    def serving(
        self, disk: Disk, servers: Mapping[str, Server], crowded: bool = False
    ) -> Iterator[dict[str, Daemon]]:
        """Run daemons that serve the same disk.

        Args:
            crowded: more threads than processors will be at work. With real-time priority they would starve each
                other and everybody else, so there is none then.
        """
        settings = self.settings
        with (
            _ordinary() if crowded else nullcontext(),
            serving(disk, self.files, self._folder, servers, aio=settings.qemu_aio) as daemons,
        ):
            yield daemons

    def client(self, disk: Disk, options: BenchOptions, daemon: Daemon) -> Runner:
        """One run of our client against a daemon, to be called later."""
        return partial(self._run, disk, self.asking(options, daemon))

    def asking(
        self, options: BenchOptions, daemon: Daemon, duration: float = 0, ramp: float = 0
    ) -> Runner:
        """The same, whatever the daemon serves: nothing is brought into the page cache.

        Args:
            duration, ramp: seconds, if not as long as all others.
        """
        timed = replace(
            options,
            duration=duration or self.settings.duration,
            ramp=ramp or self.settings.ramp,
            size=0,
        )
        return lambda: metrics_of(bench(str(daemon.socket), timed))

    def fio(self, disk: Disk, job: Fio) -> Runner:
        """One run of fio on the file of a disk, to be called later."""
        return partial(self._fio, disk, job)

    def alternate(
        self, name: str, runners: Mapping[str, Runner], pids: Collection[int]
    ) -> dict[str, Side]:
        """All runs of a row.

        Args:
            pids: processes that do not disturb.
        """
        sides = {who: Side() for who in runners}
        for number in range(self.settings.runs):
            order = list(runners)
            for who in order if number % 2 == 0 else reversed(order):
                found, disturbed = self._undisturbed(runners[who], pids)
                sides[who].runs.append(found)
                sides[who].disturbed |= disturbed
                shown = rate(found["iops"] or 0) + " IOPS" + "*" * disturbed
                print(f"  {name} {number + 1} {who}: {shown}", flush=True)
        self.results[name] = {who: side.runs for who, side in sides.items()}
        return sides

    @property
    def idle_seconds(self) -> float:
        """How long idle daemons are watched."""
        return 1.0 if self.settings.quick else 5.0

    def idle(self, name: str, daemons: Mapping[str, Daemon], queues: int) -> dict[str, float]:
        """CPU time in ns of each daemon in a second in which a guest is attached and asks for nothing."""
        found = {
            who: _idle_ns(daemon, queues, self.idle_seconds) for who, daemon in daemons.items()
        }
        self.results[name] = {who: [{"cpu_ns_per_s": ns}] for who, ns in found.items()}
        shown = ", ".join(f"{who} {ns:.0f}" for who, ns in found.items())
        print(f"  {name}: {shown} ns of CPU a second", flush=True)
        return found

    # ---------------------------------------------------------------- one run

    def _undisturbed(self, runner: Runner, pids: Collection[int]) -> tuple[Metrics, bool]:
        """The run that counts, and whether it was disturbed."""
        for attempt in range(1, _TRIES + 1):
            weather, began = Weather(*pids), time.monotonic()
            found = runner()
            if os.sched_getscheduler(0) != os.SCHED_OTHER:
                break
            disturbed = weather.others() / (time.monotonic() - began) > _DISTURBED
            if not disturbed or attempt == _TRIES:
                return found, disturbed
        return found, False

    def _run(self, disk: Disk, ask: Runner) -> Metrics:
        self._warm(disk)
        return ask()

    def _fio(self, disk: Disk, job: Fio) -> Metrics:
        self._warm(disk)
        path, settings = self.files.path(disk), self.settings
        return run_fio(job, path, self.files.size, max(settings.ramp, 1), max(settings.duration, 1))

    def _warm(self, disk: Disk) -> None:
        if disk in ("cached", "folios", "tmpfs"):
            warm(self.files.path(disk))


def become_realtime() -> None:
    """Give this process, and all that it starts, real-time priority.

    All have the same: with different ones, threads that wait for each other without sleeping would wait for ever,
    and the machine with them. Should that happen nevertheless, the kernel ends who does not sleep for long.
    """
    if (os.cpu_count() or 1) < 2:
        give_up("--realtime: two processors are needed")
    resource.setrlimit(resource.RLIMIT_RTTIME, (_RT_MOST, _RT_MOST))
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        give_up("--realtime: only root may do that")


@contextmanager
def _ordinary() -> Iterator[None]:
    """Without real-time priority, this process and what it starts meanwhile."""
    policy, param = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, param)


def _idle_ns(daemon: Daemon, queues: int, seconds: float) -> float:
    with Client.connect(str(daemon.socket), queues=queues) as client:
        for number in range(200):
            client.read(number % 64 * 4096, 4096)
        # Adaptive polling comes to its end; on a busy machine it takes a while to get there.
        deadline, before = time.monotonic() + 2, cpu_seconds(daemon.pid)
        while time.monotonic() < deadline:
            time.sleep(0.2)
            earlier, before = before, cpu_seconds(daemon.pid)
            if before == earlier:
                break
        time.sleep(seconds)
        after = cpu_seconds(daemon.pid)
    if before is None or after is None:
        give_up(f"cannot see the CPU time of process {daemon.pid}")
    return (after - before) * 1e9 / seconds
