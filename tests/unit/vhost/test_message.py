"""The codec: bytes in any pieces become the same messages; fds belong to the first byte."""

from __future__ import annotations

import struct

import pytest

from vhostblk.errors import SessionError
from vhostblk.vhost.message import (
    BACKEND_TABLE,
    FRONTEND_TABLE,
    HEADER_SIZE,
    MAX_PAYLOAD,
    U64,
    BackendRequest,
    ConfigSpace,
    Decoder,
    DeviceStateTransfer,
    Empty,
    InflightDescription,
    LogArea,
    Malformed,
    MemoryRegion,
    MemoryTable,
    Message,
    MessageFlag,
    Raw,
    Request,
    Ring,
    Row,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
)

REGION = MemoryRegion(0, 4096, 0x10000, 0)
SAMPLE_OF = {
    Empty: Empty(),
    LogArea: LogArea(4096, 8192),
    U64: U64(5),
    VringState: VringState(1, 2),
    VringAddress: VringAddress(1, 0, 16, 32, 48, 0),
    VringFile: VringFile(1),
    MemoryTable: MemoryTable((REGION,)),
    SingleRegion: SingleRegion(REGION),
    DeviceStateTransfer: DeviceStateTransfer(1, 0),
    ConfigSpace: ConfigSpace(0, 2, 0, b"ab"),
    InflightDescription: InflightDescription(0, 0, 1, 128),
}
ROWS = list(FRONTEND_TABLE.values())


def row_name(row: Row) -> str:
    return row.request.name


def header(request: int, flags: int, size: int) -> bytes:
    return struct.pack("=III", request, flags, size)


@pytest.mark.parametrize("row", ROWS, ids=row_name)
def test_every_request_survives_the_wire_a_byte_at_a_time(row: Row) -> None:
    message = Message(row.request, 9, SAMPLE_OF[row.payload])
    decoder = Decoder()
    messages: list[Message] = []
    for byte in message.encode():
        messages += decoder.feed(bytes([byte]))
    assert messages == [message]
    assert decoder.is_between_messages


@pytest.mark.parametrize("row", ROWS, ids=row_name)
def test_every_reply_is_read_as_its_row_says(row: Row) -> None:
    reply = Message(row.request).reply(SAMPLE_OF[row.reply or U64])
    assert Decoder().feed(reply.encode()) == (reply,)
    assert reply.is_reply
    assert not reply.needs_reply


def test_requests_that_name_a_vring_carry_its_index() -> None:
    for row in ROWS:
        assert hasattr(SAMPLE_OF[row.payload], "index") == (row.ring is not Ring.NONE), row


def test_messages_that_come_together_are_told_apart() -> None:
    messages = tuple(Message(r.request, 1, SAMPLE_OF[r.payload]) for r in ROWS)
    assert Decoder().feed(b"".join(m.encode() for m in messages)) == messages


def test_wanted_never_reaches_into_the_next_message() -> None:
    decoder = Decoder()
    assert decoder.wanted == HEADER_SIZE
    decoder.feed(header(Request.SET_VRING_NUM, 1, 8)[:5])
    assert decoder.wanted == 7
    decoder.feed(header(Request.SET_VRING_NUM, 1, 8)[5:])
    assert decoder.wanted == 8
    decoder.feed(bytes(8))
    assert decoder.wanted == HEADER_SIZE


def test_payload_of_the_wrong_size_is_malformed_and_the_stream_goes_on() -> None:
    decoder = Decoder()
    (message,) = decoder.feed(header(Request.SET_VRING_NUM, 1, 3) + b"abc")
    assert isinstance(message.payload, Malformed)
    assert decoder.feed(Message(Request.SET_OWNER).encode()) == (Message(Request.SET_OWNER),)


def test_unknown_request_is_raw() -> None:
    (message,) = Decoder().feed(header(999, 1, 3) + b"abc")
    assert message.payload == Raw(b"abc")
    assert message.name() == "request 999"


def test_reply_to_get_config_of_zero_length_is_an_error_not_a_malformed_reply() -> None:
    (message,) = Decoder().feed(header(Request.GET_CONFIG, 5, 0))
    assert message.payload == Empty()


@pytest.mark.parametrize("version", [0, 2, 3])
def test_other_versions_end_the_session(version: int) -> None:
    with pytest.raises(SessionError, match="version"):
        Decoder().feed(header(Request.GET_FEATURES, version, 0))


def test_unknown_flags_are_ignored() -> None:
    (message,) = Decoder().feed(header(Request.GET_FEATURES, 0xFFFF_FFF1, 0))
    assert not message.is_reply
    assert message.flags & MessageFlag.VERSION


@pytest.mark.parametrize("request_number", [Request.SET_MEM_TABLE, 12345])
def test_payload_too_long_ends_the_session_at_its_header(request_number: int) -> None:
    decoder = Decoder()
    with pytest.raises(SessionError, match="payload of 4097 bytes"):
        decoder.feed(header(request_number, 1, MAX_PAYLOAD + 1))


def test_longest_payload_is_swallowed() -> None:
    (message,) = Decoder().feed(header(999, 1, MAX_PAYLOAD) + bytes(MAX_PAYLOAD))
    assert message.payload == Raw(bytes(MAX_PAYLOAD))


def test_fds_go_to_the_message_they_came_with() -> None:
    first, second = Message(Request.SET_OWNER), Message(Request.SET_VRING_CALL, 1, VringFile(0))
    decoder = Decoder()
    assert decoder.feed(first.encode()) == (first,)
    decoder.feed(second.encode()[:1], [10])
    (message,) = decoder.feed(second.encode()[1:])
    assert message.fds == (10,)
    assert decoder.close() == ()


def test_fds_with_several_messages_belong_to_the_first() -> None:
    data = Message(Request.SET_OWNER).encode()
    first, second = Decoder().feed(data * 2, [10, 11])
    assert (first.fds, second.fds) == ((10, 11), ())


def test_fds_inside_a_message_end_the_session_and_are_given_back() -> None:
    decoder = Decoder()
    decoder.feed(header(Request.SET_MEM_TABLE, 1, 40), [10])
    with pytest.raises(SessionError, match="middle of a message"):
        decoder.feed(b"x", [11])
    assert decoder.close() == (10, 11)
    assert decoder.close() == ()


def test_close_gives_back_the_fds_of_an_unfinished_message() -> None:
    decoder = Decoder()
    decoder.feed(header(Request.SET_VRING_KICK, 1, 8), [10])
    assert decoder.close() == (10,)


def test_back_end_channel_has_its_own_numbers() -> None:
    message = Message(BackendRequest.CONFIG_CHANGE_MSG)
    assert Decoder(BACKEND_TABLE).feed(message.encode()) == (message,)
    assert message.name(BackendRequest) == "CONFIG_CHANGE_MSG"
