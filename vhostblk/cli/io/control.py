"""Breakpoints, waiting, ways to end, help: commands that make no requests."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vhostblk.cli.io.command import Arguments, CommandError, operand, operands
from vhostblk.cli.io.numbers import milliseconds, size
from vhostblk.cli.io.session import Session
from vhostblk.errors import BlockError

if TYPE_CHECKING:
    from vhostblk.block.filters.blkdebug import BlkdebugNode

# How often to look whether a request has come to a breakpoint, in seconds.
_LOOK_AGAIN = 0.0005


@dataclass
class Break(Arguments):
    """`break`."""

    event: str = operand(str)
    tag: str = operand(str)


@dataclass
class Tag(Arguments):
    """A breakpoint."""

    tag: str = operand(str)


def _debugger(session: Session) -> BlkdebugNode:
    debugger = session.opened.debugger()
    if debugger is None:
        raise BlockError(errno.ENOTSUP)
    return debugger


async def break_(session: Session, args: Break) -> None:
    """Suspend the next request that comes to an event."""
    try:
        _debugger(session).add_breakpoint(args.event, args.tag)
    except BlockError as error:
        raise CommandError(f"Could not set breakpoint: {os.strerror(error.errno or 0)}") from None
    session.opened.tags.append(args.tag)


async def remove_break(session: Session, args: Tag) -> None:
    """Forget a breakpoint, and let go who is suspended there."""
    try:
        _debugger(session).remove_breakpoint(args.tag)
    except BlockError as error:
        reason = os.strerror(error.errno or 0)
        raise CommandError(f"Could not remove breakpoint {args.tag}: {reason}") from None
    await asyncio.sleep(0)


async def resume(session: Session, args: Tag) -> None:
    """Let a suspended request go on."""
    try:
        _debugger(session).resume(args.tag)
    except BlockError as error:
        raise CommandError(f"Could not resume request: {os.strerror(error.errno or 0)}") from None
    await asyncio.sleep(0)


async def wait_break(session: Session, args: Tag) -> None:
    """Wait until a request is suspended; not for ever, if there is none that could come."""
    session.tell_ended()
    debugger = session.opened.debugger()
    while debugger is None or not debugger.is_suspended(args.tag):
        if debugger is None or not session.tasks:
            raise CommandError(f"No request can come to breakpoint {args.tag}")
        await asyncio.sleep(_LOOK_AGAIN)


@dataclass
class Sleep(Arguments):
    """`sleep`."""

    milliseconds: int = operand(milliseconds)


async def sleep(session: Session, args: Sleep) -> None:
    """Wait; requests in the background go on."""
    session.tell_ended()
    await asyncio.sleep(args.milliseconds / 1000)


async def abort(session: Session, args: Arguments) -> None:
    """Crash: what was printed may be lost, as it is in a crash."""
    os.abort()


@dataclass
class SigRaise(Arguments):
    """`sigraise`."""

    word: str = operand(str)


async def sigraise(session: Session, args: SigRaise) -> None:
    """Send ourselves a signal."""
    number = size(args.word)
    if number > signal.NSIG:
        raise CommandError(f"signal argument '{args.word}' is too large to be a valid signal")
    sys.stdout.flush()
    with suppress(OSError, ValueError):
        # Python catches or ignores some that end a program otherwise.
        signal.signal(number, signal.SIG_DFL)
    with suppress(OSError):
        os.kill(os.getpid(), number)


@dataclass
class Quit(Arguments):
    """`quit`, whatever follows it."""

    ignored: tuple[str, ...] = operands(0)


async def quit_(session: Session, args: Quit) -> None:
    """No more commands."""
    session.done = True
