"""The wire format of vhost-user: bytes in, messages out, and back; one table row per message.

vhost-user, "Message Specification", "Front-end message types", "Back-end message types".

A message is a 12-byte header, a payload whose layout depends on the request, and file descriptors
that travel beside its first byte. Only syntax is checked here: a payload of the wrong size becomes
`Malformed`, one of an unknown request `Raw`, and whoever receives them decides. Only what makes the
rest of the stream unreadable, or asks for unbounded memory, is a `SessionError`.

Knows nothing about sockets, about the order of messages, and about what was negotiated, though the
columns that `session` checks (features, ring states) stand in the same row as the layout.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from vhostblk.errors import PeerError, SessionError
from vhostblk.vhost.payload import (
    MAX_CONFIG_SIZE,
    MAX_TABLE_REGIONS,
    U64,
    ConfigSpace,
    DeviceStateTransfer,
    Empty,
    InflightDescription,
    LogArea,
    Malformed,
    MemoryRegion,
    MemoryTable,
    Payload,
    Raw,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
)

__all__ = [
    "BACKEND_TABLE",
    "FRONTEND_TABLE",
    "HEADER_SIZE",
    "MAX_CONFIG_SIZE",
    "MAX_PAYLOAD",
    "MAX_TABLE_REGIONS",
    "BackendRequest",
    "ConfigSpace",
    "Decoder",
    "DeviceStateTransfer",
    "Empty",
    "Gate",
    "InflightDescription",
    "LogArea",
    "Malformed",
    "MemoryRegion",
    "MemoryTable",
    "Message",
    "MessageFlag",
    "Payload",
    "ProtocolFeature",
    "Raw",
    "Request",
    "Ring",
    "Row",
    "SingleRegion",
    "U64",
    "VringAddress",
    "VringFile",
    "VringState",
]

HEADER_SIZE = 12
MAX_PAYLOAD = 4096
"""Longer payloads end the session at their header: the longest legal one has 268 bytes."""

_VERSION = 1
_VERSION_MASK = 3


class MessageFlag(enum.IntFlag):
    """Header flags; the two lowest bits are the version, always 1."""

    VERSION = _VERSION
    REPLY = 1 << 2
    NEED_REPLY = 1 << 3


class Request(enum.IntEnum):
    """What a front-end may ask; all that the specification lists, served or not."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44
    GET_VRING_BASE_SKIP_DRAIN = 45


class BackendRequest(enum.IntEnum):
    """What a back-end may ask on the channel of SET_BACKEND_REQ_FD."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5


class ProtocolFeature(enum.IntFlag):
    """Masks of vhost-user's own feature bits ("Protocol features")."""

    NONE = 0
    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM = 1 << 22
    GET_VRING_BASE_SKIP_DRAIN = 1 << 23


class Gate(enum.Enum):
    """When a row's protocol feature permits its request; the specification uses both rules."""

    NEGOTIATED = enum.auto()  # after SET_PROTOCOL_FEATURES has set the bit
    OFFERED = enum.auto()  # as soon as GET_PROTOCOL_FEATURES shows the bit


class Ring(enum.Enum):
    """Which state the vring that a request names has to be in ("Ring states")."""

    NONE = enum.auto()  # the request names no vring
    ANY = enum.auto()
    STOPPED = enum.auto()


@dataclass(frozen=True)
class Row:
    """All there is to check about one request before its handler runs."""

    request: Request | BackendRequest
    payload: type[Payload] = Empty
    reply: type[Payload] | None = None  # None: no reply but REPLY_ACK's
    fds: tuple[int, int] = (0, 0)  # fewest and most
    reply_fds: int = 0  # at most
    feature: ProtocolFeature = ProtocolFeature.NONE
    gate: Gate = Gate.NEGOTIATED
    ring: Ring = Ring.NONE
    refusal: int | None = None  # what a reply of u64 says no with

    def check_syntax(self, message: Message) -> None:
        """Check the columns that need no state. Raises: PeerError: payload or fds are wrong."""
        payload, count = message.payload, len(message.fds)
        if not isinstance(payload, self.payload):
            reason = payload.reason if isinstance(payload, Malformed) else "wrong payload"
            raise PeerError(f"{self.request.name}: {reason}")
        fewest, most = self.fds
        if not fewest <= count <= most:
            wanted = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            raise PeerError(f"{self.request.name}: {count} fds where {wanted} belong")


def _table(*rows: Row) -> Mapping[int, Row]:
    return MappingProxyType({int(row.request): row for row in rows})


_R, _P = Request, ProtocolFeature
_SLOTS = _P.CONFIGURE_MEM_SLOTS

# fmt: off
FRONTEND_TABLE: Mapping[int, Row] = _table(
    Row(_R.GET_FEATURES, reply=U64),
    Row(_R.SET_FEATURES, U64),
    Row(_R.GET_PROTOCOL_FEATURES, reply=U64),
    Row(_R.SET_PROTOCOL_FEATURES, U64),
    Row(_R.SET_OWNER),
    Row(_R.RESET_OWNER),
    Row(_R.RESET_DEVICE, feature=_P.RESET_DEVICE, gate=Gate.OFFERED),
    Row(_R.SET_MEM_TABLE, MemoryTable, fds=(1, MAX_TABLE_REGIONS)),
    Row(_R.GET_MAX_MEM_SLOTS, reply=U64, feature=_SLOTS),
    Row(_R.ADD_MEM_REG, SingleRegion, fds=(1, 1), feature=_SLOTS),
    # No fd belongs here, but QEMU up to 8 and others send one: accept it and close it.
    Row(_R.REM_MEM_REG, SingleRegion, fds=(0, 1), feature=_SLOTS),
    Row(_R.SET_LOG_BASE, LogArea, reply=U64, fds=(1, 1), feature=_P.LOG_SHMFD),
    Row(_R.SET_LOG_FD, fds=(1, 1), feature=_P.LOG_SHMFD, gate=Gate.OFFERED),
    Row(_R.SET_VRING_NUM, VringState, ring=Ring.STOPPED),
    Row(_R.SET_VRING_ADDR, VringAddress, ring=Ring.ANY),
    Row(_R.SET_VRING_BASE, VringState, ring=Ring.STOPPED),
    Row(_R.GET_VRING_BASE, VringState, reply=VringState, ring=Ring.ANY),
    Row(_R.GET_VRING_BASE_SKIP_DRAIN, VringState, reply=VringState, ring=Ring.ANY,
        feature=_P.GET_VRING_BASE_SKIP_DRAIN),
    Row(_R.SET_VRING_KICK, VringFile, fds=(0, 1), ring=Ring.ANY),
    Row(_R.SET_VRING_CALL, VringFile, fds=(0, 1), ring=Ring.ANY),
    Row(_R.SET_VRING_ERR, VringFile, fds=(0, 1), ring=Ring.ANY),
    Row(_R.SET_VRING_ENABLE, VringState, ring=Ring.ANY),
    Row(_R.GET_QUEUE_NUM, reply=U64, feature=_P.MQ, gate=Gate.OFFERED),
    Row(_R.SET_BACKEND_REQ_FD, fds=(1, 1), feature=_P.BACKEND_REQ, gate=Gate.OFFERED),
    Row(_R.GET_CONFIG, ConfigSpace, reply=ConfigSpace, feature=_P.CONFIG),
    Row(_R.SET_CONFIG, ConfigSpace, feature=_P.CONFIG),
    Row(_R.GET_INFLIGHT_FD, InflightDescription, reply=InflightDescription, reply_fds=1,
        feature=_P.INFLIGHT_SHMFD),
    Row(_R.SET_INFLIGHT_FD, InflightDescription, fds=(1, 1), feature=_P.INFLIGHT_SHMFD),
    Row(_R.SET_STATUS, U64, feature=_P.STATUS),
    Row(_R.GET_STATUS, reply=U64, feature=_P.STATUS),
    # Bits 0 to 7 are the error, bit 8 says that no fd comes with the reply.
    Row(_R.SET_DEVICE_STATE_FD, DeviceStateTransfer, reply=U64, fds=(1, 1),
        feature=_P.DEVICE_STATE, refusal=0x101),
    Row(_R.CHECK_DEVICE_STATE, reply=U64, feature=_P.DEVICE_STATE, refusal=1),
)
"""Requests of the front-end that are served."""

BACKEND_TABLE: Mapping[int, Row] = _table(
    Row(BackendRequest.CONFIG_CHANGE_MSG, feature=_P.CONFIG),
)
"""Requests of the back-end that are sent."""
# fmt: on


@dataclass(frozen=True)
class Message:
    """One message with the fds that came, or go, beside it."""

    request: int
    flags: int = _VERSION
    payload: Payload = field(default_factory=Empty)
    fds: tuple[int, ...] = ()

    @property
    def is_reply(self) -> bool:
        return bool(self.flags & MessageFlag.REPLY)

    @property
    def needs_reply(self) -> bool:
        return bool(self.flags & MessageFlag.NEED_REPLY)

    def name(self, requests: type[Request] | type[BackendRequest] = Request) -> str:
        """The request's name for logs."""
        try:
            return requests(self.request).name
        except ValueError:
            return f"request {self.request}"

    def reply(self, payload: Payload, fds: tuple[int, ...] = ()) -> Message:
        """Build the reply to this request."""
        return Message(self.request, _VERSION | MessageFlag.REPLY, payload, fds)

    def encode(self) -> bytes:
        """Give the bytes; the fds go beside the first of them."""
        data = self.payload.pack()
        return _HEADER.pack(self.request, self.flags, len(data)) + data


_HEADER = struct.Struct("=III")


class Decoder:
    """Bytes in, messages out; one direction of one connection.

    Theory of operation: the stream is a header of fixed size, then as many bytes as the header
    says. `wanted` is how many bytes are missing up to the next of these borders; a transport that
    never reads more than that never has to split what it read, and knows which message the fds
    that came along belong to. Any `SessionError` is final.

    Args:
        table: rows by request number: `FRONTEND_TABLE`, or `BACKEND_TABLE` on the back-end channel.

    Owns: the fds of the message that is not complete yet; see `close`.
    """

    def __init__(self, table: Mapping[int, Row] = FRONTEND_TABLE) -> None:
        self._table = table
        self._buffer = bytearray()
        self._fds: tuple[int, ...] = ()
        self._header: tuple[int, int, int] | None = None
        self._error: SessionError | None = None

    @property
    def wanted(self) -> int:
        """Bytes missing up to the end of the header or of the message, always positive."""
        size = HEADER_SIZE if self._header is None else HEADER_SIZE + self._header[2]
        return size - len(self._buffer)

    @property
    def is_between_messages(self) -> bool:
        """Whether the stream may end here."""
        return not self._buffer

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> tuple[Message, ...]:
        """Take bytes as they come, and the fds that came beside the first of them.

        Args:
            data: any number of bytes; beyond `wanted` they begin further messages.
            fds: now owned by the decoder, then by the message.

        Raises:
            SessionError: fds inside a message, a version other than 1, a payload too long. If
                messages were complete before that, they are returned, and the next call raises.
        """
        if fds:
            inside = bool(self._buffer)
            self._fds += tuple(fds)
            # vhost-user, "Communication": fds come with the first byte of the header. Elsewhere
            # they would let a front-end attach hundreds to every byte.
            if inside or not data:
                raise SessionError("file descriptors in the middle of a message")
        if self._error is not None:
            raise self._error
        messages: list[Message] = []
        position = 0
        while position < len(data):
            step = self.wanted
            self._buffer += data[position : position + step]
            position += step
            try:
                message = self._advance()
            except SessionError as error:
                if not messages:
                    raise
                self._error = error
                break
            if message is not None:
                messages.append(message)
        return tuple(messages)

    def close(self) -> tuple[int, ...]:
        """Give up the unfinished message; the caller closes the fds returned."""
        fds, self._fds = self._fds, ()
        self._buffer.clear()
        self._header = None
        return fds

    def _advance(self) -> Message | None:
        if self._header is None:
            if len(self._buffer) < HEADER_SIZE:
                return None
            self._header = self._check(*_HEADER.unpack(self._buffer))
        request, flags, size = self._header
        if len(self._buffer) < HEADER_SIZE + size:
            return None
        payload = self._payload(request, flags, bytes(self._buffer[HEADER_SIZE:]))
        return Message(request, flags, payload, self.close())

    @staticmethod
    def _check(request: int, flags: int, size: int) -> tuple[int, int, int]:
        if flags & _VERSION_MASK != _VERSION:
            raise SessionError(f"request {request}: version {flags & _VERSION_MASK}, not 1")
        if size > MAX_PAYLOAD:
            raise SessionError(f"request {request}: payload of {size} bytes, limit {MAX_PAYLOAD}")
        return request, flags, size

    def _payload(self, request: int, flags: int, data: bytes) -> Payload:
        row = self._table.get(request)
        if row is None:
            return Raw(data)
        kind = row.payload
        if flags & MessageFlag.REPLY:
            kind = row.reply or U64
            # vhost-user, GET_CONFIG: a back-end reports an error by a payload of zero length.
            if kind is ConfigSpace and not data:
                kind = Empty
        try:
            return kind.unpack(data)
        except PeerError as error:
            return Malformed(str(error))
