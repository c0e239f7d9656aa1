"""`bitmap`: make, change and remove the dirty bitmaps that an image keeps; the actions are done in the order given."""

from __future__ import annotations

from vhostblk.block.backend import BlockBackend
from vhostblk.block.dirty_bitmap import add_bitmap, find_bitmap, merge_bitmaps, remove_bitmap
from vhostblk.block.flags import OpenFlag
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.cli.img.arguments import ImageArguments, ImgError, flag, listed, valued
from vhostblk.cli.img.numbers import size
from vhostblk.cli.img.session import Session, reason
from vhostblk.cli.img.table import Command
from vhostblk.errors import BlockError, ConfigError

_ACTIONS = ("add", "remove", "clear", "enable", "disable", "merge")


@lean_dataclass(slots=True)
class Bitmap(ImageArguments):
    """Its options."""

    format: str | None = valued("f")
    source: str | None = valued("b", "source-file")
    source_format: str | None = valued("F", "source-format")
    granularity: int = valued("g", "granularity", lambda text: size("granularity", text), 0)
    add: bool = flag("", "add")
    remove: bool = flag("", "remove")
    clear: bool = flag("", "clear")
    enable: bool = flag("", "enable")
    disable: bool = flag("", "disable")
    merge: tuple[str, ...] = listed("", "merge")

    @property
    def actions(self) -> list[str]:
        """What is to be done, in order."""
        return [name for name in self.order if name in _ACTIONS]

    def check(self) -> None:
        """See `Arguments.check`."""
        if not self.actions:
            raise ImgError(
                "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"
            )
        if self.granularity and not self.add:
            raise ImgError("granularity only supported with --add")
        if self.source_format is not None and self.source is None:
            raise ImgError("-F only supported with -b")
        if self.source is not None and not self.merge:
            raise ImgError("Merge bitmap source file only supported with --merge")
        if len(self.words) != 2:
            raise ImgError("Expecting filename and bitmap name")


async def run(session: Session, args: Bitmap) -> int:
    """Do it."""
    filename, name = args.words
    image = await session.open(
        *(filename, args.format),
        image_opts=args.image_opts,
        writable=True,
        flags=OpenFlag.NO_BACKING,
    )
    source = image
    if args.source is not None:
        source = await session.open(args.source, args.source_format, flags=OpenFlag.NO_BACKING)
    # Of what is given, 32 bits reach what makes bitmaps.
    granularity = args.granularity & 0xFFFF_FFFF if args.granularity else None
    merges = iter(args.merge)
    for action in args.actions:
        other = next(merges) if action == "merge" else ""
        try:
            await _do(session, action, image, name, source, other, granularity)
        except (ConfigError, BlockError) as error:
            raise ImgError(f"Operation {action} on bitmap {name} failed: {reason(error)}") from None
    if source is not image:
        await session.close(source)
    await session.close(image)
    return 0


async def _do(
    session: Session,
    action: str,
    image: BlockBackend,
    name: str,
    source: BlockBackend,
    other: str,
    granularity: int | None,
) -> None:
    node = image.node
    if action == "add":
        await add_bitmap(session.graph, node, name, granularity, persistent=True)
        return
    bitmap = find_bitmap(node, name)
    match action:
        case "remove":
            await remove_bitmap(session.graph, bitmap)
        case "clear":
            bitmap.clear()
        case "enable":
            await bitmap.enable()
        case "disable":
            await bitmap.disable()
        case "merge":
            merge_bitmaps(bitmap, [find_bitmap(source.node, other)])


COMMAND = Command(Bitmap, run)
