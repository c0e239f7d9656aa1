"""The table with targets: 4 KiB, one queue, one iothread, ratios against qemu-storage-daemon and fio."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence

from tests.bench.measure import Measure, Runner, Side
from tests.bench.rows import ROWS, Row, Target
from tests.bench.servers import BOTH, fs_type, give_up
from tests.bench.tables import Table, number, ratio

__all__ = ["TARGET_ROWS", "lines_of", "measure_targets", "need_disk"]

_IDLE = "idle"
TARGET_ROWS = (*(row.name for row in ROWS), _IDLE)
"""Names of the rows."""


def measure_targets(measure: Measure, is_wanted: Callable[[str], bool]) -> Table:
    """Measure the rows that are wanted."""
    table = Table("targets", "", [["", "metric", "ours", "theirs", "ratio", "wanted", ""]])
    for row in ROWS:
        if is_wanted(row.name):
            table.rows += lines_of(row.title, row.targets, _measure(measure, row))
    if is_wanted(_IDLE):
        with measure.serving("null", BOTH) as daemons:
            spent = measure.idle(_IDLE, daemons, 1)
        verdict = "met" if spent["ours"] < 100e3 else "MISSED"
        shown = [f"{spent[who] / 1e3:.3g}" for who in ("ours", "qemu")]
        table.rows.append(["idle, a guest attached", "CPU us/s", *shown, "", "< 100", verdict])
    return table


def _measure(measure: Measure, row: Row) -> dict[str, Side]:
    if row.disk in ("cached", "folios"):
        need_disk(measure)
    with measure.serving(row.disk, BOTH) as daemons:
        runners: dict[str, Runner] = {
            who: measure.client(row.disk, row.options, daemon) for who, daemon in daemons.items()
        }
        if row.fio and shutil.which("fio"):
            runners["fio"] = measure.fio(row.disk, row.fio)
        return measure.alternate(row.name, runners, [daemon.pid for daemon in daemons.values()])


def lines_of(title: str, targets: Sequence[Target], sides: Mapping[str, Side]) -> list[list[str]]:
    """A line of a table for each target of a row."""
    titles = [title, *("" for _ in targets[1:])]
    return [[title, *_cells(t, sides)] for title, t in zip(titles, targets, strict=True)]


def _cells(target: Target, sides: Mapping[str, Side]) -> list[str]:
    ours, theirs = sides["ours"], sides.get(target.of)
    a = ours.median(target.metric)
    b = theirs.median(target.metric) if theirs else None
    if a is None or not b:
        return [target.metric, number(a), "n/a", "", str(target), "unknown"]
    star = ours.disturbed or bool(theirs and theirs.disturbed)
    wanted = f"{target}" + (f" of {target.of}" if target.of != "qemu" else "")
    has_bound = target.at_least is not None or target.at_most is not None
    verdict = ("met" if target.is_met(a / b) else "MISSED") if has_bound else ""
    return [target.metric, number(a), number(b), ratio(a, b, star), wanted, verdict]


def need_disk(measure: Measure) -> None:
    """Refuse to call a tmpfs a disk."""
    path = measure.files.path("cached")
    kind = fs_type(path)
    if kind == "tmpfs":
        give_up(f"{path.parent} is a tmpfs; --folder: a folder on a disk")
    if not kind.startswith("ext"):
        print(f"note: {path.parent} is not ext4 but {kind}")
