"""`make bench`: vhostblk against qemu-storage-daemon and fio; see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

from tests.bench.rows import ROWS, Row, Target
from tests.bench.servers import Files, command_of, fio_iops, fs_type, give_up, serving, warm
from tests.bench.weather import Weather, machine
from vhostblk import __version__
from vhostblk.client.bench.compare import metrics_of
from vhostblk.client.bench.cpu import cpu_seconds
from vhostblk.client.bench.report import format_table, rate
from vhostblk.client.bench.run import bench
from vhostblk.client.bench.session import BenchSession
from vhostblk.errors import VhostBlkError

_DISTURBED = 0.2
"""Of a processor, used by others."""
_TRIES = 3
Metrics = dict[str, float | None]


@dataclass
class Side:
    """All runs of one program in a row."""

    runs: list[Metrics]
    disturbed: bool = False

    def median(self, metric: str) -> float | None:
        """Of a metric that all runs have."""
        values = [value for run in self.runs if (value := run.get(metric)) is not None]
        return median(values) if values else None


class Bench:
    """The rows, one after the other.

    Args:
        args: the command line.
        folder: for sockets.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.folder = folder
        self.files = Files(args.folder, 256 if args.quick else 1024)
        self.duration = args.duration or (0.5 if args.quick else 3.0)
        self.ramp = 0.2 if args.quick else 1.0
        self.table = [["", "metric", "ours", "theirs", "ratio", "wanted", ""]]
        self.results: dict[str, dict[str, list[Metrics]]] = {}

    def close(self) -> None:
        self.files.close()

    def row(self, row: Row) -> None:
        """Measure one, and add it to the table."""
        if row.disk == "cached":
            self._need_ext4()
        folder = self.folder / row.name
        folder.mkdir()
        with serving(row.disk, self.files, folder, self.args.qemu_aio) as sockets:
            runners: dict[str, Callable[[], Metrics]] = {
                who: partial(self._run, row, path) for who, path in sockets.items()
            }
            if row.with_fio and shutil.which("fio"):
                runners["fio"] = partial(self._fio, row)
            sides = self._alternate(row, runners)
        self.results[row.name] = {who: side.runs for who, side in sides.items()}
        for number, target in enumerate(row.targets):
            self._add(row.title if number == 0 else "", target, sides)

    def idle(self) -> None:
        """CPU time with a guest attached that asks for nothing."""
        seconds = 1.0 if self.args.quick else 5.0
        folder = self.folder / "idle"
        folder.mkdir()
        options = replace(ROWS[0].options, requests=1000, sleep=True)
        spent: dict[str, float] = {}
        with serving("null", self.files, folder, self.args.qemu_aio) as sockets:
            for who, path in sockets.items():
                # The end of adaptive polling is part of what is waited for.
                bench(str(path), options)
                with BenchSession(str(path), options) as session:
                    time.sleep(0.3)
                    before = cpu_seconds(session.pid)
                    time.sleep(seconds)
                    after = cpu_seconds(session.pid)
                    if before is None or after is None:
                        give_up(f"cannot see the CPU time of process {session.pid}")
                    spent[who] = (after - before) * 1e6 / seconds
        self.results["idle"] = {who: [{"us_per_s": value}] for who, value in spent.items()}
        values = [f"{spent[who]:.0f}" for who in ("ours", "qemu")]
        verdict = "met" if spent["ours"] < 100 else "MISSED"
        self.table.append(["idle, a guest attached", "CPU us/s", *values, "", "< 100", verdict])
        print(f"  idle: ours {values[0]}, qemu {values[1]} us of CPU a second")

    # ---------------------------------------------------------------- one run

    def _run(self, row: Row, path: Path) -> Metrics:
        options = replace(row.options, duration=self.duration, ramp=self.ramp, size=0)
        if row.disk in ("cached", "tmpfs"):
            warm(self.files.path(row.disk))
        return metrics_of(bench(str(path), options))

    def _fio(self, row: Row) -> Metrics:
        path, depth = self.files.path(row.disk), row.options.depth
        iops = fio_iops(path, self.files.size, depth, max(self.ramp, 1), max(self.duration, 1))
        return {"iops": iops}

    def _alternate(self, row: Row, runners: dict[str, Callable[[], Metrics]]) -> dict[str, Side]:
        sides = {who: Side([]) for who in runners}
        pids = [int(path.read_text()) for path in (self.folder / row.name).glob("*.pid")]
        for number in range(self.args.runs):
            order = list(runners)
            for who in order if number % 2 == 0 else reversed(order):
                for attempt in range(_TRIES):
                    weather, began = Weather(*pids), time.monotonic()
                    found = runners[who]()
                    disturbed = weather.others() / (time.monotonic() - began) > _DISTURBED
                    if not disturbed or attempt == _TRIES - 1:
                        break
                sides[who].runs.append(found)
                sides[who].disturbed |= disturbed
                star = "*" if disturbed else ""
                shown = rate(found["iops"] or 0)
                print(f"  {row.name} {number + 1} {who}: {shown} IOPS{star}", flush=True)
        return sides

    def _add(self, row_title: str, target: Target, sides: dict[str, Side]) -> None:
        ours, theirs = sides["ours"], sides.get(target.of)
        a = ours.median(target.metric)
        b = theirs.median(target.metric) if theirs else None
        star = "*" if ours.disturbed or (theirs and theirs.disturbed) else ""
        if a is None or not b:
            self.table.append(
                [row_title, target.metric, _number(a), "n/a", "", str(target), "unknown"]
            )
            return
        ratio = a / b
        wanted = f"{target}" + (f" of {target.of}" if target.of != "qemu" else "")
        has_bound = target.at_least is not None or target.at_most is not None
        verdict = ("met" if target.is_met(ratio) else "MISSED") if has_bound else ""
        cells = [row_title, target.metric, _number(a), _number(b), f"{ratio:.2f}{star}"]
        self.table.append([*cells, wanted, verdict])

    def _need_ext4(self) -> None:
        path = self.files.path("cached")
        kind = fs_type(path)
        if kind == "tmpfs":
            give_up(f"{path.parent} is a tmpfs; --folder: a folder on a disk")
        if not kind.startswith("ext"):
            print(f"note: {path.parent} is not ext4 but {kind}")


def _number(value: float | None) -> str:
    return "n/a" if value is None else rate(value) if value >= 1000 else f"{value:.3g}"


def main() -> int:
    """Measure, and print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    names = [*(row.name for row in ROWS), "idle"]
    parser.add_argument("--quick", action="store_true", help="shorter runs, smaller files")
    parser.add_argument("--runs", type=int, default=5, help="on each side (default: %(default)s)")
    parser.add_argument("--duration", type=float, help="seconds of a run")
    parser.add_argument("--only", action="append", choices=names, help="this row; may be repeated")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench"), help="for files on a disk"
    )
    parser.add_argument("--qemu-aio", choices=("io_uring", "threads"), default="io_uring")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all runs there")
    parser.add_argument("--strict", action="store_true", help="exit status 1 if a target is missed")
    args = parser.parse_args()
    wanted = args.only or names
    with (
        tempfile.TemporaryDirectory(prefix="vb-") as folder,
        closing(Bench(args, Path(folder))) as run,
    ):
        print(f"vhostblk {__version__}; {machine()}; {args.runs} runs of {run.duration:g} s each")
        socket = Path("SOCKET")
        for who in ("ours", "qemu"):
            print(f"{who}: {' '.join(command_of(who, 'null', run.files, socket, args.qemu_aio))}")
        try:
            for row in ROWS:
                if row.name in wanted:
                    run.row(row)
            if "idle" in wanted:
                run.idle()
        except (VhostBlkError, OSError) as error:
            give_up(str(error))
        print()
        print(format_table(run.table))
        if any("*" in cell for line in run.table for cell in line):
            print("* other programs used more than a fifth of a processor during some run")
        if args.json:
            args.json.write_text(json.dumps(run.results, indent=2))
        missed = any(line[-1] == "MISSED" for line in run.table)
    return 1 if missed and args.strict else 0


if __name__ == "__main__":
    sys.exit(main())
