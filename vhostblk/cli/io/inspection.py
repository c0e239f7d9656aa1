"""length, info, map, alloc, truncate: how long an image is, and what it has where."""

from __future__ import annotations

import os
from dataclasses import dataclass

from vhostblk.block import image_info
from vhostblk.block.flags import Preallocation
from vhostblk.block.limits import SECTOR_SIZE
from vhostblk.block.node import BlockNode
from vhostblk.block.status import is_allocated
from vhostblk.cli import image_info_text
from vhostblk.cli.io.command import (
    Arguments,
    CommandError,
    RefusedError,
    operand,
    operands,
    valued,
)
from vhostblk.cli.io.numbers import size
from vhostblk.cli.io.report import human
from vhostblk.cli.io.session import Session
from vhostblk.errors import BlockError, ConfigError


async def length(session: Session, args: Arguments) -> None:
    """Print the length."""
    session.out(human(session.opened.backend.length))


async def info(session: Session, args: Arguments) -> None:
    """Print the format and what is special about the image; nothing and a failure if nobody knows."""
    node = session.opened.node
    session.out(f"format name: {node.driver_name}")
    if node.protocol_name is not None:
        session.out(f"format name: {node.protocol_name}")
    facts = node.info()
    if facts is None:
        raise CommandError
    session.out(f"cluster size: {human(facts.cluster_size)}")
    session.out(f"vm state offset: {human(facts.vm_state_offset)}")
    try:
        known = await image_info.format_info(node)
    except ConfigError as error:
        raise RefusedError(error.qemu_text) from None
    if known is not None:
        for line in image_info_text.format_info_lines(known):
            session.out(line)


async def map_(session: Session, args: Arguments) -> None:
    """Print the runs that the top layer has, and those that it has not."""
    node = session.opened.node
    offset, end = 0, session.opened.backend.length
    while offset < end:
        try:
            allocated, count = await _run(node, offset, end)
        except BlockError as error:
            reason = os.strerror(error.errno or 0)
            raise RefusedError(f"Failed to get allocation status: {reason}") from None
        if not count:
            raise RefusedError("Unexpected end of image")
        word = "    allocated" if allocated else "not allocated"
        session.out(
            f"{human(count)} ({count:#x}) bytes {word} at offset {human(offset)} ({offset:#x})"
        )
        offset += count


async def _run(node: BlockNode, offset: int, end: int) -> tuple[bool, int]:
    """Whether what is at `offset` is allocated, and for how many bytes that is so; as far as this can be found out."""
    first, run = await is_allocated(node, offset, end - offset)
    while run and offset + run < end:
        try:
            allocated, count = await is_allocated(node, offset + run, end - offset - run)
        except BlockError:
            break
        if allocated != first or not count:
            break
        run += count
    return first, run


@dataclass
class Alloc(Arguments):
    """`alloc`."""

    words: tuple[str, ...] = operands(1, 2)


async def alloc(session: Session, args: Alloc) -> None:
    """Print how many bytes of a range the top layer has."""
    start = offset = size(args.words[0])
    count = left = size(args.words[1]) if len(args.words) > 1 else SECTOR_SIZE
    total = 0
    while left:
        try:
            allocated, run = await is_allocated(session.opened.node, offset, left)
        except BlockError as error:
            reason = os.strerror(error.errno or 0)
            raise CommandError(f"is_allocated failed: {reason}") from None
        if not run:
            count -= left
            break
        offset += run
        left -= run
        total += run if allocated else 0
    session.out(f"{total}/{count} bytes allocated at offset {human(start)}")


def _preallocation(word: str) -> Preallocation:
    try:
        return Preallocation(word)
    except ValueError:
        raise RefusedError(f"Invalid preallocation mode '{word}'") from None


@dataclass
class Truncate(Arguments):
    """`truncate`."""

    preallocation: Preallocation | None = valued("m", _preallocation)
    length: int = operand(size)
    ignored: tuple[str, ...] = operands(0)


async def truncate(session: Session, args: Truncate) -> None:
    """Change the length."""
    preallocation = args.preallocation or Preallocation.OFF
    try:
        await session.opened.backend.truncate(args.length, preallocation)
    except BlockError as error:
        raise RefusedError(f"{error.strerror}") from None
