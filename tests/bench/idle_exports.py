"""What many idle exports of one daemon cost, and what they cost one that is busy.

    python -m tests.bench.idle_exports [--exports 1000] [--front-ends 100] [--json FILE]

One daemon has all the exports, half of them null-co, half files; another one has a single export. After the start, and
once more with idle front-ends connected, memory (PSS), threads and fds are counted, and the CPU time and the context
switches of a while in which nobody asks for anything. Then one export is busy, alone and among the others in turn.
Where qemu-storage-daemon is installed the same is done to it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from tests.bench.servers import give_up
from tests.bench.weather import Weather, machine
from vhostblk import __version__
from vhostblk.client.bench.cpu import cpu_seconds
from vhostblk.client.bench.options import PATTERNS, BenchOptions
from vhostblk.client.bench.report import format_table, rate
from vhostblk.client.bench.run import bench
from vhostblk.client.client import Client
from vhostblk.testing.daemon_process import VHOSTBLK, DaemonError, DaemonProcess

_FILE_SIZE = 1 << 20
_DISTURBED = 0.2
"""Of a processor, used by others."""
_TRIES = 2
_PROGRAMS = {"ours": [*VHOSTBLK, "storage-daemon"], "qemu": ["qemu-storage-daemon"]}
_BUSY = {
    "4 KiB reads, depth 32, polling": BenchOptions(pattern=PATTERNS["randread"], depth=32),
    "4 KiB reads, depth 1, eventfds": BenchOptions(
        pattern=PATTERNS["randread"], depth=1, sleep=True
    ),
}


@dataclass
class Held:
    """What a process holds, and what it does unasked."""

    pss_mib: float
    threads: int
    fds: int
    cpu_us_per_s: float
    switches_per_s: float

    @classmethod
    def of(cls, pid: int, seconds: float) -> Held:
        """Now, and for so long."""
        # What begins with the start, or with a connection, comes to its end first.
        before, now = -1, _switches(pid)
        while now != before:
            time.sleep(0.2)
            before, now = now, _switches(pid)
        cpu, switches, began = _cpu(pid), _switches(pid), time.monotonic()
        time.sleep(seconds)
        passed = time.monotonic() - began
        proc = Path(f"/proc/{pid}")
        pss = re.search(r"(?m)^Pss: *(\d+) kB", (proc / "smaps_rollup").read_text())
        assert pss is not None
        return cls(
            pss_mib=int(pss[1]) / 1024,
            threads=len(os.listdir(proc / "task")),
            fds=len(os.listdir(proc / "fd")),
            cpu_us_per_s=(_cpu(pid) - cpu) * 1e6 / passed,
            switches_per_s=max(_switches(pid) - switches, 0) / passed,
        )


def _cpu(pid: int) -> float:
    found = cpu_seconds(pid)
    if found is None:
        give_up(f"cannot see the CPU time of process {pid}")
    return found


def _switches(pid: int) -> int:
    """How often its threads have gone to sleep."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            text = (task / "status").read_text()
            total += int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return total


class Daemon:
    """One with so many exports.

    Args:
        who: of `_PROGRAMS`.
        folder: for sockets and images.
    """

    def __init__(self, who: str, folder: Path, exports: int) -> None:
        folder.mkdir()
        words = list(_PROGRAMS[who])
        self.sockets = [folder / f"{number}" for number in range(exports)]
        for number, path in enumerate(self.sockets):
            node = f"driver=null-co,size={1 << 30}"
            if number % 2:
                image = folder / f"{number}.img"
                image.touch()
                os.truncate(image, _FILE_SIZE)
                node = f"driver=file,filename={image}"
            words += ["--blockdev", f"{node},node-name=d{number}", "--export"]
            words += [
                f"type=vhost-user-blk,id=e{number},node-name=d{number},writable=on,"
                f"addr.type=unix,addr.path={path}"
            ]
        began = time.monotonic()
        # The last one that listens: the others do, then.
        self.process = DaemonProcess(words, sockets=[self.sockets[-1]])
        try:
            self.process.start(timeout=300)
        except DaemonError as error:
            # Not the command, which is very long.
            give_up(f"{who}: {str(error).splitlines()[-1]}")
        self.start_seconds = time.monotonic() - began

    def stop(self) -> float:
        """Seconds that it takes."""
        began = time.monotonic()
        self.process.stop(timeout=300)
        self.process.close()
        return time.monotonic() - began


@dataclass
class Busy:
    """One run of the busy export."""

    iops: float
    cpu_us: float
    """Of the daemon, for each request."""
    disturbed: bool

    @classmethod
    def of(cls, daemon: Daemon, options: BenchOptions) -> Busy:
        """Again, if others have used the machine, but not for ever."""
        for _ in range(_TRIES):
            weather, began = Weather(daemon.process.pid), time.monotonic()
            result = bench(str(daemon.sockets[0]), options)
            disturbed = weather.others() / (time.monotonic() - began) > _DISTURBED
            if not disturbed:
                break
        assert result.backend_cpu_us is not None
        return cls(result.iops, result.backend_cpu_us, disturbed)


def measure(who: str, folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """All of one program."""
    crowd = Daemon(who, folder / who, args.exports)
    alone = Daemon(who, folder / f"{who}-alone", 1)
    found: dict[str, object] = {"start_seconds": crowd.start_seconds}
    try:
        found["idle"] = asdict(Held.of(crowd.process.pid, args.seconds))
        found["alone"] = asdict(Held.of(alone.process.pid, min(args.seconds, 1)))
        with ExitStack() as clients:
            # Not the first, which is to be busy; of every thread, and of every kind.
            step = max(args.exports // max(args.front_ends, 1), 1)
            for path in crowd.sockets[1::step][: args.front_ends]:
                client = clients.enter_context(Client.connect(path))
                client.read(0, 4096)
            found["attached"] = asdict(Held.of(crowd.process.pid, args.seconds))
            for title, options in _BUSY.items():
                chosen = replace(options, duration=args.duration, ramp=0.3)
                runs: dict[str, list[Busy]] = {"alone": [], "crowd": []}
                for _ in range(args.runs):
                    for name, daemon in (("alone", alone), ("crowd", crowd)):
                        runs[name].append(Busy.of(daemon, chosen))
                found[title] = {name: [asdict(run) for run in some] for name, some in runs.items()}
    finally:
        alone.stop()
        found["stop_seconds"] = crowd.stop()
    return found


def table(results: dict[str, dict[str, object]]) -> str:
    """For people."""
    rows = [["", *results]]

    def add(title: str, cells: list[str]) -> None:
        rows.append([title, *cells])

    def held(when: str, name: str) -> list[float]:
        return [found[when][name] for found in results.values()]  # type: ignore[index]

    add("start, s", [f"{found['start_seconds']:.2f}" for found in results.values()])
    add("stop, s", [f"{found['stop_seconds']:.2f}" for found in results.values()])
    for when, what in (
        ("idle", "idle"),
        ("attached", "front-ends connected"),
        ("alone", "1 export"),
    ):
        add(f"{what}: PSS, MiB", [f"{value:.0f}" for value in held(when, "pss_mib")])
        add("  threads", [f"{value}" for value in held(when, "threads")])
        add("  fds", [f"{value}" for value in held(when, "fds")])
        if when != "alone":
            add("  CPU, us/s", [f"{value:.0f}" for value in held(when, "cpu_us_per_s")])
            add("  switches/s", [f"{value:.1f}" for value in held(when, "switches_per_s")])
    for title in _BUSY:
        for metric in ("iops", "cpu_us"):
            medians = {
                name: [
                    median(run[metric] for run in found[title][name])  # type: ignore[index]
                    for found in results.values()
                ]
                for name in ("alone", "crowd")
            }
            for name, values in medians.items():
                cells = [rate(value) if metric == "iops" else f"{value:.3f}" for value in values]
                add(f"{title}: {metric} {name}", cells)
            pairs = zip(medians["crowd"], medians["alone"], strict=True)
            add("  ratio", [f"{crowd / alone:.2f}" for crowd, alone in pairs])
        runs = [[*found[title]["alone"], *found[title]["crowd"]] for found in results.values()]  # type: ignore[index]
        add("  disturbed runs", [f"{sum(r['disturbed'] for r in s)} of {len(s)}" for s in runs])
    return format_table(rows)


def main() -> int:
    """Measure, and print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.idle_exports",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--exports", type=int, default=1000)
    parser.add_argument("--front-ends", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=10.0, help="to be idle")
    parser.add_argument("--runs", type=int, default=5, help="of the busy export, each way")
    parser.add_argument("--duration", type=float, default=2.0, help="of such a run")
    parser.add_argument("--only", choices=tuple(_PROGRAMS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    args = parser.parse_args()
    print(
        f"vhostblk {__version__}; {machine()}; {args.exports} exports, {args.front_ends} front-ends"
    )
    results = {}
    with tempfile.TemporaryDirectory(prefix="vb-") as folder:
        for who, command in _PROGRAMS.items():
            if args.only in (None, who) and shutil.which(command[0]):
                results[who] = measure(who, Path(folder), args)
    print(table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
