"""Disks made of Python: a RAM disk behind a filter that does nothing, against the same in nbdkit's Python plugin.

Both in one run, in turn: our generator, waiting on eventfds, asks our daemon; fio's nbd engine asks nbdkit. 4 KiB at
random places, 32 at a time. CPU time is that of the server's process, all threads.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.bench.measure import Measure, Metrics, Runner, Side
from tests.bench.rows import Target
from tests.bench.servers import Daemon, give_up, run_daemon
from tests.bench.tables import Table, number, ratio
from vhostblk.client.bench.cpu import cpu_seconds
from vhostblk.client.bench.options import PATTERNS, BenchOptions

__all__ = ["PYTHON_ROWS", "measure_python_path"]

PYTHON_ROWS = ("python-read", "python-write")
"""Names of the rows."""

_DISK = 64 << 20
_DEPTH = 32
_ENOUGH = 100_000
_TARGETS = (Target("iops", 3.0), Target("backend_cpu_us"))


def measure_python_path(measure: Measure, is_wanted: Callable[[str], bool]) -> Table:
    """Measure the rows that are wanted."""
    if not (shutil.which("nbdkit") and shutil.which("fio")):
        give_up("nbdkit, its Python plugin and fio are needed")
    titles = ["", "metric", "ours", "nbdkit", "ratio", "wanted", ""]
    table = Table("python", "", [titles])
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vb-")))
        ours, nbdkit = folder / "ours.sock", folder / "nbdkit.sock"
        module = [sys.executable, "-m", "tests.bench.pass_through"]
        plugin = ["python", str(Path(__file__).with_name("nbdkit_disk.py")), f"size={_DISK}"]
        daemons = {
            "ours": stack.enter_context(run_daemon([*module, str(ours), str(_DISK)], ours)),
            "nbdkit": stack.enter_context(
                run_daemon(
                    ["nbdkit", "-f", "-U", str(nbdkit), "-P", f"{nbdkit}.pid", *plugin], nbdkit
                )
            ),
        }
        for name in filter(is_wanted, PYTHON_ROWS):
            pattern = name.replace("python-", "rand")
            options = BenchOptions(pattern=PATTERNS[pattern], depth=_DEPTH, sleep=True)
            runners: dict[str, Runner] = {
                "ours": measure.client("null", options, Daemon(ours, daemons["ours"])),
                "nbdkit": partial(_fio, measure, pattern, Daemon(nbdkit, daemons["nbdkit"])),
            }
            sides = measure.alternate(name, runners, daemons.values())
            table.rows += _lines(pattern, sides["ours"], sides["nbdkit"])
    return table


def _lines(pattern: str, ours: Side, theirs: Side) -> Iterator[list[str]]:
    star = ours.disturbed or theirs.disturbed
    for target in _TARGETS:
        a, b = ours.median(target.metric), theirs.median(target.metric)
        is_met = bool(a and b and target.is_met(a / b))
        verdict = "met" if is_met else "MISSED"
        if target.metric == "iops":
            wanted = f"{target}, {number(_ENOUGH)} IOPS"
            verdict = verdict if a and a >= _ENOUGH else "MISSED"
        else:
            wanted = verdict = ""
        title = f"random {pattern.removeprefix('rand')}"
        yield [title, target.metric, number(a), number(b), ratio(a, b, star), wanted, verdict]


def _fio(measure: Measure, pattern: str, server: Daemon) -> Metrics:
    """One run of fio; without a ramp, so that all requests and all CPU time belong together."""
    command = [
        *("fio", "--name=x", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={server.socket}"),
        *(f"--rw={pattern}", "--bs=4096", f"--iodepth={_DEPTH}", f"--size={_DISK}"),
        *("--time_based", f"--runtime={max(measure.settings.duration, 1)}s"),
        *("--norandommap", "--randrepeat=0", "--output-format=json"),
    ]
    before = cpu_seconds(server.pid)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = cpu_seconds(server.pid)
    report = done.stdout[done.stdout.index("{") :]  # the engine has said something before
    found = json.loads(report)["jobs"][0]["write" if pattern == "randwrite" else "read"]
    spent = None if before is None or after is None else (after - before) * 1e6
    return {
        "iops": float(found["iops"]),
        "backend_cpu_us": spent / found["total_ios"] if spent is not None else None,
    }
