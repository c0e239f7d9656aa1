"""`check`: is an image whole, and what can be repaired of it?

Exit codes: 0, all is well; 1, the check could not be made; 2, something is wrong; 3, clusters are lost, nothing else;
63, the format has no checks.
"""

from __future__ import annotations

import errno
import os
import sys

from vhostblk.block.check import CheckResult, check
from vhostblk.block.flags import CheckMode, OpenFlag
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.modes import parse_cache_mode
from vhostblk.block.qjson import format_json
from vhostblk.cli.img.arguments import (
    ImageArguments,
    ImgError,
    UsageError,
    flag,
    valued,
    wants_json,
)
from vhostblk.cli.img.session import Session
from vhostblk.cli.img.table import Command
from vhostblk.errors import BlockError

_CORRUPT, _LEAKS, _NO_CHECKS = 2, 3, 63


def _repair(text: str) -> CheckMode:
    match text:
        case "leaks":
            return CheckMode.FIX_LEAKS
        case "all":
            return CheckMode.FIX_LEAKS | CheckMode.FIX_ERRORS
    raise UsageError(f"Unknown option value for -r (expecting 'leaks' or 'all'): {text}")


@lean_dataclass(slots=True)
class Check(ImageArguments):
    """Its options."""

    format: str | None = valued("f", "format")
    repair: CheckMode = valued("r", "repair", _repair, CheckMode(0))
    output: str | None = valued("", "output")
    cache: str = valued("T", default="writeback")
    quiet: bool = flag("q")
    force_share: bool = flag("U", "force-share")

    def check(self) -> None:
        """See `Arguments.check`."""
        self.check_one_image()


async def run(session: Session, args: Check) -> int:
    """Check it; what was repaired is checked again."""
    as_json = wants_json(args.output)
    cache = parse_cache_mode(args.cache, "source cache")
    session.quiet = args.quiet
    session.graph.looks_only = True
    image = await session.open(
        args.words[0],
        args.format,
        image_opts=args.image_opts,
        writable=bool(args.repair),
        cache=cache,
        force_share=args.force_share,
        flags=OpenFlag.CHECK,
    )

    async def look(fix: CheckMode) -> CheckResult:
        try:
            return await check(image.node, fix, _say, session.complain)
        except BlockError as error:
            if error.errno == errno.ENOTSUP:
                message = "This image format does not support checks"
                raise ImgError(message, _NO_CHECKS) from None
            return CheckResult(failure=error.errno or errno.EIO)

    found = await look(args.repair)
    fixed = CheckResult()
    if not found.failure and (found.leaks_fixed or found.corruptions_fixed):
        fixed = found
        if not as_json:
            session.print(
                "The following inconsistencies were found and repaired:\n\n"
                f"    {fixed.leaks_fixed} leaked clusters\n"
                f"    {fixed.corruptions_fixed} corruptions\n\n"
                "Double checking the fixed image now..."
            )
        found = await look(CheckMode(0))
        found.leaks_fixed, found.corruptions_fixed = fixed.leaks_fixed, fixed.corruptions_fixed
    if found.failure:
        raise ImgError(f"Check failed: {os.strerror(found.failure)}")
    if as_json:
        session.print(format_json(_json(found, args.words[0], image.node.driver_name), pretty=True))
    else:
        _print(session, found)
    if found.check_errors:
        raise ImgError("Check failed")
    if found.corruptions:
        return _CORRUPT
    return _LEAKS if found.leaks else 0


def _say(message: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"{message}\n")


_COUNTS = (
    *("image_end_offset", "corruptions", "leaks", "corruptions_fixed", "leaks_fixed"),
    *("total_clusters", "allocated_clusters", "fragmented_clusters", "compressed_clusters"),
)


def _json(found: CheckResult, filename: str, driver: str) -> dict[str, object]:
    """QMP's `ImageCheck`: what is 0 is not there, but for errors."""
    counts = {name.replace("_", "-"): getattr(found, name) for name in _COUNTS}
    return {
        "filename": filename,
        "format": driver,
        "check-errors": found.check_errors,
        **{name: count for name, count in counts.items() if count},
    }


def _print(session: Session, found: CheckResult) -> None:
    if not (found.corruptions or found.leaks or found.check_errors):
        session.print("No errors were found on the image.")
    if found.corruptions:
        session.print(
            f"\n{found.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it."
        )
    if found.leaks:
        session.print(
            f"\n{found.leaks} leaked clusters were found on the image.\n"
            "This means waste of disk space, but no harm to data."
        )
    if found.check_errors:
        session.print(f"\n{found.check_errors} internal errors have occurred during the check.")
    total, allocated = found.total_clusters, found.allocated_clusters
    if total and allocated:
        session.print(
            f"{allocated}/{total} = {allocated * 100.0 / total:.2f}% allocated,"
            f" {found.fragmented_clusters * 100.0 / allocated:.2f}% fragmented,"
            f" {found.compressed_clusters * 100.0 / allocated:.2f}% compressed clusters"
        )
    if found.image_end_offset:
        session.print(f"Image end offset: {found.image_end_offset}")


COMMAND = Command(Check, run)
