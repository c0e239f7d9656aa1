"""`info`: what is known about an image, and about those that it is backed by."""

from __future__ import annotations

import sys

from vhostblk.block.flags import OpenFlag
from vhostblk.block.image_info import ImageInfo, query_image_info
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.qjson import format_json
from vhostblk.cli.image_info_text import image_info_text
from vhostblk.cli.img.arguments import (
    ImageArguments,
    ImgError,
    flag,
    valued,
    wants_json,
)
from vhostblk.cli.img.session import Session
from vhostblk.cli.img.table import Command


@lean_dataclass(slots=True)
class Info(ImageArguments):
    """Its options."""

    format: str | None = valued("f", "format")
    output: str | None = valued("", "output")
    backing_chain: bool = flag("", "backing-chain")
    force_share: bool = flag("U", "force-share")

    def check(self) -> None:
        """See `Arguments.check`."""
        self.check_one_image()


async def run(session: Session, args: Info) -> int:
    """Tell it."""
    as_json = wants_json(args.output)
    found = await _look(session, args)
    if as_json:
        answers = [info.to_qmp() for info in found]
        answer = answers if args.backing_chain else answers[0]
        sys.stdout.write(f"{format_json(answer, pretty=True)}\n")
    else:
        sys.stdout.write("\n".join(map(image_info_text, found)))
    return 0


async def _look(session: Session, args: Info) -> list[ImageInfo]:
    """One image, or the whole chain; each is opened alone, as it is named in the one before."""
    found: list[ImageInfo] = []
    session.graph.looks_only = True
    seen: set[str] = set()
    name: str | None = args.words[0]
    driver, image_opts = args.format, args.image_opts
    while name is not None:
        if name in seen:
            raise ImgError(f"Backing file '{name}' creates an infinite loop.")
        seen.add(name)
        image = await session.open(
            name,
            driver,
            image_opts=image_opts,
            force_share=args.force_share,
            flags=OpenFlag.NO_BACKING | OpenFlag.NO_IO,
        )
        info = await query_image_info(image.node)
        await session.close(image)
        found.append(info)
        if not args.backing_chain:
            break
        name, driver, image_opts = info.full_backing_filename, info.backing_format, False
        if name is None and info.backing_filename is not None:
            raise ImgError(
                f"Could not determine absolute backing filename, but backing filename '{info.backing_filename}' present"
            )
    return found


COMMAND = Command(Info, run)
