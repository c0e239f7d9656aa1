"""`measure`: how much room is a new image going to need?"""

from __future__ import annotations

import sys
from typing import ClassVar

from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.measure import NewImageSize
from vhostblk.block.qjson import format_json
from vhostblk.cli.img.arguments import (
    ImageArguments,
    ImgError,
    flag,
    listed,
    option_list,
    valued,
    wants_json,
)
from vhostblk.cli.img.numbers import size
from vhostblk.cli.img.session import Session, reason
from vhostblk.cli.img.snapshot_param import SnapshotParam, read_snapshot_param, show_snapshot
from vhostblk.cli.img.table import Command
from vhostblk.errors import ConfigError


def _size(text: str) -> int:
    return size("image size", text)


@lean_dataclass(slots=True)
class Measure(ImageArguments):
    """Its options."""

    # Of all subcommands only this one leaves it to getopt to complain.
    forgiving: ClassVar[bool] = True

    output: bool = valued("", "output", wants_json, default=False)
    size: int | None = valued("", "size", _size)
    force_share: bool = flag("U", "force-share")
    format: str | None = valued("f")
    output_format: str = valued("O", default="raw")
    options: tuple[str, ...] = listed("o", read=option_list)
    snapshot: SnapshotParam | None = valued("l", read=read_snapshot_param)

    def check(self) -> None:
        """See `Arguments.check`."""
        if len(self.words) > 1:
            raise ImgError("At most one filename argument is allowed.")
        about_source = self.image_opts or self.format is not None or self.snapshot is not None
        if not self.words and about_source:
            raise ImgError("--image-opts, -f, and -l require a filename argument.")
        if self.words and self.size is not None:
            raise ImgError("--size N cannot be used together with a filename.")
        if not self.words and self.size is None:
            raise ImgError("Either --size N or one filename must be specified.")


async def run(session: Session, args: Measure) -> int:
    """Tell it."""
    source = None
    if args.words:
        session.graph.looks_only = True
        image = await session.open(
            args.words[0], args.format, image_opts=args.image_opts, force_share=args.force_share
        )
        source = image.node
        await show_snapshot(session, source, args.snapshot)
    wanted = NewImageSize(session.graph.drivers, args.output_format)
    try:
        wanted.options.say(",".join(args.options))
    except ConfigError as error:
        session.complain(reason(error))
        raise ImgError(f"Invalid options for file format '{args.output_format}'") from None
    if args.size is not None:
        wanted.options.set("size", args.size)
    found = await wanted.measure(source)
    if args.output:
        answer = {"required": found.required, "fully-allocated": found.fully_allocated}
        if found.bitmaps is not None:
            answer["bitmaps"] = found.bitmaps
        sys.stdout.write(f"{format_json(answer, pretty=True)}\n")
        return 0
    session.out(f"required size: {found.required}")
    session.out(f"fully allocated size: {found.fully_allocated}")
    if found.bitmaps is not None:
        session.out(f"bitmaps size: {found.bitmaps}")
    return 0


COMMAND = Command(Measure, run)
