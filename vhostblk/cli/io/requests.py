"""read, readv, write, writev, discard, flush: one request each, which is over when the command is."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any

from vhostblk.block.flags import Req
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import MAX_REQUEST, SECTOR_SIZE
from vhostblk.block.vm_state import load_vm_state, save_vm_state
from vhostblk.cli.io.command import (
    Arguments,
    CommandError,
    UsageError,
    flag,
    operand,
    operands,
    valued,
)
from vhostblk.cli.io.memory import allocate, cut, fill, fill_from_file, repeats
from vhostblk.cli.io.numbers import pattern_byte, size
from vhostblk.cli.io.report import dump, report
from vhostblk.cli.io.session import Session
from vhostblk.errors import BlockError

READ_FILL = 0xAB
WRITE_FILL = 0xCD


async def timed(session: Session, request: Awaitable[Any], what: str) -> float:
    """Wait for a request, and hear of those before it; seconds that it took.

    Raises:
        CommandError: it has failed.
    """
    began = time.perf_counter()
    try:
        await request
        session.tell_ended()
    except BlockError as error:
        raise CommandError(f"{what} failed: {os.strerror(error.errno or 0)}") from None
    return time.perf_counter() - began


def vector_lengths(words: Sequence[str]) -> list[int]:
    """The lengths of a vector's parts.

    Raises:
        CommandError: one is no number, or they are too many bytes.
    """
    lengths: list[int] = []
    for word in words:
        length = size(word)
        if length > MAX_REQUEST:
            raise CommandError(f"Argument '{word}' exceeds maximum size {MAX_REQUEST}")
        lengths.append(length)
        if sum(lengths) > MAX_REQUEST:
            raise CommandError(f"The total number of bytes exceed the maximum size {MAX_REQUEST}")
    return lengths


def _length(word: str) -> int:
    """The length of one request.

    Raises:
        CommandError: it is no number, or more than one request can have.
    """
    length = size(word)
    if length > MAX_REQUEST:
        raise CommandError(f"length cannot exceed {MAX_REQUEST}, given {word}")
    return length


def pattern_failed(offset: int, length: int) -> str:
    """What is said of bytes that are others."""
    return f"Pattern verification failed at offset {offset}, {length} bytes"


def _check_vm_state(offset: int, length: int) -> None:
    for value, name in ((offset, "offset"), (length, "count")):
        if value % SECTOR_SIZE:
            raise CommandError(f"{value} is not a sector-aligned value for '{name}'")


# ---------------------------------------------------------------------- read


@dataclass
class Read(Arguments):
    """`read`."""

    vm_state: bool = flag("b")
    machine: bool = flag("C")
    check_length: int | None = valued("l", size)
    ignored: bool = flag("p")
    pattern: int | None = valued("P", pattern_byte)
    quiet: bool = flag("q")
    check_offset: int | None = valued("s", size)
    verbose: bool = flag("v")
    offset: int = operand(size)
    length_word: str = operand(str)


async def read(session: Session, args: Read) -> None:
    """Read, and look at what came."""
    length = _length(args.length_word)
    if args.pattern is None and (args.check_length, args.check_offset) != (None, None):
        raise UsageError
    start = args.check_offset or 0
    count = length - start if args.check_length is None else args.check_length
    if count < 0 or count + start > length:
        raise CommandError("pattern verification range exceeds end of read data")
    if args.vm_state:
        _check_vm_state(args.offset, length)
    buffer = allocate(length, misalign=session.misalign)
    fill(buffer, bytes([READ_FILL]))
    backend = session.opened.backend
    request = (
        load_vm_state(backend, args.offset, IoVec([buffer]))
        if args.vm_state
        else backend.preadv(args.offset, IoVec([buffer]))
    )
    seconds = await timed(session, request, "read")
    matches = args.pattern is None or repeats(buffer[start : start + count], args.pattern)
    if not matches:
        session.out(pattern_failed(args.offset + start, count))
    _show(session, args, buffer, args.offset, seconds)
    if not matches:
        raise CommandError


def _show(
    session: Session, args: Read | ReadVector, buffer: memoryview, offset: int, seconds: float
) -> None:
    if args.quiet:
        return
    if args.verbose and len(buffer):
        session.out(dump(buffer, offset))
    session.out(report("read", offset, len(buffer), seconds, machine=args.machine))


@dataclass
class ReadVector(Arguments):
    """`readv`."""

    machine: bool = flag("C")
    pattern: int | None = valued("P", pattern_byte)
    quiet: bool = flag("q")
    verbose: bool = flag("v")
    offset: int = operand(size)
    lengths: tuple[str, ...] = operands(1)


async def readv(session: Session, args: ReadVector) -> None:
    """Read into several buffers."""
    lengths = vector_lengths(args.lengths)
    buffer = allocate(sum(lengths), misalign=session.misalign)
    fill(buffer, bytes([READ_FILL]))
    request = session.opened.backend.preadv(args.offset, cut(buffer, lengths))
    seconds = await timed(session, request, "readv")
    matches = args.pattern is None or repeats(buffer, args.pattern)
    if not matches:
        session.out(pattern_failed(args.offset, len(buffer)))
    _show(session, args, buffer, args.offset, seconds)
    if not matches:
        raise CommandError


# ---------------------------------------------------------------------- write


@dataclass
class Write(Arguments):
    """`write`."""

    vm_state: bool = flag("b")
    compressed: bool = flag("c")
    machine: bool = flag("C")
    durable: bool = flag("f")
    no_fallback: bool = flag("n")
    ignored: bool = flag("p")
    pattern: int | None = valued("P", pattern_byte)
    quiet: bool = flag("q")
    source: str | None = valued("s", str)
    may_unmap: bool = flag("u")
    zeroes: bool = flag("z")
    offset: int = operand(size)
    length_word: str = operand(str)

    def check(self) -> None:
        """Which options go together."""
        sources = (self.zeroes, self.pattern is not None, self.source is not None)
        for wrong, text in (
            (self.vm_state and self.zeroes, "-b and -z cannot be specified at the same time"),
            (
                self.durable and (self.vm_state or self.compressed),
                "-f and -b or -c cannot be specified at the same time",
            ),
            (self.no_fallback and not self.zeroes, "-n requires -z to be specified"),
            (self.may_unmap and not self.zeroes, "-u requires -z to be specified"),
            (
                sum(sources) > 1,
                "Only one of -z, -P, and -s can be specified at the same time",
            ),
        ):
            if wrong:
                raise CommandError(text)


async def write(session: Session, args: Write) -> None:
    """Write a pattern, a file's content, or zeroes without data."""
    offset, length = args.offset, size(args.length_word)
    if length > MAX_REQUEST and not args.no_fallback:
        raise CommandError(
            f"length cannot exceed {MAX_REQUEST} without -n, given {args.length_word}"
        )
    if args.vm_state or args.compressed:
        _check_vm_state(offset, length)
    backend = session.opened.backend
    flags = int(Req.FUA) if args.durable else 0
    if args.zeroes:
        flags |= int(Req.NO_FALLBACK) if args.no_fallback else 0
        request = backend.pwrite_zeroes(offset, length, args.may_unmap, flags)
    else:
        buffer = allocate(length, misalign=session.misalign)
        if args.source is not None:
            fill_from_file(buffer, args.source)
        else:
            fill(buffer, bytes([WRITE_FILL if args.pattern is None else args.pattern]))
        if args.vm_state:
            request = save_vm_state(backend, offset, IoVec([buffer]))
        else:
            flags |= int(Req.WRITE_COMPRESSED) if args.compressed else 0
            request = backend.pwritev(offset, IoVec([buffer]), flags)
    seconds = await timed(session, request, "write")
    if not args.quiet:
        session.out(report("wrote", offset, length, seconds, machine=args.machine))


@dataclass
class WriteVector(Arguments):
    """`writev`."""

    machine: bool = flag("C")
    durable: bool = flag("f")
    quiet: bool = flag("q")
    pattern: int | None = valued("P", pattern_byte)
    offset: int = operand(size)
    lengths: tuple[str, ...] = operands(1)


async def writev(session: Session, args: WriteVector) -> None:
    """Write from several buffers."""
    lengths = vector_lengths(args.lengths)
    buffer = allocate(sum(lengths), misalign=session.misalign)
    fill(buffer, bytes([WRITE_FILL if args.pattern is None else args.pattern]))
    flags = int(Req.FUA) if args.durable else 0
    vector = cut(buffer, lengths)
    seconds = await timed(
        session, session.opened.backend.pwritev(args.offset, vector, flags), "writev"
    )
    if not args.quiet:
        session.out(report("wrote", args.offset, len(buffer), seconds, machine=args.machine))


# ---------------------------------------------------------------------- discard, flush


@dataclass
class Discard(Arguments):
    """`discard`."""

    machine: bool = flag("C")
    quiet: bool = flag("q")
    offset: int = operand(size)
    length_word: str = operand(str)


async def discard(session: Session, args: Discard) -> None:
    """Give a range up."""
    length = _length(args.length_word)
    seconds = await timed(session, session.opened.backend.pdiscard(args.offset, length), "discard")
    if not args.quiet:
        session.out(report("discard", args.offset, length, seconds, machine=args.machine))


async def flush(session: Session, args: Arguments) -> None:
    """Make completed writes durable; a failure shows in the exit status only."""
    try:
        await session.opened.backend.flush()
    except BlockError:
        raise CommandError from None
