"""`create`: make an image."""

from __future__ import annotations

import sys
from typing import Any

from vhostblk.block.create import BackingFormatError, NewImage, help_on_options
from vhostblk.block.image_options import wants_help
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.cli.img.arguments import (
    Arguments,
    ImgError,
    UsageError,
    flag,
    listed,
    object_options,
    option_list,
    valued,
)
from vhostblk.cli.img.numbers import size
from vhostblk.cli.img.session import Session, reason
from vhostblk.cli.img.table import Command
from vhostblk.errors import BlockError, ConfigError


@lean_dataclass(slots=True)
class Create(Arguments):
    """Its options.

    Attributes:
        size: bytes, if they were said.
    """

    objects: tuple[tuple[str, Any], ...] = listed("", "object", read=object_options)
    format: str = valued("f", default="raw")
    backing_file: str | None = valued("b")
    backing_format: str | None = valued("F")
    options: tuple[str, ...] = listed("o", read=option_list)
    quiet: bool = flag("q")
    unsafe: bool = flag("u")
    size: int | None = None

    def check(self) -> None:
        """See `Arguments.check`."""
        if wants_help(",".join(self.options)):
            return
        if not self.words:
            raise UsageError("Expecting image file name")
        if len(self.words) > 1:
            self.size = size("image size", self.words[1])
        if len(self.words) > 2:
            raise UsageError(f"Unexpected argument: {self.words[2]}")


async def run(session: Session, args: Create) -> int:
    """Make it, or tell what there is to choose from."""
    session.quiet = args.quiet
    options = ",".join(args.options)
    if wants_help(options):
        name = args.words[0] if args.words else None
        sys.stdout.write(help_on_options(session.graph.drivers, args.format, name))
        return 0
    name = args.words[0]
    try:
        image = NewImage(session.graph, name, args.format)
        image.say(
            options,
            size=args.size,
            backing_file=args.backing_file,
            backing_format=args.backing_format,
        )
        await image.prepare(check_backing=not args.unsafe)
        session.print(f"Formatting '{name}', fmt={args.format} {image.options}")
        sys.stdout.flush()
        session.unfinished.append(name)
        await image.create()
        session.unfinished.remove(name)
    except (ConfigError, BlockError) as error:
        raise ImgError(f"{name}: {reason(error)}", hint=_hint(error)) from None
    return 0


def _hint(error: ConfigError | BlockError) -> str:
    found = error.found if isinstance(error, BackingFormatError) else ""
    # qemu-img does not end this line.
    return f"Detected format of {found}." if found else ""


COMMAND = Command(Create, run)
