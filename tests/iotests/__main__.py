"""`make iotests`: QEMU's iotests with our qemu-img, qemu-io and qemu-storage-daemon; see docs/iotests.md.

A test counts if QEMU's own tools pass it here and it starts no system emulator; that is found out by running it once,
and kept until another QEMU is installed. Exit status: 0 all that counts passes, but for what the document says, 1 it
does not, 77 something is missing that cannot be installed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tests.debian_source import BuildError
from tests.iotests.results import DOCUMENT, Kept, is_eligible, known_failures
from tests.iotests.running import PASSED, Result, adopt_orphans, list_tests, run_test
from tests.iotests.suite import Tools, get_suite, our_tools, say, stock_tools

GROUPS = "rw,auto,quick"
FORMATS = ("raw", "qcow2")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.iotests", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--format", action="append", choices=FORMATS, help="only this one (repeatable)")
    add("-g", "--groups", default=GROUPS, help=f"tests of these groups (default: {GROUPS})")
    add(
        "--stock",
        action="store_true",
        help="run QEMU's tools only; tests that are named also if known",
    )
    add(
        "--stock-program",
        action="append",
        default=[],
        metavar="NAME",
        help="QEMU's instead of ours for this one, to find out whose fault it is (repeatable)",
    )
    add("--failed", action="store_true", help="only what failed with ours the last time, or is new")
    add("--dry-run", action="store_true", help="run nothing, show what is known")
    add("--limit", type=float, default=300, help="seconds for a test (default: 300)")
    add("tests", nargs="*", metavar="TEST", help="only these")
    return parser


class Run:
    """The tests of one format."""

    def __init__(self, args: argparse.Namespace, image_format: str, version: str) -> None:
        self._args = args
        self._format = image_format
        self._stock = Kept("stock", image_format, version)
        self._ours = Kept("ours", image_format, version)
        self._reasons = known_failures(DOCUMENT.read_text()) if DOCUMENT.exists() else {}
        self.counted = self.passed = 0
        self.surprises: list[str] = []

    def tests(self, tools: Tools) -> list[str]:
        """Which ones, in order."""
        return self._args.tests or list_tests(tools, self._format, self._args.groups)

    def run(self, stock: Tools, ours: Tools) -> None:
        """Run them, a line for each that counts."""
        for test in self.tests(stock):
            self._one(test, stock, ours)

    def _one(self, test: str, stock: Tools, ours: Tools) -> None:
        args = self._args
        theirs = self._stock.results.get(test)
        again = args.stock and args.tests
        if again or (theirs is None and not args.dry_run):
            theirs = run_test(stock, self._format, test, args.limit)
            self._stock.put(test, theirs)
        if theirs is None or not is_eligible(theirs):
            if theirs is not None and (args.stock or args.tests):
                self._show(test, theirs, None)
            return
        result = self._ours.results.get(test)
        wanted = not args.failed or result is None or result.status != PASSED
        if not args.stock and not args.dry_run and wanted:
            result = run_test(ours, self._format, test, args.limit)
            self._ours.put(test, result)
        self._show(test, theirs, result)

    def _show(self, test: str, stock: Result, ours: Result | None) -> None:
        reason = self._reasons.get((self._format, test), "")
        remark = ours.remark if ours is not None else stock.remark
        if ours is not None and is_eligible(stock):
            self.counted += 1
            good = ours.status == PASSED
            self.passed += good
            if good and reason:
                remark = f"passes, but {DOCUMENT.name} has it: {reason}"
            elif not good:
                remark = "; ".join(filter(None, (remark, reason or "not known")))
            if good == bool(reason):
                self.surprises.append(f"{self._format} {test}")
        mine = f"{ours.status} {ours.seconds:.0f}s" if ours is not None else "-"
        theirs = f"{stock.status} {stock.seconds:.0f}s"
        print(f"{self._format:<6} {test:<28} {theirs:<14} {mine:<12} {remark}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        version = get_suite()
        stock = stock_tools()
        ours = stock if args.stock else our_tools(args.stock_program)
    except BuildError as error:
        say(error)
        return error.status
    adopt_orphans()
    print(f"{'format':<6} {'test':<28} {'stock':<14} {'ours':<12} remark")
    runs = []
    for image_format in args.format or FORMATS:
        run = Run(args, image_format, version)
        runs.append((image_format, run))
        run.run(stock, ours)
    for image_format, run in runs:
        print(f"{image_format}: {run.passed} of {run.counted} pass")
    surprises = [name for _, run in runs for name in run.surprises]
    if surprises:
        print(f"not as {DOCUMENT.name} has it: {', '.join(surprises)}")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
