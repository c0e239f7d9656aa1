"""`create`: make an image."""

from __future__ import annotations

from dataclasses import dataclass

from vhostblk.block.create import create_image
from vhostblk.cli.img.arguments import Arguments, UsageError, flag, listed, valued
from vhostblk.cli.img.session import Session
from vhostblk.cli.img.table import Command


@dataclass
class Create(Arguments):
    """Its options."""

    objects: tuple[str, ...] = listed("", "object")
    format: str = valued("f", default="raw")
    backing_file: str | None = valued("b")
    backing_format: str | None = valued("F")
    options: tuple[str, ...] = listed("o")
    quiet: bool = flag("q")
    unsafe: bool = flag("u")

    def check(self) -> None:
        """See `Arguments.check`."""
        if not self.words:
            raise UsageError("Expecting image file name")


async def run(session: Session, args: Create) -> int:
    """Make it."""
    await create_image(session.graph, args.words[0], args.format, ",".join(args.options) or None)
    return 0


COMMAND = Command(Create, run)
