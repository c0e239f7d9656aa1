"""NBD's handshake as bytes: from connecting to the transmission phase (NetworkBlockDevice/nbd, doc/proto.md).

Sans-io. `handshake` is a generator: it yields memory to be filled with what the server sends, and bytes to be sent;
its result is an `Export`. At the end of the stream EOFError is thrown into it. It never asks for more than belongs to
the handshake, so that what follows is still in the socket.

Fixed newstyle: structured replies, one metadata context, then NBD_OPT_GO with the block sizes; a server without
NBD_OPT_GO gets NBD_OPT_EXPORT_NAME; an oldstyle one has nothing to be asked. Messages are QEMU's, where it has any.

Memory: an answer has at most `MAX_ANSWER` bytes, and there are at most `MAX_ANSWERS` to an option.
"""

from __future__ import annotations

import struct
from collections.abc import Generator

from vhostblk.block.drivers.nbd_wire import Export, ExportFlag, printable
from vhostblk.errors import ConfigError

INIT_MAGIC = 0x4E42444D41474943  # NBDMAGIC
OPTION_MAGIC = 0x49484156454F5054  # IHAVEOPT
OLDSTYLE_MAGIC = 0x0000420281861253
ANSWER_MAGIC = 0x0003E889045565A9

MAX_STRING = 4096
MAX_ANSWER = 65536
MAX_ANSWERS = 1000
MAX_MIN_BLOCK = 65536

_FIXED_NEWSTYLE = 1
_NO_ZEROES = 2
_RESERVED = 124  # zeroes behind what an old server says

_EXPORT_NAME, _GO, _STRUCTURED, _SET_CONTEXT = 1, 7, 8, 10
_OPTIONS = {
    _GO: "go",
    _STRUCTURED: "structured reply",
    _SET_CONTEXT: "set meta context",
}
_ACK, _INFO, _CONTEXT = 1, 3, 4
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3

_ERROR_BIT = 1 << 31
_UNSUPPORTED = _ERROR_BIT + 1
# "Option reply types": what to say, given the option.
_ERRORS = {
    _ERROR_BIT + 2: "Denied by server for option {}",
    _ERROR_BIT + 3: "Invalid parameters for option {}",
    _ERROR_BIT + 4: "Server lacks support for option {}",
    _ERROR_BIT + 5: "TLS negotiation required before option {}",
    _ERROR_BIT + 6: "Requested export not available",
    _ERROR_BIT + 7: "Server shutting down before option {}",
    _ERROR_BIT + 8: "Server requires INFO_BLOCK_SIZE for option {}",
}
_TLS_REQUIRED = _ERROR_BIT + 5

_OPTION = struct.Struct(">QII")
_ANSWER = struct.Struct(">QIII")

Step = memoryview | bytes
"""Memory to fill, or bytes to send."""


def handshake(name: str, context: str = "base:allocation") -> Generator[Step, None, Export]:
    """Shake hands with a server.

    Args:
        name: of the export. context: the metadata context that block status is wanted of.

    Raises:
        ConfigError: the server has no such export, is too old or too new, or does not speak NBD.
    """
    magic = yield from _number(8, "initial magic")
    if magic != INIT_MAGIC:
        raise ConfigError(f"Bad initial magic received: 0x{magic:x}")
    magic = yield from _number(8, "server magic")
    if magic == OLDSTYLE_MAGIC:
        if name:
            raise ConfigError("Server does not support non-empty export names")
        size = yield from _number(8, "export length")
        flags = yield from _number(4, "export flags")
        if flags > 0xFFFF:
            raise ConfigError(f"Unexpected export flags {flags:#x}")
        yield from _read(_RESERVED, "reserved block")
        return Export(size, ExportFlag(flags))
    if magic != OPTION_MAGIC:
        raise ConfigError(f"Bad server magic received: 0x{magic:x}")
    server = (yield from _number(2, "server flags")) & (_FIXED_NEWSTYLE | _NO_ZEROES)
    yield server.to_bytes(4, "big")
    if server & _FIXED_NEWSTYLE:
        structured = yield from _ask_for_structure()
        context_id = (yield from _ask_for_context(name, context)) if structured else None
        export = yield from _go(name, structured, context_id)
        if export is not None:
            return export
    else:
        structured, context_id = False, None
    yield _option(_EXPORT_NAME, _encoded(name))
    # Who has no such export says nothing, and leaves.
    size = yield from _number(8, "export length")
    flags = yield from _number(2, "export flags")
    if not server & _NO_ZEROES:
        yield from _read(_RESERVED, "reserved block")
    return Export(size, ExportFlag(flags), structured, context_id)


# ---------------------------------------------------------------------- bytes


def _read(count: int, what: str) -> Generator[Step, None, bytes]:
    data = bytearray(count)
    if count:
        try:
            yield memoryview(data)
        except EOFError:
            raise ConfigError(
                f"Failed to read {what}: Unexpected end-of-file before all bytes were read"
            ) from None
    return bytes(data)


def _number(count: int, what: str) -> Generator[Step, None, int]:
    return int.from_bytes((yield from _read(count, what)), "big")


def _encoded(text: str) -> bytes:
    """As bytes; what came from a command line may be no UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def _string(text: str) -> bytes:
    data = _encoded(text)
    return len(data).to_bytes(4, "big") + data


def _option(option: int, payload: bytes = b"") -> bytes:
    return _OPTION.pack(OPTION_MAGIC, option, len(payload)) + payload


def _answer(option: int) -> Generator[Step, None, tuple[int, bytes]]:
    """(type, payload) of an answer to this option."""
    head = yield from _read(_ANSWER.size, "option reply")
    magic, about, kind, length = _ANSWER.unpack(head)
    if magic != ANSWER_MAGIC:
        raise ConfigError("Unexpected option reply magic")
    if about != option:
        raise ConfigError(f"Unexpected option type {about}, expected {_name(option)}")
    if length > MAX_ANSWER:
        raise ConfigError(f"The answer to option {_name(option)} is too long: {length} bytes")
    payload = yield from _read(length, "option reply payload")
    return kind, payload


def _name(option: int) -> str:
    return f"{option} ({_OPTIONS[option]})"


def _failure(option: int, kind: int, payload: bytes) -> ConfigError:
    text = _ERRORS.get(kind, "Unknown error code when asking for option {}").format(_name(option))
    hints = ["Did you forget a valid tls-creds?"] if kind == _TLS_REQUIRED else []
    if payload:
        hints.append(f"server reported: {printable(payload[:MAX_STRING])}")
    message = f"{text} ({'; '.join(hints)})" if hints else text
    return ConfigError(message, qemu_text="\n".join([text, *hints]))


# ---------------------------------------------------------------------- options


def _ask_for_structure() -> Generator[Step, None, bool]:
    yield _option(_STRUCTURED)
    kind, payload = yield from _answer(_STRUCTURED)
    if kind & _ERROR_BIT:
        return False
    if kind != _ACK or payload:
        raise ConfigError(
            f"Server answered option {_name(_STRUCTURED)} with unexpected reply {kind}"
        )
    return True


def _ask_for_context(name: str, context: str) -> Generator[Step, None, int | None]:
    """The ID of the metadata context; None: the server has none of that name, or no contexts."""
    query = _string(name) + (1).to_bytes(4, "big") + _string(context)
    yield _option(_SET_CONTEXT, query)
    found = None
    while True:
        kind, payload = yield from _answer(_SET_CONTEXT)
        if kind & _ERROR_BIT:
            return None
        if kind == _ACK:
            if payload:
                raise ConfigError("Unexpected length to ACK response")
            return found
        if kind != _CONTEXT:
            raise ConfigError(
                f"Unexpected reply type {kind} to option {_name(_SET_CONTEXT)}, expected {_CONTEXT}"
            )
        if len(payload) <= 4:
            raise ConfigError(
                f"Failed to negotiate meta context, server answered with unexpected length {len(payload)}"
            )
        if payload[4:] != _encoded(context):
            raise ConfigError(
                f"Failed to negotiate meta context '{context}', server answered with different "
                f"context '{printable(payload[4 : MAX_STRING + 4])}'"
            )
        if found is not None:
            raise ConfigError("Server answered with more than one context")
        found = int.from_bytes(payload[:4], "big")


def _go(
    name: str, structured: bool, context_id: int | None
) -> Generator[Step, None, Export | None]:
    """NBD_OPT_GO; None: the server does not know it."""
    wants = (1).to_bytes(2, "big") + _INFO_BLOCK_SIZE.to_bytes(2, "big")
    yield _option(_GO, _string(name) + wants)
    size = None
    flags = ExportFlag(0)
    blocks = (0, 0, 0)
    for _ in range(MAX_ANSWERS):
        kind, payload = yield from _answer(_GO)
        if kind == _UNSUPPORTED:
            return None
        if kind & _ERROR_BIT:
            raise _failure(_GO, kind, payload)
        if kind == _ACK:
            if payload:
                raise ConfigError("server sent invalid NBD_REP_ACK")
            if size is None or not flags:
                raise ConfigError("broken server omitted NBD_INFO_EXPORT")
            if blocks[0] and size % blocks[0]:
                raise ConfigError(
                    f"export size {size} is not multiple of minimum block size {blocks[0]}"
                )
            return Export(size, flags, structured, context_id, *blocks)
        if kind != _INFO:
            raise ConfigError(f"unexpected reply type {kind}, expected {_INFO} (info)")
        if len(payload) < 2:
            raise ConfigError(f"NBD_REP_INFO length {len(payload)} is too short")
        about, value = int.from_bytes(payload[:2], "big"), payload[2:]
        if about == _INFO_EXPORT:
            _expect(value, 10)
            size, flag_bits = struct.unpack(">QH", value)
            flags = ExportFlag(flag_bits)
        elif about == _INFO_BLOCK_SIZE:
            _expect(value, 12)
            blocks = _block_sizes(*struct.unpack(">III", value))
    raise ConfigError(f"Server does not stop to answer option {_name(_GO)}")


def _expect(value: bytes, length: int) -> None:
    if len(value) != length:
        raise ConfigError(f"remaining export info len {len(value)} is unexpected size")


def _block_sizes(least: int, preferred: int, most: int) -> tuple[int, int, int]:
    if least.bit_count() != 1:
        raise ConfigError(f"server minimum block size {least} is not a power of two")
    if least > MAX_MIN_BLOCK:
        raise ConfigError(f"server minimum block size {least} is above {MAX_MIN_BLOCK}")
    if preferred.bit_count() != 1 or preferred < least:
        raise ConfigError(f"server preferred block size {preferred} is not valid")
    if most < least:
        raise ConfigError(f"server maximum block size {most} is not valid")
    return least, preferred, most
