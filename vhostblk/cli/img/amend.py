"""`amend`: change what an image is like."""

from __future__ import annotations

import sys

from vhostblk.block.amend import amend, amend_options, help_on_amending
from vhostblk.block.image_options import wants_help
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.modes import parse_cache_mode
from vhostblk.cli.img.arguments import (
    ImageArguments,
    ImgError,
    UsageError,
    flag,
    listed,
    option_list,
    valued,
)
from vhostblk.cli.img.progress import Progress
from vhostblk.cli.img.session import Session
from vhostblk.cli.img.table import Command


@lean_dataclass(slots=True)
class Amend(ImageArguments):
    """Its options."""

    options: tuple[str, ...] = listed("o", read=option_list)
    format: str | None = valued("f")
    cache: str = valued("t", default="writeback")
    progress: bool = flag("p")
    quiet: bool = flag("q")
    # For keys of encrypted images.
    force: bool = flag("", "force")

    def check(self) -> None:
        """See `Arguments.check`."""
        if not self.options:
            raise UsageError("Must specify options (-o)")


async def run(session: Session, args: Amend) -> int:
    """Do it, or tell what there is to choose from."""
    with Progress(args.progress and not args.quiet, at_once=False) as progress:
        await _run(session, args, progress)
    return 0


async def _run(session: Session, args: Amend, progress: Progress) -> None:
    drivers = session.graph.drivers
    options = ",".join(args.options)
    if args.format is not None and wants_help(options):
        sys.stdout.write(help_on_amending(drivers, args.format))
        return
    if len(args.words) != 1:
        raise ImgError("Expecting one image file name")
    image = await session.open(
        args.words[0],
        args.format,
        image_opts=args.image_opts,
        writable=True,
        cache=parse_cache_mode(args.cache),
    )
    driver = type(image.node)
    if wants_help(options):
        sys.stdout.write(help_on_amending(drivers, driver.driver_name))
        return
    amend_options(driver)

    def show(done: int, total: int) -> None:
        progress.begin()
        if done:
            progress.update(done / total)

    await amend(session.graph, image.node, options, show, force=args.force)


COMMAND = Command(Amend, run)
