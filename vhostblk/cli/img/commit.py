"""`commit`: write what an image has into what it is backed by, or further down."""

from __future__ import annotations

from vhostblk.block.chain import find_backing_image, next_layer
from vhostblk.block.commit import EmptyingError, commit
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.modes import parse_cache_mode
from vhostblk.cli.img.arguments import ImageArguments, ImgError, flag, valued
from vhostblk.cli.img.numbers import size
from vhostblk.cli.img.progress import Progress
from vhostblk.cli.img.session import Session, reason
from vhostblk.cli.img.table import Command
from vhostblk.errors import BlockError, ConfigError


@lean_dataclass(slots=True)
class Commit(ImageArguments):
    """Its options."""

    format: str | None = valued("f")
    cache: str = valued("t", default="writeback")
    base: str | None = valued("b")
    drop: bool = flag("d")
    progress: bool = flag("p")
    quiet: bool = flag("q")
    speed: int = valued("r", read=lambda text: size("rate limit", text), default=0)

    def check(self) -> None:
        """See `Arguments.check`."""
        self.check_one_image()


async def run(session: Session, args: Commit) -> int:
    """Commit."""
    session.quiet = args.quiet
    (name,) = args.words
    image = await session.open(
        *(name, args.format),
        image_opts=args.image_opts,
        writable=True,
        cache=parse_cache_mode(args.cache),
        more={"discard": "unmap"},
    )
    with Progress(args.progress and not args.quiet) as progress:
        if args.base is not None:
            base = await find_backing_image(image.node, args.base)
            if base is None:
                raise ImgError(f"Did not find '{args.base}' in the backing chain of '{name}'")
        else:
            base = next_layer(image.node)
            if base is None:
                raise ImgError("Image does not have a backing file")
        try:
            await commit(
                *(session.graph, image.node, base),
                empty=not args.drop and args.base is None,
                speed=args.speed,
                report=progress.report,
            )
        except EmptyingError as error:
            raise ImgError(reason(error)) from None
        except BlockError as error:
            raise ImgError(f"Block job failed: {reason(error)}") from None
        except ConfigError as error:
            raise ImgError(reason(error)) from None
        progress.update(1.0)
    session.print("Image committed.")
    return 0


COMMAND = Command(Commit, run)
