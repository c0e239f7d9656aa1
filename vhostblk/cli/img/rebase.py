"""`rebase`: have an image be backed by another one."""

from __future__ import annotations

from vhostblk.block.backing import change_backing_file
from vhostblk.block.chain import skip_filters
from vhostblk.block.flags import OpenFlag
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.modes import parse_cache_mode
from vhostblk.block.rebase import rebase
from vhostblk.cli.img.arguments import ImageArguments, ImgError, UsageError, flag, valued
from vhostblk.cli.img.progress import Progress
from vhostblk.cli.img.session import Session, reason
from vhostblk.cli.img.table import Command
from vhostblk.errors import BlockError, ConfigError


@lean_dataclass(slots=True)
class Rebase(ImageArguments):
    """Its options."""

    format: str | None = valued("f")
    backing_file: str | None = valued("b")
    backing_format: str | None = valued("F")
    cache: str = valued("t", default="writeback")
    source_cache: str = valued("T", default="writeback")
    unsafe: bool = flag("u")
    progress: bool = flag("p")
    quiet: bool = flag("q")
    force_share: bool = flag("U", "force-share")

    def check(self) -> None:
        """See `Arguments.check`."""
        self.check_one_image()
        if not self.unsafe and self.backing_file is None:
            raise UsageError("Must specify backing file (-b) or use unsafe mode (-u)")


async def run(session: Session, args: Rebase) -> int:
    """Rebase."""
    # Half as often as the others do.
    with Progress(args.progress and not args.quiet, step=2.0) as progress:
        cache = parse_cache_mode(args.cache)
        options = dict(parse_cache_mode(args.source_cache, "source cache").options)
        if args.force_share:
            options["force-share"] = True
        image = await session.open(
            *(args.words[0], args.format),
            image_opts=args.image_opts,
            writable=True,
            cache=cache,
            # Where the old one is gone, that is what this mends.
            flags=OpenFlag.NO_BACKING if args.unsafe else OpenFlag(0),
        )
        driver = args.backing_format
        if driver is not None and driver not in session.graph.drivers:
            raise ImgError(f"Invalid format name: '{driver}'")
        name = args.backing_file or ""
        driver = (driver or "") if name else ""
        try:
            if args.unsafe:
                await change_backing_file(session.graph, skip_filters(image.node), name, driver)
            else:
                await rebase(
                    *(session.graph, image.node, name, driver),
                    more=options,
                    report=progress.report,
                )
        except (BlockError, ConfigError) as error:
            text = reason(error)
            if args.backing_file is None:
                text = text.replace("''", "'(null)'", 1)  # as qemu-img calls it
            raise ImgError(text) from None
        progress.update(1.0)
    return 0


COMMAND = Command(Rebase, run)
