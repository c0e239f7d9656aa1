"""qcow2 images: what is allocated is read and overwritten, what is not is written for the first time.

Allocated: both daemons have the same image open, which nobody changes but where its data are. Like the files of the
other rows it is in the page cache page by page, and all of it is allocated, by clusters of 64 KiB. The engine knows
nothing of it when a run begins: what a run asks for first is looked up in it.

For the first time: each run has an image of its own, made by qemu-img, and a daemon of its own. The disk is so large
that hardly any request finds its cluster there. L2 tables are there: QEMU flushes when it makes one, and that would
be what is measured. The image is removed afterwards, with what is dirty of it.

Knows nothing of how tables look.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.bench.measure import Measure, Metrics, Runner, Side
from tests.bench.rows import Target
from tests.bench.servers import BOTH, Daemon, Server, qcow2_command, run_daemon, warm
from tests.bench.tables import Table
from tests.bench.targets import lines_of, need_disk
from vhostblk.client.bench.options import PATTERNS, BenchOptions

__all__ = ["QCOW2_ROWS", "measure_qcow2"]

_EMPTY_DISK = 32 << 30
_TABLE_COVERS = 512 << 20
_PAGE = 4096


@dataclass(frozen=True)
class _Row:
    """One benchmark.

    Attributes:
        new: each run has an empty image.
        seconds: how long a run may be, at most; what is written for the first time fills the page cache.
    """

    name: str
    title: str
    options: BenchOptions
    targets: tuple[Target, ...]
    direct: bool = False
    new: bool = False
    seconds: float = 60.0


_READ = BenchOptions(pattern=PATTERNS["randread"])
_WRITE = BenchOptions(pattern=PATTERNS["randwrite"])
_SEQUENTIAL = BenchOptions(pattern=PATTERNS["write"], block_min=65536, block_max=65536)
_CPU = Target("backend_cpu_us", at_most=0.7)
_FAST, _AS_FAST, _NEW = Target("iops", 1.5), Target("iops", 1.0), Target("iops", 0.7)
_NEW_CPU = Target("backend_cpu_us")

_ROWS = (
    _Row("qcow2-read", "in the page cache, random read", _READ, (_FAST, _CPU)),
    _Row("qcow2-write", "in the page cache, random write", _WRITE, (_FAST, _CPU)),
    _Row("qcow2-direct-read", "with O_DIRECT, random read", _READ, (_AS_FAST, _CPU), direct=True),
    _Row(
        "qcow2-direct-write", "with O_DIRECT, random write", _WRITE, (_AS_FAST, _CPU), direct=True
    ),
    _Row(
        "qcow2-new-sequential",
        "first writes, 64 KiB, sequential",
        _SEQUENTIAL,
        (_NEW, _NEW_CPU),
        new=True,
        seconds=0.5,
    ),
    _Row(
        "qcow2-new-random",
        "first writes, random",
        _WRITE,
        (_NEW, _NEW_CPU),
        new=True,
        seconds=1.0,
    ),
    _Row(
        "qcow2-direct-new-sequential",
        "first writes with O_DIRECT, 64 KiB, sequential",
        _SEQUENTIAL,
        (Target("iops"), _NEW_CPU),
        new=True,
        direct=True,
        seconds=1.0,
    ),
    _Row(
        "qcow2-direct-new-random",
        "first writes with O_DIRECT, random",
        _WRITE,
        (Target("iops"), _NEW_CPU),
        new=True,
        direct=True,
        seconds=1.0,
    ),
)
QCOW2_ROWS = tuple(row.name for row in _ROWS)
"""Names of the rows."""


def measure_qcow2(measure: Measure, is_wanted: Callable[[str], bool]) -> Table:
    """Measure the rows that are wanted."""
    table = Table("qcow2", "", [["", "metric", "ours", "theirs", "ratio", "wanted", ""]])
    need_disk(measure)
    with tempfile.TemporaryDirectory(prefix="vb-") as sockets, ExitStack() as stack:
        images: list[Path] = []
        for row in _ROWS:
            if not is_wanted(row.name):
                continue
            if row.new:
                sides = _first_writes(measure, row, Path(sockets))
            else:
                if not images:
                    images.append(stack.enter_context(_allocated_image(measure)))
                sides = _allocated(measure, row, images[0], Path(sockets))
            table.rows += lines_of(row.title, row.targets, sides)
    return table


def _allocated(measure: Measure, row: _Row, image: Path, sockets: Path) -> dict[str, Side]:
    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        pids = []
        for who, server in BOTH.items():
            socket = sockets / f"{row.name}-{who}.sock"
            command = _command(measure, row, server, image, socket)
            pids.append(stack.enter_context(run_daemon(command, socket)))
            ask = measure.asking(row.options, Daemon(socket, pids[-1]))
            runners[who] = ask if row.direct else partial(_warm_first, image, ask)
        return measure.alternate(row.name, runners, pids)


def _warm_first(image: Path, ask: Runner) -> Metrics:
    warm(image)
    return ask()


def _first_writes(measure: Measure, row: _Row, sockets: Path) -> dict[str, Side]:
    runners: Mapping[str, Runner] = {
        who: partial(_write_first, measure, row, server, sockets / f"{row.name}-{who}.sock")
        for who, server in BOTH.items()
    }
    return measure.alternate(row.name, runners, [])


def _write_first(measure: Measure, row: _Row, server: Server, socket: Path) -> Metrics:
    image = measure.files.folder / f"vhostblk-bench-{os.getpid()}-new.qcow2"
    duration = min(measure.settings.duration, row.seconds)
    try:
        _create_empty(image)
        command = _command(measure, row, server, image, socket)
        with run_daemon(command, socket) as pid:
            ask = measure.asking(row.options, Daemon(socket, pid), duration, min(duration, 0.1))
            return ask()
    finally:
        image.unlink(missing_ok=True)
        Path(f"{socket}.pid").unlink(missing_ok=True)


def _command(measure: Measure, row: _Row, server: Server, image: Path, socket: Path) -> list[str]:
    aio = measure.settings.qemu_aio
    return qcow2_command(server, image, socket, direct=row.direct, aio=aio)


def _create_empty(image: Path) -> None:
    image.parent.mkdir(parents=True, exist_ok=True)
    create = ["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(_EMPTY_DISK)]
    subprocess.run(create, check=True)
    touched = range(0, _EMPTY_DISK, _TABLE_COVERS)
    writes = [word for at in touched for word in ("-c", f"write -q {at} {_PAGE}")]
    # Without flushes: nobody needs this image after a crash.
    subprocess.run(["qemu-io", "-t", "unsafe", *writes, str(image)], check=True)


@contextmanager
def _allocated_image(measure: Measure) -> Iterator[Path]:
    """An image that has all of its clusters, written page by page; see `servers.Files`."""
    image = measure.files.folder / f"vhostblk-bench-{os.getpid()}.qcow2"
    made = image.with_suffix(".new")
    try:
        source = str(measure.files.path("cached"))
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", source, str(made)], check=True)
        with made.open("rb", buffering=0) as content, image.open("wb", buffering=0) as file:
            while page := content.read(_PAGE):
                file.write(page)
            os.fdatasync(file.fileno())
        made.unlink()
        yield image
        subprocess.run(["qemu-img", "check", "-q", str(image)], check=True)
    finally:
        made.unlink(missing_ok=True)
        image.unlink(missing_ok=True)
