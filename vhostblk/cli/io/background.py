"""aio_read, aio_write, aio_flush: requests that go on while the next commands run, and are reported when they are over.

Such a command succeeds once its request was made; what comes of it is printed, and does not count.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from vhostblk.block.flags import Req
from vhostblk.cli.io.command import Arguments, CommandError, flag, operand, operands, valued
from vhostblk.cli.io.memory import allocate, cut, fill, repeats
from vhostblk.cli.io.numbers import pattern_byte, size
from vhostblk.cli.io.report import dump, report
from vhostblk.cli.io.requests import READ_FILL, WRITE_FILL, pattern_failed, vector_lengths
from vhostblk.cli.io.session import Session, finish
from vhostblk.errors import BlockError
from vhostblk.export.eager import run_eagerly


def _start(
    session: Session,
    request: Coroutine[Any, Any, None],
    failed: str,
    over: Callable[[float], None],
) -> None:
    """Make a request.

    Args:
        failed: what is said if it fails, besides the reason.
        over: called with the seconds that it took.
    """
    began = time.perf_counter()
    is_new = True

    async def run() -> None:
        try:
            await request
        except BlockError as error:
            tell = partial(session.out, f"{failed} failed: {os.strerror(error.errno or 0)}")
        else:
            tell = partial(over, time.perf_counter() - began)
        if is_new:
            session.ended.append(tell)
        else:
            tell()

    run_eagerly(run(), session.tasks)
    is_new = False


@dataclass
class BackgroundRead(Arguments):
    """`aio_read`."""

    machine: bool = flag("C")
    invalid: bool = flag("i", ends=True)
    pattern: int | None = valued("P", pattern_byte)
    quiet: bool = flag("q")
    verbose: bool = flag("v")
    offset: int = operand(size)
    lengths: tuple[str, ...] = operands(1)


async def aio_read(session: Session, args: BackgroundRead) -> None:
    """Begin to read into several buffers."""
    if args.invalid:
        session.out("injecting invalid read request")
        return
    lengths = vector_lengths(args.lengths)
    buffer = allocate(sum(lengths), misalign=session.misalign)
    fill(buffer, bytes([READ_FILL]))

    def over(seconds: float) -> None:
        if args.pattern is not None and not repeats(buffer, args.pattern):
            session.out(pattern_failed(args.offset, len(buffer)))
        if args.quiet:
            return
        if args.verbose and len(buffer):
            session.out(dump(buffer, args.offset))
        session.out(report("read", args.offset, len(buffer), seconds, machine=args.machine))

    request = session.opened.backend.preadv(args.offset, cut(buffer, lengths))
    _start(session, request, "readv", over)


@dataclass
class BackgroundWrite(Arguments):
    """`aio_write`."""

    machine: bool = flag("C")
    durable: bool = flag("f")
    invalid: bool = flag("i", ends=True)
    pattern: int | None = valued("P", pattern_byte)
    quiet: bool = flag("q")
    may_unmap: bool = flag("u")
    zeroes: bool = flag("z")
    offset: int = operand(size)
    lengths: tuple[str, ...] = operands(1)

    def check(self) -> None:
        """Which options go together."""
        if self.may_unmap and not self.zeroes:
            raise CommandError("-u requires -z to be specified")


async def aio_write(session: Session, args: BackgroundWrite) -> None:
    """Begin to write from several buffers, or zeroes without data."""
    if args.invalid:
        session.out("injecting invalid write request")
        return
    backend = session.opened.backend
    flags = int(Req.FUA) if args.durable else 0
    if args.zeroes:
        if len(args.lengths) > 1:
            raise CommandError("-z supports only a single length parameter")
        length = size(args.lengths[0])
        request = backend.pwrite_zeroes(args.offset, length, args.may_unmap, flags)
    else:
        lengths = vector_lengths(args.lengths)
        length = sum(lengths)
        buffer = allocate(length, misalign=session.misalign)
        fill(buffer, bytes([WRITE_FILL if args.pattern is None else args.pattern]))
        request = backend.pwritev(args.offset, cut(buffer, lengths), flags)

    def over(seconds: float) -> None:
        if not args.quiet:
            session.out(report("wrote", args.offset, length, seconds, machine=args.machine))

    _start(session, request, "aio_write", over)


async def aio_flush(session: Session, args: Arguments) -> None:
    """Wait until all of them are over."""
    session.tell_ended()
    await finish(session.tasks)
