"""The handshake with NBD servers of all ages, as bytes; and with those that are none."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.nbd_server import CONTEXT, ERR_UNSUP, GO, STRUCTURED, option_answer
from vhostblk.block.drivers.nbd_handshake import (
    INIT_MAGIC,
    MAX_ANSWER,
    MAX_ANSWERS,
    OLDSTYLE_MAGIC,
    OPTION_MAGIC,
    handshake,
)
from vhostblk.block.drivers.nbd_wire import Export, ExportFlag
from vhostblk.errors import ConfigError

HELLO = struct.pack(">QQH", INIT_MAGIC, OPTION_MAGIC, 3)
ACK_STRUCTURED = option_answer(STRUCTURED, 1)
ACK_CONTEXT = option_answer(CONTEXT, 4, b"\0\0\0\x09base:allocation") + option_answer(CONTEXT, 1)
SIZES = option_answer(GO, 3, struct.pack(">HIII", 3, 512, 4096, 1 << 25))
EXPORT = option_answer(GO, 3, struct.pack(">HQH", 0, 1 << 20, 5))
NAMED = option_answer(GO, 3, struct.pack(">H", 1) + b"its name")
DONE = option_answer(GO, 1)
ASKED = HELLO + ACK_STRUCTURED + ACK_CONTEXT


def shake(said: bytes, name: str = "", *, everything: bool = True) -> tuple[Export, bytes]:
    """What comes of a server that says this and leaves, and what it has been told.

    Args:
        everything: all of it belongs to the handshake.
    """
    steps = handshake(name)
    told = b""
    left = memoryview(said)
    try:
        step = next(steps)
        while True:
            if isinstance(step, bytes):
                told += step
                step = next(steps)
            elif len(left) < len(step):
                left = left[len(left) :]
                step = steps.throw(EOFError())
            else:
                step[:], left = left[: len(step)], left[len(step) :]
                step = next(steps)
    except StopIteration as end:
        assert not (everything and len(left))
        return end.value, told


def option(number: int, payload: bytes = b"") -> bytes:
    return struct.pack(">QII", OPTION_MAGIC, number, len(payload)) + payload


def test_newest_server_is_asked_for_everything() -> None:
    export, told = shake(ASKED + SIZES + NAMED + EXPORT + DONE, "abc")
    flags = ExportFlag.HAS_FLAGS | ExportFlag.SEND_FLUSH
    assert export == Export(1 << 20, flags, True, 9, 512, 4096, 1 << 25)
    name = b"\0\0\0\3abc"
    query = name + b"\0\0\0\1" + b"\0\0\0\x0fbase:allocation"
    assert told == b"\0\0\0\3" + option(STRUCTURED) + option(CONTEXT, query) + option(
        GO, name + b"\0\1\0\3"
    )


def test_older_servers_have_less() -> None:
    flags = ExportFlag.HAS_FLAGS | ExportFlag.SEND_FLUSH
    no_structure = option_answer(STRUCTURED, ERR_UNSUP, b"what?")
    assert shake(HELLO + no_structure + EXPORT + DONE)[0] == Export(1 << 20, flags)
    no_context = option_answer(CONTEXT, 1)
    assert shake(HELLO + ACK_STRUCTURED + no_context + EXPORT + DONE)[0] == Export(
        1 << 20, flags, structured=True
    )
    no_go = option_answer(GO, ERR_UNSUP)
    export, told = shake(HELLO + no_structure + no_go + struct.pack(">QH", 4096, 5), "abc")
    assert export == Export(4096, flags)
    assert told.endswith(option(1, b"abc"))
    not_fixed = struct.pack(">QQH", INIT_MAGIC, OPTION_MAGIC, 0)
    export, told = shake(not_fixed + struct.pack(">QH", 4096, 5) + bytes(124), "abc")
    assert (export, told) == (Export(4096, flags), bytes(4) + option(1, b"abc"))
    old = struct.pack(">QQQI", INIT_MAGIC, OLDSTYLE_MAGIC, 4096, 5) + bytes(124)
    assert shake(old) == (Export(4096, flags), b"")


REFUSED = {
    "no server": (b"SSH-2.0-OpenSSH_9.2\r\n", "Bad initial magic received: 0x5353482d322e302d"),
    "other NBD": (struct.pack(">QQ", INIT_MAGIC, 5), "Bad server magic received: 0x5"),
    "leaves": (HELLO[:9], "Failed to read server magic: Unexpected end-of-file"),
    "leaves later": (ASKED + EXPORT[:-3], "Failed to read option reply payload"),
    "old with names": (struct.pack(">QQ", INIT_MAGIC, OLDSTYLE_MAGIC), "non-empty export names"),
    "answers something else": (HELLO + option_answer(GO, 1), "Unexpected option type 7"),
    "no answer": (HELLO + bytes(20), "Unexpected option reply magic"),
    "long answer": (
        HELLO + option_answer(STRUCTURED, 1, bytes(MAX_ANSWER + 1))[:20],
        f"too long: {MAX_ANSWER + 1} bytes",
    ),
    "structured with more": (HELLO + option_answer(STRUCTURED, 1, b"x"), "unexpected reply 1"),
    "other context": (
        HELLO + ACK_STRUCTURED + option_answer(CONTEXT, 4, b"\0\0\0\1x\x1b"),
        "different context 'x\\?'",
    ),
    "context without name": (
        HELLO + ACK_STRUCTURED + option_answer(CONTEXT, 4, b"\0\0\0\1"),
        "unexpected length 4",
    ),
    "two contexts": (HELLO + ACK_STRUCTURED + 2 * ACK_CONTEXT[:-20], "more than one context"),
    "context of another type": (HELLO + ACK_STRUCTURED + option_answer(CONTEXT, 9), "type 9"),
    "context with more": (HELLO + ACK_STRUCTURED + option_answer(CONTEXT, 1, b"x"), "length"),
    "no export": (ASKED + DONE, "omitted NBD_INFO_EXPORT"),
    "sizes only": (ASKED + SIZES + DONE, "omitted NBD_INFO_EXPORT"),
    "go with more": (ASKED + EXPORT + option_answer(GO, 1, b"x"), "invalid NBD_REP_ACK"),
    "go of another type": (ASKED + option_answer(GO, 2), "unexpected reply type 2"),
    "short info": (ASKED + option_answer(GO, 3, b"\0"), "length 1 is too short"),
    "short export": (ASKED + option_answer(GO, 3, b"\0\0x"), "len 1 is unexpected size"),
    "endless": (ASKED + (MAX_ANSWERS + 1) * NAMED, "does not stop"),
    "odd blocks": (
        ASKED + option_answer(GO, 3, struct.pack(">HIII", 3, 3, 4096, 4096)),
        "3 is not a power of two",
    ),
    "no blocks": (
        ASKED + option_answer(GO, 3, struct.pack(">HIII", 3, 0, 4096, 4096)),
        "0 is not a power of two",
    ),
    "large blocks": (
        ASKED + option_answer(GO, 3, struct.pack(">HIII", 3, 1 << 20, 1 << 20, 1 << 20)),
        "above 65536",
    ),
    "preferred below minimum": (
        ASKED + option_answer(GO, 3, struct.pack(">HIII", 3, 512, 256, 4096)),
        "preferred block size 256",
    ),
    "maximum below minimum": (
        ASKED + option_answer(GO, 3, struct.pack(">HIII", 3, 512, 512, 511)),
        "maximum block size 511",
    ),
    "half a block": (
        ASKED + option_answer(GO, 3, struct.pack(">HQH", 0, 700, 1)) + SIZES + DONE,
        "export size 700 is not multiple of minimum block size 512",
    ),
    "denied": (ASKED + option_answer(GO, (1 << 31) + 2), r"Denied by server for option 7 \(go\)"),
    "no such export": (
        ASKED + option_answer(GO, (1 << 31) + 6, b"no\x1b export"),
        r"Requested export not available \(server reported: no\? export\)",
    ),
    "TLS": (ASKED + option_answer(GO, (1 << 31) + 5), "TLS negotiation required"),
    "unknown": (ASKED + option_answer(GO, (1 << 31) + 99), "Unknown error code"),
}


@pytest.mark.parametrize(("said", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_server_is_refused_with_a_reason(said: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shake(said, "abc")


def test_what_the_server_says_is_told_as_qemu_does() -> None:
    with pytest.raises(ConfigError) as caught:
        shake(ASKED + option_answer(GO, (1 << 31) + 6, b"export 'x' not present"))
    lines = "Requested export not available\nserver reported: export 'x' not present"
    assert caught.value.qemu_text == lines


def _spoil(said: bytes, at: int, value: int) -> bytes:
    return said[:at] + bytes([value]) + said[at + 1 :]


@given(st.integers(0, len(ASKED + SIZES + EXPORT + DONE) - 1), st.integers(0, 255))
def test_one_wrong_byte_is_an_export_or_an_error(at: int, value: int) -> None:
    whole = ASKED + SIZES + EXPORT + DONE
    for said in (_spoil(whole, at, value), whole[:at]):
        try:
            export, _ = shake(said, everything=False)
        except ConfigError:
            continue
        assert export.min_block <= 65536
        assert said is not whole[:at]
