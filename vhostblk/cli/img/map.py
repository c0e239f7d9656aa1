"""`map`: what a disk has where."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from types import MappingProxyType

from vhostblk.block.image_map import MapEntry, MapKind, map_entries
from vhostblk.block.lean_dataclass import lean_dataclass
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


@lean_dataclass(slots=True)
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
    try:
        await (_print_json(entries, args.start) if as_json else _print_table(entries))
    except BlockError as error:
        why = os.strerror(error.errno or 0)
        raise ImgError(f"Could not read file metadata: {why}") from None
    return 0


# There may be millions of lines: one of a kind differs from others in numbers only, and a batch is written at once.


async def _print_json(entries: AsyncIterator[list[MapEntry]], first: int) -> None:
    write = sys.stdout.write
    write("[")
    between = ""
    ends: dict[MapKind, str] = {}
    async for batch in entries:
        lines = []
        for start, length, place, kind in batch:
            end = ends.get(kind)
            if end is None:
                end = ends[kind] = _json(kind)
            if kind.filename is None:
                lines.append(f'{{ "start": {start}, "length": {length}{end}}}')
            else:
                lines.append(f'{{ "start": {start}, "length": {length}{end}, "offset": {place}}}')
        write(between)
        write(",\n".join(lines))
        between = ",\n"
    if not between:
        # So does qemu-img for a disk that has nothing.
        nothing = _json(MapKind(0, False, False, False, None))
        write(f'{{ "start": {first}, "length": 0{nothing}}}')
    write("]\n")


def _json(kind: MapKind) -> str:
    depth, present, zero, data, _ = kind
    return (
        f', "depth": {depth}, "present": {_WORDS[present]},'
        f' "zero": {_WORDS[zero]}, "data": {_WORDS[data]}'
    )


async def _print_table(entries: AsyncIterator[list[MapEntry]]) -> None:
    write = sys.stdout.write
    write(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File\n")
    is_first = True
    async for batch in entries:
        lines = []
        for start, length, place, (_, _, zero, data, file) in batch:
            if data and not zero and file is not None:
                lines.append(f"{_hex(start)}{_hex(length)}{_hex(place)}{file}\n")
            elif data and (is_first or not zero) and file is None:
                # Of zeroes nobody wants to know where they are not; qemu-img looks at the first entry as it is.
                write("".join(lines))
                raise ImgError("File contains external, encrypted or compressed clusters.")
            is_first = False
        write("".join(lines))


def _hex(number: int) -> str:
    """As printf("%-#16x") does."""
    return f"{number:<#16x}" if number else f"{0:<16}"


_WORDS = MappingProxyType({False: "false", True: "true"})


COMMAND = Command(Map, run)
