"""Where commands come from: the command line, or lines of standard input with a prompt before each."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence

from vhostblk.cli.io.session import Session
from vhostblk.cli.io.table import run_line

_CHUNK = 1 << 16


async def run_commands(session: Session, commands: Sequence[str]) -> bool:
    """Carry out commands, or those of standard input if there are none.

    Returns:
        False if one has failed.
    """
    good = True
    if commands:
        for command in commands:
            good &= await run_line(session, command)
            if session.done:
                break
        return good
    lines = read_lines(sys.stdin.fileno())
    while not session.done:
        sys.stdout.write(f"{session.program}> ")
        sys.stdout.flush()
        try:
            line = await anext(lines)
        except StopAsyncIteration:
            break
        good &= await run_line(session, line)
    return good


async def read_lines(fd: int) -> AsyncIterator[str]:
    """The lines of a file, pipe or terminal, without waiting for them in the loop; the last may have no newline."""
    rest = b""
    while chunk := await _read(fd):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield os.fsdecode(line)
    if rest:
        yield os.fsdecode(rest)


async def _read(fd: int) -> bytes:
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    try:
        loop.add_reader(fd, readable.set_result, None)
    except PermissionError:
        return os.read(fd, _CHUNK)  # a regular file, which can always be read
    try:
        await readable
    finally:
        loop.remove_reader(fd)
    return os.read(fd, _CHUNK)
