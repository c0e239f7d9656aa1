"""Replies of NBD servers, as bytes: good ones however they come, and those that are lies."""

from __future__ import annotations

import errno
import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.nbd_server import chunk, simple
from vhostblk.block.drivers.nbd_wire import (
    MAX_PARTS,
    MAX_PAYLOAD,
    REQUEST,
    Command,
    CommandFlag,
    Export,
    ExportFlag,
    ReplyType,
    Request,
    replies,
)
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError

STRUCTURED = Export(1 << 20, ExportFlag.HAS_FLAGS, structured=True, context=7)
SIMPLE = Export(1 << 20, ExportFlag.HAS_FLAGS)
AT = 4096


class Conversation:
    """Requests that are under way, and what comes back."""

    def __init__(self, export: Export) -> None:
        self.pending: dict[int, Request] = {}
        self.finished: list[int] = []
        self._steps = replies(export, self.pending, self._finish)
        self._want = next(self._steps)

    def _finish(self, handle: int) -> None:
        del self.pending[handle]
        self.finished.append(handle)

    def read(self, handle: int, length: int, *cuts: int) -> tuple[Request, bytearray]:
        """A read under way, into pieces of memory that end at `cuts`."""
        buffer = bytearray(b"\xee" * length)
        ends = (0, *cuts, length)
        views = [memoryview(buffer)[a:b] for a, b in pairwise(ends)]
        request = Request(Command.READ, AT, length, IoVec(views))
        self.pending[handle] = request
        return request, buffer

    def begin(self, handle: int, command: Command, length: int = 512) -> Request:
        """Any other."""
        self.pending[handle] = request = Request(command, AT, length)
        return request

    def hear(self, data: bytes) -> None:
        """The server says this."""
        left = memoryview(data)
        while True:
            while not len(self._want):
                self._want = next(self._steps)
            if not len(left):
                return
            count = min(len(left), len(self._want))
            self._want[:count] = left[:count]
            self._want, left = self._want[count:], left[count:]


def data(start: int, content: bytes | bytearray) -> bytes:
    return struct.pack(">Q", start) + content


def hole(start: int, length: int) -> bytes:
    return struct.pack(">QI", start, length)


def status(context: int, *extents: int) -> bytes:
    return struct.pack(f">I{len(extents)}I", context, *extents)


def test_request_has_the_bytes_of_the_specification() -> None:
    request = Request(Command.WRITE_ZEROES, 0x1122, 0x33, flags=CommandFlag.NO_HOLE)
    assert request.header(5).hex() == "2560951300020006" + f"{5:016x}{0x1122:016x}{0x33:08x}"
    assert len(request.header(5)) == REQUEST.size


@given(st.data())
def test_sparse_read_fills_memory_however_it_is_cut(draw: st.DataObject) -> None:
    length = draw.draw(st.integers(1, 200))
    cuts = sorted(draw.draw(st.sets(st.integers(0, length), max_size=4)))
    ends = sorted({0, length, *draw.draw(st.sets(st.integers(1, length), max_size=6))})
    expected = bytearray(range(1, 201))[:length]
    chunks = []
    for start, end in pairwise(ends):
        if draw.draw(st.booleans()):
            expected[start:end] = bytes(end - start)
            chunks.append((ReplyType.OFFSET_HOLE, hole(AT + start, end - start)))
        else:
            chunks.append((ReplyType.OFFSET_DATA, data(AT + start, expected[start:end])))
    chunks = draw.draw(st.permutations(chunks))
    conversation = Conversation(STRUCTURED)
    request, buffer = conversation.read(3, length, *cuts)
    other = conversation.begin(4, Command.FLUSH)
    stream = b"".join(chunk(3, kind, payload, done=False) for kind, payload in chunks)
    stream += simple(4) + chunk(3, ReplyType.NONE)
    pieces = sorted(draw.draw(st.sets(st.integers(0, len(stream)), max_size=20)))
    for start, end in zip([0, *pieces], [*pieces, len(stream)], strict=False):
        conversation.hear(stream[start:end])
    assert conversation.finished == [4, 3]
    assert (request.error, other.error, buffer) == (None, None, expected)


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_replies_or_a_lie_and_change_nothing_else(
    garbage: bytes, structured: bool
) -> None:
    conversation = Conversation(STRUCTURED if structured else SIMPLE)
    _, buffer = conversation.read(0, 64)
    caught: list[int | None] = []
    try:
        conversation.hear(garbage)
    except BlockError as error:
        caught.append(error.errno)
    assert caught in ([], [errno.EPROTO])
    assert len(buffer) == 64


def test_byte_at_a_time_is_the_same_as_all_at_once() -> None:
    conversation = Conversation(SIMPLE)
    request, buffer = conversation.read(1, 5, 2)
    for byte in simple(1, 0, b"hello"):
        conversation.hear(bytes([byte]))
    assert (bytes(buffer), request.error, conversation.finished) == (b"hello", None, [1])


@pytest.mark.parametrize(
    ("number", "known"),
    [(1, errno.EPERM), (28, errno.ENOSPC), (95, errno.ENOTSUP), (9999, errno.EINVAL)],
)
def test_errors_have_the_servers_number_and_words(number: int, known: int) -> None:
    conversation = Conversation(STRUCTURED)
    request, _ = conversation.read(1, 512)
    text = b"no \x1b[31mway\n"
    payload = struct.pack(">IH", number, len(text)) + text
    conversation.hear(chunk(1, ReplyType.ERROR, payload))
    assert request.error is not None
    assert request.error.errno == known
    assert request.error.strerror == "the NBD server says: no ?[31mway"
    request = conversation.begin(2, Command.TRIM)
    conversation.hear(simple(2, number))
    assert request.error is not None
    assert request.error.errno == known


def test_error_with_an_offset_and_one_of_an_unknown_kind_are_errors() -> None:
    conversation = Conversation(STRUCTURED)
    for handle, kind in enumerate((ReplyType.ERROR_OFFSET, (1 << 15) + 77)):
        request, _ = conversation.read(handle, 512)
        payload = struct.pack(">IH", 5, 0) + struct.pack(">Q", AT)
        conversation.hear(chunk(handle, kind, payload))
        assert request.error is not None
        assert request.error.errno == errno.EIO


def test_status_gives_the_first_extent() -> None:
    conversation = Conversation(STRUCTURED)
    request = conversation.begin(1, Command.BLOCK_STATUS)
    conversation.hear(chunk(1, ReplyType.BLOCK_STATUS, status(7, 512, 3, 512, 0)))
    assert request.extent == (512, 3)


def test_status_that_cannot_be_told_may_be_a_simple_error() -> None:
    conversation = Conversation(STRUCTURED)
    request = conversation.begin(1, Command.BLOCK_STATUS)
    conversation.hear(simple(1, 5))
    assert request.error is not None
    assert request.error.errno == errno.EIO


LIES = {
    "no-magic": b"\x12\x34\x56\x78" + bytes(16),
    "unknown-handle": simple(99),
    "unknown-chunk-handle": chunk(99, ReplyType.NONE),
    "simple-reply-to-a-read": simple(1, 0, bytes(512)),
    "simple-reply-to-a-status": simple(2),
    "read-without-all-data": chunk(1, ReplyType.OFFSET_DATA, data(AT, bytes(511))),
    "read-of-nothing": chunk(1, ReplyType.NONE),
    "data-before": chunk(1, ReplyType.OFFSET_DATA, data(AT - 1, bytes(512))),
    "data-behind": chunk(1, ReplyType.OFFSET_DATA, data(AT + 1, bytes(512))),
    "data-far-away": chunk(1, ReplyType.OFFSET_DATA, data((1 << 64) - 1, bytes(512))),
    "data-without-any": chunk(1, ReplyType.OFFSET_DATA, data(AT, b"")),
    "data-twice": chunk(1, ReplyType.OFFSET_DATA, data(AT, bytes(256)), done=False)
    + chunk(1, ReplyType.OFFSET_DATA, data(AT + 255, bytes(257))),
    "hole-over-data": chunk(1, ReplyType.OFFSET_DATA, data(AT + 256, bytes(256)), done=False)
    + chunk(1, ReplyType.OFFSET_HOLE, hole(AT, 512)),
    "hole-of-nothing": chunk(1, ReplyType.OFFSET_HOLE, hole(AT, 0)),
    "hole-too-large": chunk(1, ReplyType.OFFSET_HOLE, hole(AT, 1 << 31)),
    "hole-too-short": chunk(1, ReplyType.OFFSET_HOLE, b"\0"),
    "status-to-a-read": chunk(1, ReplyType.BLOCK_STATUS, status(7, 512, 0)),
    "data-to-a-flush": chunk(3, ReplyType.OFFSET_DATA, data(AT, bytes(512))),
    "hole-to-a-status": chunk(2, ReplyType.OFFSET_HOLE, hole(AT, 512)),
    "no-status": chunk(2, ReplyType.NONE),
    "status-of-another-context": chunk(2, ReplyType.BLOCK_STATUS, status(8, 512, 0)),
    "status-of-no-bytes": chunk(2, ReplyType.BLOCK_STATUS, status(7, 0, 0)),
    "status-without-extents": chunk(2, ReplyType.BLOCK_STATUS, status(7)),
    "status-in-pieces": chunk(2, ReplyType.BLOCK_STATUS, status(7, 1, 2, 3)),
    "status-twice": 2 * chunk(2, ReplyType.BLOCK_STATUS, status(7, 512, 0), done=False),
    "empty-chunk-not-last": chunk(3, ReplyType.NONE, done=False),
    "empty-chunk-not-empty": chunk(3, ReplyType.NONE, b"x"),
    "unknown-type": chunk(3, 99),
    "error-that-is-none": chunk(3, ReplyType.ERROR, struct.pack(">IH", 0, 0)),
    "error-too-short": chunk(3, ReplyType.ERROR, b"\0\0\0\5"),
    "error-longer-than-it-is": chunk(3, ReplyType.ERROR, struct.pack(">IH", 5, 9) + b"x"),
    "error-too-long": chunk(3, ReplyType.ERROR, bytes(MAX_PAYLOAD + 1)),
    "simple-after-chunk": chunk(3, ReplyType.ERROR, struct.pack(">IH", 5, 0), done=False)
    + simple(3),
}


@pytest.mark.parametrize("said", LIES.values(), ids=LIES.keys())
def test_lie_is_a_protocol_error(said: bytes) -> None:
    conversation = Conversation(STRUCTURED)
    conversation.read(1, 512)
    conversation.begin(2, Command.BLOCK_STATUS)
    conversation.begin(3, Command.FLUSH)
    with pytest.raises(BlockError) as caught:
        conversation.hear(said)
    assert caught.value.errno == errno.EPROTO


def test_chunks_where_none_were_negotiated_are_a_lie() -> None:
    conversation = Conversation(SIMPLE)
    conversation.begin(1, Command.FLUSH)
    with pytest.raises(BlockError, match="magic"):
        conversation.hear(chunk(1, ReplyType.NONE))


def test_read_in_very_many_parts_is_bounded() -> None:
    conversation = Conversation(STRUCTURED)
    request, _ = conversation.read(1, 4 * MAX_PARTS)
    parts = [
        chunk(1, ReplyType.OFFSET_DATA, data(AT + 2 * part, b"x"), done=False)
        for part in range(MAX_PARTS + 1)
    ]
    conversation.hear(b"".join(parts[:-1]))
    with pytest.raises(BlockError, match="parts"):
        conversation.hear(parts[-1])
    assert len(request.parts) == MAX_PARTS + 1
