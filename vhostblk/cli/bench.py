"""`vhostblk bench SOCKET`: how fast any vhost-user-blk back-end is, and whether its data are right."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from vhostblk import __version__
from vhostblk.cli.serve import number
from vhostblk.client.bench.compare import compare, side
from vhostblk.client.bench.options import MAX_DEPTH, PATTERNS, BenchOptions, parse_pattern
from vhostblk.client.bench.plot import check_plot, plot
from vhostblk.client.bench.report import (
    bandwidth,
    comparison_json,
    comparison_table,
    rate,
    result_json,
    table_of,
)
from vhostblk.client.bench.run import Progress
from vhostblk.client.bench.self_test import SelfTest, self_test
from vhostblk.errors import ConfigError
from vhostblk.vhost.session import MAX_QUEUES

DESCRIPTION = """\
Connect to the socket of any vhost-user-blk back-end as a guest would, make requests, and show how many a
second there were, how long they took, and what they cost. Writing patterns overwrite the disk."""
EXAMPLES = """\
Examples:

  vhostblk bench /tmp/disk.sock --pattern randread --depth 32 --duration 10
  vhostblk bench /tmp/disk.sock --pattern write --verify --once --size 1G
  vhostblk bench /tmp/disk.sock --pattern read=60,write=30,flush=5,discard=5 --verify --queues 4
"""

DEFAULT_RUNS = 5

_MAX_U64 = (1 << 63) - 1
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument(
        "socket",
        nargs="?",
        metavar="SOCKET",
        help="where the back-end listens (not needed with --self-test)",
    )
    what = parser.add_argument_group("what to ask for")
    what.add_argument(
        "--pattern",
        default="randread",
        metavar="P",
        help=f"{', '.join(PATTERNS)}, or OP=WEIGHT,... at random places (default: %(default)s)",
    )
    what.add_argument(
        "--read-percent",
        type=number(1, 99),
        metavar="N",
        help="reads of the patterns rw and randrw (default: 50)",
    )
    what.add_argument(
        "--block-size",
        default="4k",
        metavar="SIZE",
        help="of each request; MIN-MAX: multiples of MIN up to MAX (default: %(default)s)",
    )
    what.add_argument(
        "--offset", type=size, default=0, metavar="SIZE", help="where the range begins (default: 0)"
    )
    what.add_argument(
        "--size", type=size, metavar="SIZE", help="of the range (default: the rest of the disk)"
    )
    what.add_argument(
        "--flush-every", type=number(1, _MAX_U64 >> 32), metavar="N", help="a flush after N writes"
    )
    what.add_argument("--unmap", action="store_true", help="write-zeroes may give blocks back")
    what.add_argument(
        "--seed", type=number(0, _MAX_U64), default=1, metavar="N", help="(default: %(default)s)"
    )
    what.add_argument(
        "--verify",
        action="store_true",
        help="write what can be recognised, and compare what is read",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--depth",
        type=number(1, MAX_DEPTH),
        default=32,
        metavar="N",
        help="requests in flight on each queue (default: %(default)s)",
    )
    how.add_argument(
        "--queues",
        type=number(1, MAX_QUEUES),
        default=1,
        metavar="N",
        help="(default: %(default)s)",
    )
    how.add_argument(
        "--queue-size",
        type=number(1, 32768),
        metavar="N",
        help="entries of each (default: as many as are needed, at least 128)",
    )
    how.add_argument(
        "--threads",
        type=number(1, MAX_QUEUES),
        default=1,
        metavar="N",
        help="of the client, which share the queues (default: %(default)s)",
    )
    how.add_argument("--direct", action="store_true", help="no indirect descriptors")
    how.add_argument("--packed", action="store_true", help="packed rings instead of split ones")
    how.add_argument("--no-event-idx", action="store_true", help="without VIRTIO_F_EVENT_IDX")
    how.add_argument(
        "--segments",
        type=number(1, 1022),
        default=1,
        metavar="N",
        help="descriptors for the data of a request (default: %(default)s)",
    )
    how.add_argument(
        "--wait",
        choices=("poll", "eventfd"),
        default="poll",
        help="how completions are noticed (default: %(default)s)",
    )
    how.add_argument(
        "--batch",
        type=number(1, 32768),
        metavar="N",
        help="requests shown to the back-end at once, at most (default: the client's choice)",
    )
    how.add_argument(
        "--rate", type=number(1, _MAX_U64 >> 20), metavar="N", help="requests a second"
    )
    until = parser.add_argument_group("how long")
    until.add_argument(
        "--duration", type=seconds, default=10.0, metavar="S", help="(default: %(default)s)"
    )
    until.add_argument(
        "--ramp",
        type=seconds,
        default=1.0,
        metavar="S",
        help="before that, not measured (default: %(default)s)",
    )
    until.add_argument(
        "--requests", type=number(1, _MAX_U64), metavar="N", help="instead: so many requests"
    )
    until.add_argument(
        "--once", action="store_true", help="instead: once through the range (not at random)"
    )
    until.add_argument(
        "--timeout",
        type=seconds,
        default=10.0,
        metavar="S",
        help="give up when nothing happens for so long (default: %(default)s)",
    )
    until.add_argument(
        "--pid",
        type=number(1, 1 << 22),
        metavar="N",
        help="process whose CPU time is measured (default: who listens on the socket)",
    )
    out = parser.add_argument_group("what comes out")
    out.add_argument("--json", action="store_true", help="everything, for programs")
    out.add_argument(
        "--compare",
        metavar="SOCKET2",
        help="run on both in turn, show medians and what SOCKET is of SOCKET2",
    )
    out.add_argument(
        "--runs",
        type=number(1, 1000),
        metavar="N",
        help="runs on each with --compare (default: 5)",
    )
    out.add_argument(
        "--plot",
        metavar="FILE",
        help="draw latency and throughput (.svg, .png, ...); needs matplotlib",
    )
    out.add_argument(
        "--self-test",
        action="store_true",
        help="measure what the benchmark itself costs, without a back-end",
    )


def run(args: argparse.Namespace) -> None:
    """Run the benchmark and print its table.

    Raises:
        ConfigError, PeerError, OSError: one line explains it.
    """
    options = options_of(args)
    options.check()
    if args.runs and args.compare is None:
        raise ConfigError("--runs is for --compare")
    if args.self_test:
        if args.socket or args.compare or args.plot:
            raise ConfigError("--self-test needs no back-end: no SOCKET, --compare, --plot")
        _print_self_test(self_test(options), args.json)
        return
    if args.socket is None:
        raise ConfigError("a SOCKET is needed")
    if args.compare is not None and args.pid:
        raise ConfigError("--pid: with --compare there are two back-ends")
    if args.plot:
        check_plot(args.plot)
    title = f"{options.pattern.name}, {args.block_size}, depth {options.depth}, {options.queues} queue(s)"
    tell = _show if sys.stderr.isatty() else None
    try:
        first = side(args.socket, options, tell)
        if args.compare is None:
            result = first()
            sides = {args.socket: [result]}
            text = result_json(options, result) if args.json else table_of(result)
        else:
            found = compare(first, side(args.compare, options, tell), args.runs or DEFAULT_RUNS)
            sides = {f"A {args.socket}": found.first, f"B {args.compare}": found.second}
            text = comparison_json(options, found) if args.json else comparison_table(found)
    finally:
        if tell:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(text)
    if args.plot:
        plot(args.plot, title, sides)


def _print_self_test(found: SelfTest, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"version": __version__, "self_test": asdict(found)}, indent=2))
        return
    print(
        f"{found.busy_us:.4f} us for each request, {found.batch:.3g} at once;"
        f" an echo answered {rate(found.iops)} a second"
    )
    print(
        f"clock: {found.clock}, {found.ticks_per_second / 1e6:.0f} MHz;"
        f" a look takes {found.look_ns:.0f} ns, and there are three for each batch"
    )


def options_of(args: argparse.Namespace) -> BenchOptions:
    """Translate the command line.

    Raises:
        ConfigError: a pattern that is none.
    """
    block_min, block_max = _sizes(args.block_size)
    return BenchOptions(
        pattern=parse_pattern(args.pattern, args.read_percent),
        block_min=block_min,
        block_max=block_max,
        depth=args.depth,
        queues=args.queues,
        queue_size=args.queue_size or 0,
        threads=args.threads,
        indirect=not args.direct,
        event_idx=not args.no_event_idx,
        packed=args.packed,
        segments=args.segments,
        sleep=args.wait == "eventfd",
        batch=args.batch or 0,
        flush_every=args.flush_every or 0,
        unmap=args.unmap,
        verify=args.verify,
        duration=args.duration,
        ramp=args.ramp,
        rate=args.rate or 0,
        requests=args.requests or 0,
        once=args.once,
        offset=args.offset,
        size=args.size or 0,
        seed=args.seed,
        timeout=args.timeout,
        pid=args.pid or 0,
    )


def _show(progress: Progress) -> None:
    """One line on the terminal, again and again."""
    print(
        f"\r\033[K{progress.phase} {progress.seconds:.1f} s: {rate(progress.iops)} IOPS,"
        f" {bandwidth(progress.bytes_per_second)}",
        end="",
        file=sys.stderr,
        flush=True,
    )


def size(text: str) -> int:
    """The type of an option that takes bytes: 4096, 4k, 1G."""
    number, unit = text, ""
    if text and text[-1].lower() in _UNITS:
        number, unit = text[:-1], text[-1].lower()
    if not (number.isascii() and number.isdigit() and len(number) <= 19):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size, as 4096, 4k or 1G are")
    value = int(number) * _UNITS[unit]
    if not 0 <= value <= _MAX_U64:
        raise argparse.ArgumentTypeError(f"'{text}' is too large")
    return value


def _sizes(text: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    try:
        return size(low), size(high if dash else low)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--block-size: {error}") from None


def seconds(text: str) -> float:
    """The type of an option that takes seconds, with a fraction."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds")
    return value
