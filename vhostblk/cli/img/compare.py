"""`compare`: do two images show the same?

Exit codes: 0, the same; 1, not; 2, an image cannot be opened; 3, nobody knows what it has where; 4, it cannot be read.
"""

from __future__ import annotations

import os
from typing import Any

from vhostblk.block.compare import CompareError, Outcome, compare
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.modes import parse_cache_mode
from vhostblk.cli.img.arguments import (
    ImageArguments,
    ImgError,
    UsageError,
    flag,
    listed,
    object_options,
    valued,
)
from vhostblk.cli.img.progress import Progress
from vhostblk.cli.img.session import Session
from vhostblk.cli.img.table import Command
from vhostblk.errors import ConfigError

_NOT_OPEN, _NOT_KNOWN, _NOT_READ = 2, 3, 4


def _object(text: str) -> tuple[str, Any]:
    try:
        return object_options(text)
    except ImgError as error:
        error.status = _NOT_OPEN
        raise


@lean_dataclass(slots=True)
class Compare(ImageArguments):
    """Its options."""

    objects: tuple[tuple[str, Any], ...] = listed("", "object", read=_object)
    format: str | None = valued("f")
    other_format: str | None = valued("F")
    cache: str = valued("T", default="writeback")
    progress: bool = flag("p")
    quiet: bool = flag("q")
    strict: bool = flag("s")
    force_share: bool = flag("U", "force-share")

    def check(self) -> None:
        """See `Arguments.check`."""
        if len(self.words) != 2:
            raise UsageError("Expecting two image file names")


async def run(session: Session, args: Compare) -> int:
    """Compare them."""
    session.quiet = args.quiet
    with Progress(args.progress and not args.quiet, step=2.0, at_once=False) as progress:
        return await _compare(session, args, progress)


async def _compare(session: Session, args: Compare, progress: Progress) -> int:
    formats = (args.format, args.other_format)
    try:
        cache = parse_cache_mode(args.cache, "source cache")
        first, second = [
            await session.open(
                *(name, driver),
                image_opts=args.image_opts,
                cache=cache,
                force_share=args.force_share,
            )
            for name, driver in zip(args.words, formats, strict=True)
        ]
    except ConfigError as error:
        raise ImgError(error.qemu_text, _NOT_OPEN) from None
    except ImgError as error:
        error.status = _NOT_OPEN
        raise
    common, end = sorted((first.length, second.length))
    warned = common == end

    def is_the_same_up_to(offset: int) -> None:
        nonlocal warned
        if not warned and offset > common:
            warned = True
            session.print("Warning: Image size mismatch!")

    def report(done: int) -> None:
        is_the_same_up_to(done)
        progress.update(done / end)

    progress.begin()
    try:
        found = await compare(first, second, strict=args.strict, progress=report)
    except CompareError as error:
        # What is behind the end of the shorter one is looked at after this was said.
        is_the_same_up_to(error.offset + 1)
        name = args.words[error.image]
        if not error.in_read:
            raise ImgError(f"Sector allocation test failed for {name}", _NOT_KNOWN) from None
        why = os.strerror(error.errno or 0)
        raise ImgError(
            f"Error while reading offset {error.offset} of {name}: {why}", _NOT_READ
        ) from None
    if found.outcome is Outcome.SIZE:
        session.print("Strict mode: Image size mismatch!")
        return 1
    is_the_same_up_to(found.offset + 1)
    match found.outcome:
        case Outcome.IDENTICAL:
            session.print("Images are identical.")
            return 0
        case Outcome.STATUS:
            session.print(f"Strict mode: Offset {found.offset} block status mismatch!")
        case Outcome.CONTENT:
            session.print(f"Content mismatch at offset {found.offset}!")
    return 1


COMMAND = Command(Compare, run)
