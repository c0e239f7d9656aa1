"""How it grows: queues and threads, sizes of requests, depths; and what idle guests cost.

qemu-storage-daemon 7.2 has one iothread for an export, whatever the number of queues; it is measured with the same
client as ours.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.bench.measure import Measure, Runner, Side
from tests.bench.rows import Disk, Fio
from tests.bench.servers import BOTH, Daemon, Server
from tests.bench.tables import Table, number, ratio
from tests.bench.targets import need_disk
from vhostblk.client.bench.options import PATTERNS, BenchOptions
from vhostblk.client.bench.report import bandwidth

__all__ = [
    "DEPTHS",
    "SECTIONS",
    "QueueCase",
    "SizeCase",
    "measure_section",
    "queue_cases",
    "size_cases",
]

_KIB, _MIB = 1 << 10, 1 << 20
_IDLE = "idle-clients"
_QUEUES: tuple[Disk, ...] = ("null", "tmpfs", "direct")
_SEQUENTIAL: tuple[Disk, ...] = ("tmpfs", "folios", "direct")
_CURVES: tuple[Disk, ...] = ("null", "tmpfs", "direct")
DEPTHS = tuple(1 << power for power in range(9))

TITLES = {
    "null": "null-co",
    "tmpfs": "file on tmpfs",
    "folios": "ext4 in the page cache",
    "direct": "ext4 with O_DIRECT",
}

SECTIONS = (
    *(f"queues-{disk}" for disk in _QUEUES),
    *(f"sequential-{disk}" for disk in _SEQUENTIAL),
    *(f"depth-{disk}" for disk in _CURVES),
    _IDLE,
)
"""Names of the tables."""


def measure_section(measure: Measure, name: str) -> Table:
    """Measure what one of `SECTIONS` shows."""
    if name == _IDLE:
        return _idle(measure)
    kind, _, disk_name = name.partition("-")
    (disk,) = (disk for disk in TITLES if disk == disk_name)
    functions: dict[str, Callable[[Measure, Disk], Table]] = {
        "queues": _queues,
        "sequential": _sequential,
        "depth": _depths,
    }
    return functions[kind](measure, disk)  # type: ignore[arg-type]


# -------------------------------------------------------------------- queues and threads


@dataclass(frozen=True)
class QueueCase:
    """So many queues, served by so many engine threads, asked by so many of the client."""

    queues: int
    engine: int
    client: int
    polls: bool

    @property
    def options(self) -> BenchOptions:
        """Of the client."""
        return BenchOptions(queues=self.queues, threads=self.client, sleep=not self.polls)


def queue_cases(processors: int) -> list[QueueCase]:
    """All of them.

    Two engine threads are asked by two client threads, and so that one sees what the second engine thread brings, the
    same clients ask one. A client polls if there is a processor for each thread of both, else they would fight for
    them.
    """
    cases = []
    for queues in (1, 2, 4, 8):
        for engine, client in ((1, 1), (1, 2), (2, 2)):
            if client <= queues:
                cases.append(QueueCase(queues, engine, client, 2 * client <= processors))
    return cases


def _queues(measure: Measure, disk: Disk) -> Table:
    rows = [
        [
            "queues",
            "engine threads",
            "client",
            "IOPS",
            "qemu's",
            "ratio",
            "CPU us",
            "qemu's",
            "ratio",
        ]
    ]
    servers = {
        "1": Server("ours", queues=8),
        "2": Server("ours", iothreads=2, queues=8),
        "qemu": Server("qemu", queues=8),
    }
    processors = os.cpu_count() or 1
    cases = queue_cases(processors)
    notes = []
    for crowded in (False, True):
        chosen = [case for case in cases if (case.engine + case.client > processors) == crowded]
        if not chosen:
            continue
        if crowded and measure.settings.realtime:
            notes.append(
                "Two client threads, more threads than processors: without real-time priority."
            )
        with measure.serving(disk, servers, crowded) as daemons:
            rows += [_queue_row(measure, disk, case, daemons) for case in chosen]
    title = f"{TITLES[disk]}: random reads of 4 KiB, depth 32 on each queue"
    return Table(f"queues-{disk}", title, rows, notes)


def _queue_row(
    measure: Measure, disk: Disk, case: QueueCase, daemons: Mapping[str, Daemon]
) -> list[str]:
    runners = {
        "ours": measure.client(disk, case.options, daemons[str(case.engine)]),
        "qemu": measure.client(disk, case.options, daemons["qemu"]),
    }
    name = f"queues-{disk}-{case.queues}-{case.engine}-{case.client}"
    sides = measure.alternate(name, runners, [daemon.pid for daemon in daemons.values()])
    client = f"{case.client}, {'polling' if case.polls else 'eventfd'}"
    cells = _pair(sides["ours"], sides["qemu"], ("iops", "backend_cpu_us"))
    return [str(case.queues), str(case.engine), client, *cells]


# -------------------------------------------------------------------- large requests


@dataclass(frozen=True)
class SizeCase:
    """Sequential requests of one size."""

    pattern: str
    block: int
    segments: int
    depth: int = 8

    @property
    def title(self) -> str:
        """As the table has it."""
        parts = f", {self.segments} segments" if self.segments > 1 else ""
        size = f"{self.block // _MIB} MiB" if self.block >= _MIB else f"{self.block // _KIB} KiB"
        return f"{self.pattern} {size}{parts}"

    @property
    def options(self) -> BenchOptions:
        """Of the client."""
        return BenchOptions(
            pattern=PATTERNS[self.pattern],
            block_min=self.block,
            block_max=self.block,
            segments=self.segments,
            depth=self.depth,
        )

    def fio(self, disk: Disk) -> Fio:
        """What comes nearest to it without a daemon."""
        pattern = "read" if self.pattern == "read" else "write"
        engine = "io_uring" if disk == "direct" else "psync"
        return Fio(engine, pattern, self.block, self.depth)  # type: ignore[arg-type]


def size_cases() -> list[SizeCase]:
    """All of them."""
    return [
        SizeCase(pattern, block, segments)
        for pattern in ("read", "write")
        for block, segments in ((128 * _KIB, 1), (_MIB, 1), (_MIB, 16))
    ]


def _sequential(measure: Measure, disk: Disk) -> Table:
    if disk == "folios":
        need_disk(measure)
    has_fio = bool(shutil.which("fio"))
    fio_title = "fio io_uring" if disk == "direct" else "fio psync"
    rows = [["", "ours", "qemu", "ratio", fio_title, "ratio", "CPU us", "qemu's", "ratio"]]
    with measure.serving(disk, BOTH) as daemons:
        for case in size_cases():
            runners: dict[str, Runner] = {
                who: measure.client(disk, case.options, daemon) for who, daemon in daemons.items()
            }
            if has_fio:
                runners["fio"] = measure.fio(disk, case.fio(disk))
            name = f"sequential-{disk}-{case.pattern}-{case.block // _KIB}k-{case.segments}"
            pids = [daemon.pid for daemon in daemons.values()]
            sides = measure.alternate(name, runners, pids)
            ours, qemu, fio = (
                side.median("bytes_per_second") if (side := sides.get(who)) else None
                for who in ("ours", "qemu", "fio")
            )
            star = any(side.disturbed for side in sides.values())
            speeds = [_speed(ours), _speed(qemu), ratio(ours, qemu, star), _speed(fio)]
            cpu = _pair(sides["ours"], sides["qemu"], ("backend_cpu_us",))
            rows.append([case.title, *speeds, ratio(ours, fio, star), *cpu])
    title = f"{TITLES[disk]}: sequential, depth {SizeCase.depth}"
    return Table(f"sequential-{disk}", title, rows)


def _speed(value: float | None) -> str:
    return "n/a" if value is None else bandwidth(value)


# -------------------------------------------------------------------- depths


def _depths(measure: Measure, disk: Disk) -> Table:
    metrics = ("iops", "p50_us", "p99_us", "backend_cpu_us")
    titles = ("IOPS", "p50 us", "p99 us", "CPU us")
    rows = [["depth", *(cell for title in titles for cell in (title, "qemu's", "ratio"))]]
    with measure.serving(disk, BOTH) as daemons:
        for depth in DEPTHS:
            runners = {
                who: measure.client(disk, BenchOptions(depth=depth), daemon)
                for who, daemon in daemons.items()
            }
            pids = [daemon.pid for daemon in daemons.values()]
            sides = measure.alternate(f"depth-{disk}-{depth}", runners, pids)
            rows.append([str(depth), *_pair(sides["ours"], sides["qemu"], metrics)])
    title = f"{TITLES[disk]}: random reads of 4 KiB, one queue, a client that polls"
    return Table(f"depth-{disk}", title, rows)


def _pair(ours: Side, theirs: Side, metrics: tuple[str, ...]) -> list[str]:
    """Of each metric both medians, and their ratio."""
    cells = []
    for metric in metrics:
        a, b = ours.median(metric), theirs.median(metric)
        star = ours.disturbed or theirs.disturbed
        cells += [number(a), number(b), ratio(a, b, star)]
    return cells


# -------------------------------------------------------------------- nothing to do


def _idle(measure: Measure) -> Table:
    rows = [["", "queues", "ours, 1 thread", "ours, 2 threads", "qemu"]]
    servers = {
        "ours": Server("ours", queues=8),
        "ours-2": Server("ours", iothreads=2, queues=8),
        "qemu": Server("qemu", queues=8),
    }
    disks: tuple[Disk, ...] = ("null", "tmpfs", "direct")
    for disk in disks:
        with measure.serving(disk, servers) as daemons:
            for queues in (1, 8):
                spent = measure.idle(f"{_IDLE}-{disk}-{queues}", daemons, queues)
                shown = [f"{spent[who]:.0f}" for who in servers]
                rows.append([TITLES[disk], str(queues), *shown])
    note = f"Each for {measure.idle_seconds:g} s."
    return Table(_IDLE, "ns of CPU time in a second, an idle guest attached", rows, [note])
