"""`vhostblk check SOCKET`: does a vhost-user-blk back-end, ours or another's, keep to the specifications?

Output and exit codes are an interface: see docs/check.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from vhostblk.client.conformance.check import Check
from vhostblk.client.conformance.offer import Offer, protocol_feature_names, read_offer
from vhostblk.client.conformance.registry import ALL_CHECKS
from vhostblk.client.conformance.rig import SPAN, Rig
from vhostblk.client.conformance.runner import (
    NOT_ASKED,
    Outcome,
    Result,
    describe,
    run_checks,
    select,
)
from vhostblk.errors import ConfigError, VhostBlkError
from vhostblk.virtio.features import feature_names

DESCRIPTION = f"""\
Say what the vhost-user-blk back-end that listens on SOCKET offers, then check how it behaves: one line for each
check, with the section of VIRTIO or vhost-user that demands it. Nothing is written to the disk, and nothing forbidden
is done, unless asked for: --destructive overwrites the disk's first {SPAN >> 20} MiB and its last block, --hostile
does what may end a weak back-end.
Exit status: 0 all passed, 1 some failed, or wrong options, 2 the back-end could not be asked, or not for all."""
EXAMPLES = """\
Example: all there is, on a disk that nobody needs:

  vhostblk check /tmp/disk.sock --destructive --hostile
"""

_PASSED, _FAILED, _NO_ANSWER = 0, 1, 2


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument(
        "socket", metavar="SOCKET", nargs="?", help="path of the back-end's Unix socket"
    )
    parser.add_argument(
        "--destructive",
        action="store_true",
        help="also run the checks that write; the disk's content is lost: the first "
        f"{SPAN >> 20} MiB and the last block",
    )
    parser.add_argument(
        "--hostile",
        action="store_true",
        help="also be a bad guest and a bad front-end, and see whether the back-end lives",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="run the checks whose ids match, as 'notify' or 'request.read-*'; may be repeated",
    )
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out the checks whose ids match; may be repeated",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="a warning, where a specification says SHOULD, is a failure",
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=5.0,
        metavar="SECONDS",
        help="how long to wait for any answer (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--list", action="store_true", help="list the checks, and run none")


def run(args: argparse.Namespace) -> int:
    """Run the checks.

    Returns:
        The exit status.

    Raises:
        ConfigError: an option is wrong.
    """
    checks = select(ALL_CHECKS, args.only, args.skip)
    if not checks:
        raise ConfigError("--only, --skip: no check is left")
    if args.list:
        _print_list(checks, as_json=args.json)
        return _PASSED
    if args.socket is None:
        raise ConfigError("a SOCKET is needed")
    try:
        offer = read_offer(args.socket, timeout=args.timeout)
    except (VhostBlkError, OSError) as error:
        print(f"vhostblk: {args.socket}: {describe_failure(error)}", file=sys.stderr)
        return _NO_ANSWER
    rig = Rig(
        args.socket,
        offer,
        timeout=args.timeout,
        destructive=args.destructive,
        hostile=args.hostile,
    )
    report = _JsonReport(rig) if args.json else _TextReport(rig)
    if args.destructive and not offer.is_read_only:
        try:
            rig.fill()
        except Exception as error:
            report.note(f"the disk could not be filled: {describe(error)}")
    counts: Counter[Outcome] = Counter()
    for result in run_checks(rig, checks):
        counts[result.outcome] += 1
        report.result(result)
    report.summary(counts, len(checks) - counts.total())
    bad = counts[Outcome.FAIL] + (counts[Outcome.WARN] if args.strict else 0)
    if bad:
        return _FAILED
    return _PASSED if offer.is_whole else _NO_ANSWER


def describe_failure(error: Exception) -> str:
    """One line about a back-end that cannot be asked."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return describe(error)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.01 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds from 0.01 to 3600")
    return value


# ---------------------------------------------------------------- what is printed


class _TextReport:
    """One line for each check, as it ends."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._skipped: Counter[str] = Counter()
        print(*_offer_lines(rig.offer), sep="\n")
        if rig.destructive and not rig.offer.is_read_only:
            self.note(
                f"DESTRUCTIVE: overwrites the first {rig.span} bytes of the disk, and the last block"
            )
        print(flush=True)

    def note(self, text: str) -> None:
        print(f"note: {text}", flush=True)

    def result(self, result: Result) -> None:
        check = result.check
        if result.outcome is Outcome.SKIP:
            self._skipped[result.detail] += 1
            if result.detail.startswith(NOT_ASKED):
                return  # the summary counts them
        detail = f"  {printable(result.detail)}" if result.detail else ""
        line = f"{result.outcome.value:<4}  {check.id:<36}  {check.title}  [{check.spec}]{detail}"
        print(line, flush=True)

    def summary(self, counts: Counter[Outcome], not_run: int) -> None:
        words = [f"{counts[Outcome.OK]} passed", f"{counts[Outcome.FAIL]} failed"]
        words += [f"{counts[Outcome.WARN]} warnings", f"{counts[Outcome.SKIP]} skipped"]
        if not_run:
            words.append(f"{not_run} not run")
        print(f"\n{', '.join(words)}")
        for option in ("--destructive", "--hostile"):
            if count := self._skipped[NOT_ASKED + option]:
                print(f"{count} of the skipped need {option}")


class _JsonReport:
    """Everything in one object, at the end."""

    def __init__(self, rig: Rig) -> None:
        self._report: dict[str, Any] = {
            "socket": rig.path,
            "destructive": rig.destructive,
            "hostile": rig.hostile,
            "offer": rig.offer.to_json(),
            "notes": [],
            "checks": [],
        }

    def note(self, text: str) -> None:
        self._report["notes"].append(text)

    def result(self, result: Result) -> None:
        self._report["checks"].append(
            {
                **_describe_check(result.check),
                "outcome": result.outcome.value.lower(),
                "detail": result.detail,
                "seconds": round(result.seconds, 6),
            }
        )

    def summary(self, counts: Counter[Outcome], not_run: int) -> None:
        summary = {outcome.value.lower(): counts[outcome] for outcome in Outcome}
        self._report["summary"] = {**summary, "not_run": not_run}
        json.dump(self._report, sys.stdout, indent=2)
        print()


def _offer_lines(offer: Offer) -> list[str]:
    slots = "unknown" if offer.max_mem_slots is None else str(offer.max_mem_slots)
    fields = ", ".join(f"{name} {value}" for name, value in offer.fields().items())
    lines = [
        f"features           {feature_names(offer.features)}",
        f"protocol features  {protocol_feature_names(offer.protocol_features)}",
        f"queues             {offer.queues}",
        f"memory slots       {slots}",
        f"capacity           {offer.capacity} bytes",
        f"configuration      {fields}",
    ]
    return lines + [f"problem            {printable(problem)}" for problem in offer.problems]


def _describe_check(check: Check) -> dict[str, Any]:
    return {
        "id": check.id,
        "title": check.title,
        "spec": check.spec,
        "level": check.level.value,
        "writes": check.writes,
        "hostile": check.hostile,
    }


def _print_list(checks: Sequence[Check], *, as_json: bool) -> None:
    if as_json:
        json.dump([_describe_check(check) for check in checks], sys.stdout, indent=2)
        print()
        return
    for check in checks:
        needs = [check.level.value]
        needs += ["--destructive"] if check.writes else []
        needs += ["--hostile"] if check.hostile else []
        print(f"{check.id:<36}  {check.title}  [{check.spec}]  {' '.join(needs)}")


def printable(text: str) -> str:
    """Escape what would end the line, or play with the terminal: it may come from the back-end."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
