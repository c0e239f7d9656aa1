"""Runs checks, one after the other, and judges what came of each.

Theory of operation. A check that returns has passed; one that raises has failed, whatever it raised,
because a back-end can make any part of a client fail. After a failure, and after every hostile check,
the back-end must accept a new connection and serve a read: otherwise it is gone, and the run ends.

Knows nothing of what is checked, nor of how results are shown.
"""

from __future__ import annotations

import enum
import fnmatch
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from vhostblk.client.conformance.check import Check, Level, NotApplicableError
from vhostblk.client.conformance.offer import protocol_feature_names
from vhostblk.client.conformance.rig import Rig
from vhostblk.errors import VhostBlkError
from vhostblk.virtio.features import Feature, feature_names

__all__ = [
    "GONE",
    "NOT_ASKED",
    "Outcome",
    "Result",
    "describe",
    "reason_to_skip",
    "run_checks",
    "select",
]

GONE = "back end gone"
NOT_ASKED = "only with "
"""How the reason of what an option would run begins."""

_SMALLEST = 1 << 20


class Outcome(enum.Enum):
    """What came of a check."""

    OK = "ok"
    FAIL = "FAIL"
    WARN = "warn"
    """It failed, but what it demands is only a SHOULD."""
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one check."""

    check: Check
    outcome: Outcome
    detail: str = ""
    seconds: float = 0.0
    is_gone: bool = False
    """The back-end does not serve any more; no result follows."""


def select(checks: Iterable[Check], only: Sequence[str], skip: Sequence[str]) -> list[Check]:
    """Choose checks by patterns of their ids (`request.*`); a bare area means all of it.

    Args:
        only: if any, a check must match one of them.
        skip: a check must match none of them.
    """

    def matches(check: Check, patterns: Sequence[str]) -> bool:
        return any(p == check.area or fnmatch.fnmatchcase(check.id, p) for p in patterns)

    return [
        check for check in checks if (not only or matches(check, only)) and not matches(check, skip)
    ]


def reason_to_skip(check: Check, rig: Rig) -> str | None:
    """Say why a check cannot be run here; None if it can."""
    offer = rig.offer
    if check.hostile and not rig.hostile:
        return NOT_ASKED + "--hostile"
    if check.features & ~offer.features:
        return f"needs {feature_names(check.features & ~offer.features)}"
    if missing := check.protocol & ~offer.protocol_features:
        return f"needs {protocol_feature_names(missing)}"
    if unwanted := check.without & offer.features:
        return f"{feature_names(unwanted)} is offered"
    if check.queues > offer.queues:
        return f"needs {check.queues} queues"
    if not check.writes:
        return None
    if not rig.destructive:
        return NOT_ASKED + "--destructive"
    # What a read-only disk is asked is refused, or so the check says.
    if offer.is_read_only and not check.features & Feature.VIRTIO_BLK_F_RO:
        return "the disk is read-only"
    if rig.capacity < _SMALLEST:
        return f"the disk has less than {_SMALLEST} bytes"
    return None


def run_checks(rig: Rig, checks: Iterable[Check]) -> Iterator[Result]:
    """Run checks; each gives a result, until the back-end is gone.

    Args:
        checks: those that cannot be run give a result, too.
    """
    for check in checks:
        reason = reason_to_skip(check, rig)
        if reason is not None:
            yield Result(check, Outcome.SKIP, reason)
            continue
        began = time.monotonic()
        outcome, detail = _run(check, rig)
        gone = None
        if check.hostile or outcome in (Outcome.FAIL, Outcome.WARN):
            gone = _gone(rig)
        seconds = time.monotonic() - began
        if gone is not None:
            detail = f"{GONE}: {gone}" + (f" (after: {detail})" if detail else "")
            yield Result(check, Outcome.FAIL, detail, seconds, is_gone=True)
            return
        yield Result(check, outcome, detail, seconds)


def _run(check: Check, rig: Rig) -> tuple[Outcome, str]:
    try:
        return Outcome.OK, check.run(rig) or ""
    except NotApplicableError as error:
        return Outcome.SKIP, str(error)
    except Exception as error:
        # Not only what is expected: nothing that a back-end sends may end the run.
        failed = Outcome.FAIL if check.level is Level.MUST else Outcome.WARN
        return failed, describe(error)


def _gone(rig: Rig) -> str | None:
    """Say why the back-end is gone; None if it serves."""
    try:
        rig.still_serves()
    except Exception as error:
        return describe(error)
    return None


def describe(error: Exception) -> str:
    """One line about a failure."""
    text = " ".join(str(error).split())
    if isinstance(error, VhostBlkError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
