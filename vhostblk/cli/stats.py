"""`vhostblk stats`: what the exports of all running daemons have served, from their statistics pages.

Reads shared memory; no daemon hears of it, and none has to answer. Without `--watch` the figures are those since the
export was opened; with it, those of the interval that has just ended.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vhostblk.cli.stats_table import table
from vhostblk.cli.streams import nobody_reads
from vhostblk.errors import ConfigError
from vhostblk.export.statistics import OperationStatistics, QueueStatistics, total
from vhostblk.export.stats_layout import PageError, VersionError, latency_bound
from vhostblk.export.stats_reader import PageCopy, page_names, pid_in, read_page

DESCRIPTION = """\
Show requests, throughput, latencies and notifications of all exports whose statistics you may read (your own; root:
all), for each queue and operation. No daemon is disturbed."""
EXAMPLES = """\
Examples:

  vhostblk stats                        since each export was opened
  vhostblk stats --watch --export disk  every second, until Ctrl-C
  vhostblk stats --json | jq '.exports[].total.operations.read.iops'
"""

JSON_VERSION = 1
# What is shown of the distribution of latencies.
QUANTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
_CLEAR = "\x1b[H\x1b[2J"
_DAY = 86400.0


@dataclass(frozen=True, slots=True)
class ExportFigures:
    """One export in one period.

    Attributes:
        seconds: how long the period is.
        queues: by index, those that are started.
    """

    page: PageCopy
    seconds: float
    queues: dict[int, QueueStatistics]

    @property
    def total(self) -> QueueStatistics:
        """All queues together."""
        return total(self.queues.values())


@dataclass(slots=True)
class Pages:
    """The pages that were found at one time.

    Attributes:
        copies: by name.
        unreadable: how many more belong to somebody else.
        foreign: how many more have another layout.
    """

    copies: dict[str, PageCopy] = field(default_factory=dict)
    unreadable: int = 0
    foreign: int = 0

    @property
    def missing(self) -> list[str]:
        """What is not shown, and why, for people."""
        reasons = (
            (self.unreadable, "may not be read by this user"),
            (self.foreign, "of another version of vhostblk"),
        )
        return [f"{n} more export{'s' * (n > 1)} {why}" for n, why in reasons if n]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--pid", type=_positive, metavar="N", help="only exports of this process")
    parser.add_argument("--export", metavar="NAME", help="only exports of this name")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object (with --watch: one on each line)"
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        type=_seconds,
        const=1.0,
        metavar="SECONDS",
        help="show the rates of each interval until Ctrl-C (without a number: 1 second)",
    )
    parser.add_argument(
        "--count", type=_positive, metavar="N", help="with --watch: end after N intervals"
    )


def run(args: argparse.Namespace) -> None:
    """Show the figures once, or again and again.

    Raises:
        ConfigError: what was asked for is not there.
    """
    if args.count is not None and args.watch is None:
        raise ConfigError("--count: only with --watch")
    if args.watch is None:
        _show_once(args)
    else:
        _watch(args)


def _show_once(args: argparse.Namespace) -> None:
    found = collect(args.pid, args.export)
    if not found.copies and (args.pid is not None or args.export is not None):
        raise ConfigError(_nothing(args, found))
    exports = [since_opened(page) for page in found.copies.values()]
    if args.json:
        print(json.dumps(as_json(exports, found, None), indent=2))
    else:
        _print_table(exports, found, args)
    sys.stdout.flush()


def _watch(args: argparse.Namespace) -> None:
    is_terminal = sys.stdout.isatty() and not args.json
    before = collect(args.pid, args.export)
    next_look = time.monotonic() + args.watch
    rounds = 0
    try:
        # Whoever read this may have seen enough.
        while (args.count is None or rounds < args.count) and not nobody_reads():
            time.sleep(max(next_look - time.monotonic(), 0))
            next_look += args.watch
            now = collect(args.pid, args.export)
            exports = [between(before.copies.get(name), page) for name, page in now.copies.items()]
            if args.json:
                print(json.dumps(as_json(exports, now, args.watch)))
            else:
                if rounds or is_terminal:
                    print(_CLEAR if is_terminal else "", end="" if is_terminal else "\n")
                _print_table(exports, now, args, fit=is_terminal)
            sys.stdout.flush()
            before = now
            rounds += 1
    except KeyboardInterrupt:
        return


def collect(pid: int | None = None, export: str | None = None) -> Pages:
    """Copy the pages of the daemons that live, those of one process or one export if asked for."""
    pages = Pages()
    for name in page_names():
        try:
            page = read_page(name)
        except FileNotFoundError:
            continue  # closed since we saw it
        except PermissionError:
            pages.unreadable += pid is None or pid_in(name) == pid
            continue
        except VersionError:
            pages.foreign += pid is None or pid_in(name) == pid
            continue
        except (OSError, PageError):
            continue  # whatever somebody has put there
        if (
            page.is_alive
            and pid in (None, page.header.pid)
            and export in (None, page.header.export)
        ):
            pages.copies[name] = page
    return pages


def since_opened(page: PageCopy) -> ExportFigures:
    """All that an export has counted."""
    age = (time.time_ns() - page.header.created_ns) / 1e9
    return ExportFigures(page, max(age, 1e-9), page.queues)


def between(before: PageCopy | None, now: PageCopy) -> ExportFigures:
    """What an export has counted between two looks; all of it, if it was not there at the first one."""
    if before is None or before.header.created_ns != now.header.created_ns:
        return since_opened(now)
    queues = {
        index: queue.since(before.queues.get(index, QueueStatistics()))
        for index, queue in now.queues.items()
    }
    return ExportFigures(now, max((now.time_ns - before.time_ns) / 1e9, 1e-9), queues)


# ---------------------------------------------------------------- JSON; docs/statistics.md has the keys


def as_json(
    exports: Sequence[ExportFigures], found: Pages, interval: float | None
) -> dict[str, Any]:
    """The object that `--json` prints."""
    return {
        "version": JSON_VERSION,
        "time": time.time(),
        "interval": interval,
        "unreadable": found.unreadable,
        "foreign": found.foreign,
        "exports": [_export_json(figures) for figures in exports],
    }


def _export_json(figures: ExportFigures) -> dict[str, Any]:
    page = figures.page
    return {
        "export": page.header.export,
        "pid": page.header.pid,
        "page": page.name,
        "data_path": "native" if page.is_native else "python",
        "opened": page.header.created_ns / 1e9,
        "seconds": figures.seconds,
        "sessions": page.header.sessions,
        "connected": page.header.connected,
        "partial": page.is_partial,
        "queues": [
            {"queue": index, **_queue_json(queue, figures.seconds)}
            for index, queue in figures.queues.items()
        ],
        "total": _queue_json(figures.total, figures.seconds),
    }


def _queue_json(queue: QueueStatistics, seconds: float) -> dict[str, Any]:
    return {
        "requests": queue.requests,
        "in_flight": queue.in_flight,
        "oldest_ns": queue.oldest_age_ns,
        "idle_ns": queue.idle_ns,
        "hits": queue.hits,
        "misses": queue.misses,
        "hit_rate": queue.hit_rate,
        "kicks": queue.kicks,
        "calls": queue.calls,
        "calls_suppressed": queue.calls_suppressed,
        "kicks_per_request": queue.per_request(queue.kicks),
        "calls_per_request": queue.per_request(queue.calls),
        "operations": {
            name: _operation_json(operation, seconds)
            for name, operation in queue.operations.items()
        },
    }


def _operation_json(operation: OperationStatistics, seconds: float) -> dict[str, Any]:
    return {
        "requests": operation.requests,
        "bytes": operation.bytes,
        "errors": operation.errors,
        "invalid": operation.invalid,
        "iops": operation.requests / seconds,
        "bytes_per_second": operation.bytes / seconds,
        "latency_ns": {
            "mean": operation.mean_ns,
            **{name: operation.quantile(fraction) for name, fraction in QUANTILES.items()},
            "max": operation.latency_max_ns,
            "histogram": [
                [latency_bound(bucket), count]
                for bucket, count in enumerate(operation.latency)
                if count
            ],
        },
    }


# ---------------------------------------------------------------- for people


def _print_table(
    exports: Sequence[ExportFigures], found: Pages, args: argparse.Namespace, *, fit: bool = False
) -> None:
    lines = []
    for figures in exports:
        lines += table(
            figures.page, figures.seconds, figures.queues, list(QUANTILES.values()), _period(args)
        )
        lines.append("")
    if not exports:
        lines.append(_nothing(args, found))
    else:
        lines[-1:] = found.missing
    if fit:
        height = shutil.get_terminal_size().lines - 1
        if len(lines) > height > 1:
            hidden = len(lines) - height + 1
            lines[height - 1 :] = [f"... {hidden} more lines; --export NAME shows one export"]
    print("\n".join(lines))


def _period(args: argparse.Namespace) -> str:
    return "since it was opened" if args.watch is None else "in the last interval"


def _nothing(args: argparse.Namespace, found: Pages) -> str:
    wanted = [
        f"{what} {value}"
        for what, value in (("export", args.export), ("process", args.pid))
        if value is not None
    ]
    text = f"no statistics of {' in '.join(wanted) or 'any export'}"
    return "; ".join([text, *found.missing])


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 11 and int(text)):
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.01 <= value <= _DAY:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds from 0.01 to 86400")
    return value
