"""Where commands come from: the command line, or lines of standard input with a prompt before each."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence

from vhostblk.cli.io.session import Session
from vhostblk.cli.io.table import run_line

_CHUNK = 1 << 16
# Bytes of a line.
_MOST = 1023


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
    stdin = 0 if sys.stdin is None else sys.stdin.fileno()
    lines = read_lines(stdin)
    while not session.done:
        sys.stdout.write(f"{session.program}> ")
        sys.stdout.flush()
        session.tell_ended()
        try:
            line = await anext(lines)
        except StopAsyncIteration:
            if os.isatty(stdin):
                sys.stdout.write("\n")
            break
        good &= await run_line(session, line)
    return good


async def read_lines(fd: int) -> AsyncIterator[str]:
    """The lines of a file, pipe or terminal, without waiting for them in the loop; the last may have no newline.

    As qemu-io reads them: a longer one is several, and nothing behind a zero byte is read.
    """
    rest = b""
    while chunk := await _read(fd):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            for part in _cut(line + b"\n"):
                yield part
    if rest:
        for part in _cut(rest):
            yield part


def _cut(line: bytes) -> Iterator[str]:
    for start in range(0, len(line), _MOST):
        part = line[start : start + _MOST].removesuffix(b"\n")
        yield os.fsdecode(part.partition(b"\0")[0])


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
