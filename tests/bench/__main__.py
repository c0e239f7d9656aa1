"""`make bench`: vhostblk against qemu-storage-daemon, fio and nbdkit; see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from fnmatch import fnmatchcase
from pathlib import Path

from tests.bench.measure import Measure, Metrics, Settings, become_realtime
from tests.bench.profile import PROFILED, measure_profiles, need_perf
from tests.bench.python_path import PYTHON_ROWS, measure_python_path
from tests.bench.qcow2 import QCOW2_ROWS, measure_qcow2
from tests.bench.scaling import SECTIONS, measure_section
from tests.bench.servers import BOTH, Files, command_of, give_up, qemu_version
from tests.bench.tables import Table, as_csv, markdown, replace_part, text
from tests.bench.targets import TARGET_ROWS, measure_targets
from tests.bench.weather import machine
from vhostblk import __version__
from vhostblk.errors import VhostBlkError

_DOCUMENT = Path("docs/benchmarks.md")
_NAMES = {
    "targets": TARGET_ROWS,
    "scaling": SECTIONS,
    "profile": tuple(PROFILED),
    "python": PYTHON_ROWS,
    "qcow2": QCOW2_ROWS,
}
"""Reports, and what each consists of."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    add = parser.add_argument
    add(
        "--targets",
        action="store_true",
        help="raw disks, with targets; without options these and qcow2",
    )
    add("--scaling", action="store_true", help="instead: queues, threads, sizes, depths, idle")
    add("--profile", action="store_true", help="instead: where daemons spend their time (perf)")
    add("--python", action="store_true", help="instead: a disk made of Python, against nbdkit's")
    add("--qcow2", action="store_true", help="qcow2 images, also first writes, with targets")
    add("--quick", action="store_true", help="shorter runs, smaller files")
    add("--runs", type=int, help="on each side (default: 5, quick scaling 3)")
    add("--duration", type=float, help="seconds of a run (default: 3, scaling 1.5)")
    add("--only", action="append", metavar="NAME", help="this row or table; * and ? as in sh")
    add("--list", action="store_true", help="show the names of rows and tables")
    add("--folder", type=Path, default=Path("build/bench"), help="for files on a disk")
    add("--qemu-aio", choices=("io_uring", "threads"), default="io_uring")
    add("--realtime", action="store_true", help="real-time priority for daemons and client")
    add("--json", type=Path, metavar="FILE", help="write all runs there")
    add("--csv", type=Path, metavar="FILE", help="write medians there")
    add(
        "--write-docs",
        action="store_true",
        help=f"all reports, or those named, and write {_DOCUMENT}",
    )
    add("--strict", action="store_true", help="exit status 1 if a target is missed")
    return parser


def reports_of(args: argparse.Namespace) -> list[str]:
    """Which reports are wanted: those that are named; with none, the tables with targets, or for the document all."""
    named = [name for name in _NAMES if getattr(args, name)]
    return named or (list(_NAMES) if args.write_docs else ["targets", "qcow2"])


def settings_of(args: argparse.Namespace, report: str) -> Settings:
    """How long, how often: the other reports have more rows than the table with targets, and shorter ones."""
    short = report == "scaling"
    duration, ramp = (1.5, 0.5) if short else (3.0, 1.0)
    if args.quick:
        duration, ramp = (0.3, 0.1) if short else (0.5, 0.2)
    return Settings(
        runs=args.runs or (3 if short and args.quick else 5),
        duration=args.duration or duration,
        ramp=ramp,
        quick=args.quick,
        realtime=args.realtime,
        qemu_aio=args.qemu_aio,
    )


def conditions(settings: Settings, report: str) -> str:
    """How a table came about, in one line."""
    single = report == "profile" or settings.runs == 1
    runs = "one run" if single else f"medians of {settings.runs} alternating runs"
    words = [f"{runs} of {settings.duration:g} s"]
    if settings.realtime:
        words.append("real-time priority (SCHED_RR 1) for daemons and client")
    if settings.quick:
        words.append("short runs and small files: figures are rough")
    return f"vhostblk {__version__}, {qemu_version()}; {machine()}; {'; '.join(words)}."


def _tables(report: str, measure: Measure, is_wanted: Callable[[str], bool]) -> Iterator[Table]:
    if report == "scaling":
        for name in filter(is_wanted, SECTIONS):
            yield measure_section(measure, name)
    elif report == "profile":
        yield measure_profiles(measure, is_wanted)
    elif report == "python":
        yield measure_python_path(measure, is_wanted)
    elif report == "qcow2":
        if any(map(is_wanted, QCOW2_ROWS)):
            yield measure_qcow2(measure, is_wanted)
    else:
        yield measure_targets(measure, is_wanted)


def _wanted(args: argparse.Namespace) -> Callable[[str], bool]:
    patterns: Sequence[str] = args.only or ["*"]
    return lambda name: any(fnmatchcase(name, pattern) for pattern in patterns)


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Find contradictions before minutes have passed."""
    reports = reports_of(args)
    names = [name for report in reports for name in _NAMES[report]]
    for pattern in args.only or ():
        if not any(fnmatchcase(name, pattern) for name in names):
            parser.error(f"--only {pattern}: nothing has that name; there are {', '.join(names)}")
    # The tables of scaling are parts of their own; the others would lose what is not measured.
    if args.write_docs and args.only and reports != ["scaling"]:
        parser.error("--write-docs with --only: only with --scaling")
    if "profile" in reports:
        need_perf()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print tables. Returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.list:
        print("\n".join(f"{name}: {' '.join(rows)}" for name, rows in _NAMES.items()))
        return 0
    _check(parser, args)
    if args.realtime:
        become_realtime()
    missed = False
    results: dict[str, dict[str, list[Metrics]]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="vb-") as folder,
        closing(Files(args.folder, 256 if args.quick else 1024)) as files,
    ):
        for who, server in BOTH.items():
            command = command_of(server, "null", files, Path("SOCKET"), aio=args.qemu_aio)
            print(f"{who}: {' '.join(command)}")
        for report in reports_of(args):
            settings = settings_of(args, report)
            measure = Measure(settings, files, Path(folder))
            how = conditions(settings, report)
            print(how, flush=True)
            try:
                for table in _tables(report, measure, _wanted(args)):
                    print(f"\n{text(table)}\n", flush=True)
                    missed |= any(row[-1] == "MISSED" for row in table.rows)
                    if args.write_docs:
                        _write(table, how)
            except (VhostBlkError, OSError) as error:
                give_up(str(error))
            results |= measure.results
            if args.json:
                args.json.write_text(json.dumps(results, indent=2))
            if args.csv:
                args.csv.write_text(as_csv(results))
    return 1 if missed and args.strict else 0


def _write(table: Table, how: str) -> None:
    """Put a table into the document."""
    content = f"{markdown(table)}\n_{how}_"
    _DOCUMENT.write_text(replace_part(_DOCUMENT.read_text(), table.name, content))


if __name__ == "__main__":
    sys.exit(main())
