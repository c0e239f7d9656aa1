"""`map`: what a disk has where."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from types import MappingProxyType

from vhostblk.block.image_map import MapEntry, map_entries
from vhostblk.cli.img.arguments import (
    ImageArguments,
    ImgError,
    flag,
    valued,
    wants_json,
)
from vhostblk.cli.img.numbers import size
from vhostblk.cli.img.session import Session
from vhostblk.cli.img.table import Command
from vhostblk.errors import BlockError


@dataclass
class Map(ImageArguments):
    """Its options."""

    format: str | None = valued("f", "format")
    output: str | None = valued("", "output")
    force_share: bool = flag("U", "force-share")
    start: int = valued("s", "start-offset", lambda text: size("start offset", text), 0)
    most: int | None = valued("l", "max-length", lambda text: size("max length", text))

    def check(self) -> None:
        """See `Arguments.check`."""
        self.check_one_image()


async def run(session: Session, args: Map) -> int:
    """Print it."""
    as_json = wants_json(args.output)
    session.graph.looks_only = True
    image = await session.open(
        args.words[0], args.format, image_opts=args.image_opts, force_share=args.force_share
    )
    end = image.length
    if args.most is not None:
        end = min(args.start + args.most, end)
    entries = map_entries(image.node, args.start, end)
    write = sys.stdout.write
    try:
        if as_json:
            write("[")
            between = ""
            async for entry in entries:
                write(between + _json(entry))
                between = ",\n"
            if not between:
                # So does qemu-img for a disk that has nothing.
                write(_json(MapEntry(args.start, 0, 0, False, False, False, None, "")))
            write("]\n")
            return 0
        write(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File\n")
        is_first = True
        async for entry in entries:
            # Of zeroes nobody wants to know where they are not; qemu-img looks at the first entry as it is.
            if entry.data and (is_first or not entry.zero) and entry.offset is None:
                raise ImgError("File contains external, encrypted or compressed clusters.")
            is_first = False
            if entry.data and not entry.zero:
                place = entry.offset or 0
                write(
                    f"{_hex(entry.start):<16}{_hex(entry.length):<16}{_hex(place):<16}{entry.filename}\n"
                )
    except BlockError as error:
        why = os.strerror(error.errno or 0)
        raise ImgError(f"Could not read file metadata: {why}") from None
    return 0


def _hex(number: int) -> str:
    """As printf("%#x") does."""
    return f"{number:#x}" if number else "0"


_WORDS = MappingProxyType({False: "false", True: "true"})


def _json(entry: MapEntry) -> str:
    start, length, depth, present, zero, data, place, _ = entry
    offset = f', "offset": {place}' if place is not None else ""
    return (
        f'{{ "start": {start}, "length": {length}, "depth": {depth}, "present": {_WORDS[present]},'
        f' "zero": {_WORDS[zero]}, "data": {_WORDS[data]}{offset}}}'
    )


COMMAND = Command(Map, run)
