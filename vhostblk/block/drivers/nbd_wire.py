"""NBD's transmission phase as bytes: requests out, replies in (NetworkBlockDevice/nbd, doc/proto.md).

Sans-io. `replies` is a generator: it yields the memory that it wants filled next, in which may be that of a request,
so that what a read gives is not copied. Whoever has the socket fills all of it and goes on. A server is believed
nothing: a reply must be to a request that is under way, of the kind it asked for, and a read must have given every
byte once. What is not so is EPROTO; nobody can tell where the next reply begins then.

Memory is bounded by what was asked for; besides that there is one buffer of `MAX_PAYLOAD` bytes.

Knows nothing about sockets, and of the handshake only its outcome.
"""

from __future__ import annotations

import bisect
import enum
import errno
import struct
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field

from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError

REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
STRUCTURED_MAGIC = 0x668E33EF

REQUEST = struct.Struct(">IHHQQI")
SIMPLE = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")

# Of structured chunks that are no data: text of errors, block status.
MAX_PAYLOAD = 8192
# A server may cut a read as it likes, but there is no reason to send the parts in just any order.
MAX_PARTS = 1024

_ERROR = struct.Struct(">IH")
_DATA = struct.Struct(">Q")
_HOLE = struct.Struct(">QI")
_STATUS = struct.Struct(">III")
_DONE = 1  # "Structured reply flags"
_ERROR_BIT = 1 << 15


class Command(enum.IntEnum):
    """Request types."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(enum.IntFlag):
    """Flags of a request."""

    NONE = 0
    FUA = 1
    NO_HOLE = 2
    REQ_ONE = 8
    FAST_ZERO = 16


class ExportFlag(enum.IntFlag):
    """Transmission flags: what the server can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class ReplyType(enum.IntEnum):
    """Types of structured chunks; those with bit 15 are errors."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = _ERROR_BIT + 1
    ERROR_OFFSET = _ERROR_BIT + 2


# "Error values"; any other is EINVAL, as the specification wants it.
_ERRNOS = {
    1: errno.EPERM,
    5: errno.EIO,
    12: errno.ENOMEM,
    22: errno.EINVAL,
    28: errno.ENOSPC,
    75: errno.EOVERFLOW,
    95: errno.ENOTSUP,
    108: errno.ESHUTDOWN,
}


@dataclass(frozen=True, slots=True)
class Export:
    """What the handshake has found out.

    Attributes: size: in bytes, as the server says. structured: replies may be. context: the ID of the metadata context,
        if block status can be asked for. min_block, preferred_block, max_block: of requests, in bytes; 0: not said.
    """

    size: int
    flags: ExportFlag
    structured: bool = False
    context: int | None = None
    min_block: int = 0
    preferred_block: int = 0
    max_block: int = 0


@dataclass(slots=True)
class Request:
    """One request, and what has come of it.

    Attributes: iov: what is written, or where a read goes to. error: the server's. is_lost: there will be no reply.
        extent: length and flags of the first extent of a block status. due: when the server is given up if it has not
        answered (the loop's clock); 0: never.
    """

    command: Command
    offset: int = 0
    length: int = 0
    iov: IoVec | None = None
    flags: CommandFlag = CommandFlag.NONE
    error: BlockError | None = None
    is_lost: bool = False
    extent: tuple[int, int] | None = None
    due: float = 0.0
    parts: list[tuple[int, int]] = field(default_factory=list)
    is_begun: bool = False

    def header(self, handle: int) -> bytes:
        """The bytes that go before what is written."""
        return REQUEST.pack(
            REQUEST_MAGIC, self.flags, self.command, handle, self.offset, self.length
        )

    def cover(self, start: int, end: int) -> None:
        """A read has got these bytes; EPROTO if there were some of them before, or the parts are too many."""
        if not self.offset <= start < end <= self.offset + self.length:
            raise _lie(
                f"sent bytes {start} to {end} of {self.offset} to {self.offset + self.length}"
            )
        parts = self.parts
        at = bisect.bisect_right(parts, (start, end))
        if (at and parts[at - 1][1] > start) or (at < len(parts) and parts[at][0] < end):
            raise _lie(f"sent bytes {start} to {end} twice")
        if at < len(parts) and parts[at][0] == end:
            end = parts.pop(at)[1]
        if at and parts[at - 1][1] == start:
            parts[at - 1] = (parts[at - 1][0], end)
        else:
            parts.insert(at, (start, end))
        if len(parts) > MAX_PARTS:
            raise _lie(f"sent a read in more than {MAX_PARTS} parts")

    def end(self) -> None:
        """The server says that this was all; EPROTO if it was not."""
        if self.error is not None:
            return
        if self.command == Command.READ and self.parts != [
            (self.offset, self.offset + self.length)
        ]:
            raise _lie("ended a read before all of it was there")
        if self.command == Command.BLOCK_STATUS and self.extent is None:
            raise _lie("did not reply with any status extents")


Fill = Generator[memoryview, None, None]


def replies(
    export: Export, pending: Mapping[int, Request], finished: Callable[[int], None]
) -> Fill:
    """Take replies for ever.

    Args:
        pending: by handle. finished: called with the handle when a reply is complete; takes it out of `pending`.

    Raises:
        BlockError: EPROTO: the server does not speak NBD, or lies.
    """
    head = memoryview(bytearray(CHUNK.size))
    scratch = memoryview(bytearray(MAX_PAYLOAD))
    while True:
        yield head[: SIMPLE.size]
        magic, error, handle = SIMPLE.unpack_from(head)
        if magic == SIMPLE_MAGIC:
            request = _of(pending, handle)
            # A status that cannot be told may be a simple error; a read has chunks in any case.
            must_be_chunks = request.command == Command.BLOCK_STATUS and not error
            if export.structured and request.command == Command.READ:
                must_be_chunks = True
            if request.is_begun or must_be_chunks:
                raise _lie("sent a simple reply where a structured one was expected")
            if error:
                request.error = _error(error, "")
            elif request.command == Command.READ:
                assert request.iov is not None
                yield from request.iov.views
            finished(handle)
        elif magic == STRUCTURED_MAGIC and export.structured:
            yield head[SIMPLE.size :]
            _, flags, kind, handle, length = CHUNK.unpack(head)
            request = _of(pending, handle)
            request.is_begun = True
            yield from _chunk(export, request, kind, flags, length, scratch)
            if flags & _DONE:
                request.end()
                finished(handle)
        else:
            raise _lie(f"sent a reply with the magic {magic:#x}")


def _chunk(
    export: Export, request: Request, kind: int, flags: int, length: int, scratch: memoryview
) -> Fill:
    if kind == ReplyType.OFFSET_DATA and request.command == Command.READ:
        if length <= _DATA.size:
            raise _lie("sent a chunk of data without any")
        yield scratch[: _DATA.size]
        (start,) = _DATA.unpack_from(scratch)
        size = length - _DATA.size
        request.cover(start, start + size)
        assert request.iov is not None
        yield from request.iov.slice(start - request.offset, size).views
        return
    if length > MAX_PAYLOAD:
        raise _lie(f"sent a chunk of type {kind} with {length} bytes")
    yield scratch[:length]
    if kind == ReplyType.NONE:
        if length or not flags & _DONE:
            raise _lie("sent an empty chunk that is not the last one, or not empty")
    elif kind == ReplyType.OFFSET_HOLE and request.command == Command.READ:
        if length != _HOLE.size:
            raise _lie(f"sent a hole in {length} bytes")
        start, size = _HOLE.unpack_from(scratch)
        request.cover(start, start + size)
        assert request.iov is not None
        request.iov.zero(start - request.offset, size)
    elif kind == ReplyType.BLOCK_STATUS and request.command == Command.BLOCK_STATUS:
        _take_status(export, request, scratch[:length])
    elif kind & _ERROR_BIT:
        _take_error(request, scratch[:length])
    else:
        raise _lie(f"sent a chunk of type {kind} to a request of type {request.command}")


def _take_status(export: Export, request: Request, payload: memoryview) -> None:
    if request.extent is not None:
        raise _lie("sent several chunks of block status")
    if len(payload) < _STATUS.size or (len(payload) - 4) % 8:
        raise _lie(f"sent a block status of {len(payload)} bytes")
    context, length, flags = _STATUS.unpack_from(payload)
    if context != export.context:
        raise _lie(f"sent the block status of context {context}, not {export.context}")
    if not length:
        raise _lie("sent an extent of no bytes")
    request.extent = (length, flags)


def _take_error(request: Request, payload: memoryview) -> None:
    if len(payload) < _ERROR.size:
        raise _lie(f"sent an error in {len(payload)} bytes")
    error, length = _ERROR.unpack_from(payload)
    if not error or length > len(payload) - _ERROR.size:
        raise _lie("sent an error that is none, or longer than it is")
    if request.error is None:
        text = bytes(payload[_ERROR.size : _ERROR.size + length])
        request.error = _error(error, printable(text))


def printable(text: bytes) -> str:
    """What a server says, for logs and messages: one line, nothing that a terminal obeys."""
    said = text.decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else "?" for letter in said.rstrip())


def _of(pending: Mapping[int, Request], handle: int) -> Request:
    request = pending.get(handle)
    if request is None:
        raise _lie(f"sent a reply to a request that was not made ({handle:#x})")
    return request


def _error(number: int, text: str) -> BlockError:
    known = _ERRNOS.get(number, errno.EINVAL)
    return BlockError(known, f"the NBD server says: {text or BlockError(known).strerror}")


def _lie(what: str) -> BlockError:
    return BlockError(errno.EPROTO, f"the NBD server {what}")
