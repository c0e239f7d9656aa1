"""The front-end's side of a vhost-user session: requests out, replies in.

vhost-user, "Communication", "REPLY_ACK", "Protocol features".

Theory of operation. `request` builds a message and, if it will be answered, remembers that; the
answer is given to `receive`, in the order of the requests. Whether a request is answered follows
from its row in `message.FRONTEND_TABLE`, and from NEED_REPLY, which is set wherever REPLY_ACK is
negotiated. What is negotiated is learnt from the requests and replies that pass.

Normally a request that breaks the protocol is refused here (StateError), so a client does not
confuse itself; with `strict` off, and with `raw`, anything goes: so back-ends are attacked.

Knows nothing about sockets, rings or memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from vhostblk.errors import PeerError, SessionError, StateError
from vhostblk.vhost.message import (
    FRONTEND_TABLE,
    U64,
    ConfigSpace,
    DeviceStateTransfer,
    Empty,
    InflightDescription,
    LogArea,
    Malformed,
    MemoryRegion,
    MemoryTable,
    Message,
    MessageFlag,
    Payload,
    ProtocolFeature,
    Raw,
    Request,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
)
from vhostblk.vhost.vring import VringFd

__all__ = ["Frontend"]

_FD_REQUESTS = {
    VringFd.KICK: Request.SET_VRING_KICK,
    VringFd.CALL: Request.SET_VRING_CALL,
    VringFd.ERR: Request.SET_VRING_ERR,
}


class Frontend:
    """The state of one connection, as the front-end sees it.

    Args:
        strict: refuse to build what the protocol forbids.

    Context: one thread. Owns: nothing; fds are passed through.
    """

    def __init__(self, *, strict: bool = True) -> None:
        self.strict = strict
        self.features_offered = 0
        """From the reply to GET_FEATURES."""
        self.protocol_offered = ProtocolFeature.NONE
        """From the reply to GET_PROTOCOL_FEATURES."""
        self.protocol_features = ProtocolFeature.NONE
        """From the SET_PROTOCOL_FEATURES sent last."""
        self._expected: deque[Message] = deque()

    @property
    def expects_reply(self) -> bool:
        """Whether an answer is due."""
        return bool(self._expected)

    # ------------------------------------------------------------------ any request

    def request(
        self,
        request: Request,
        payload: Payload | None = None,
        fds: Sequence[int] = (),
        *,
        need_reply: bool | None = None,
    ) -> Message:
        """Build a request.

        Args:
            payload: None where the request has none.
            fds: borrowed by the message.
            need_reply: None: ask for an acknowledgement where REPLY_ACK is negotiated.

        Raises:
            StateError: the protocol forbids it, and this front-end is strict.
        """
        payload = payload or Empty()
        acks = bool(self.protocol_features & ProtocolFeature.REPLY_ACK)
        if need_reply is None:
            need_reply = acks
        flags = MessageFlag.VERSION | (MessageFlag.NEED_REPLY if need_reply else 0)
        message = Message(request, flags, payload, tuple(fds))
        if self.strict:
            self._check(message)
        row = FRONTEND_TABLE.get(request)
        if isinstance(payload, U64) and request == Request.SET_PROTOCOL_FEATURES:
            self.protocol_features = ProtocolFeature(payload.value)
            acks = bool(self.protocol_features & ProtocolFeature.REPLY_ACK)
        if (row is not None and row.reply is not None) or (need_reply and acks):
            self._expected.append(message)
        return message

    def raw(self, request: int, flags: int, data: bytes = b"", fds: Sequence[int] = ()) -> Message:
        """Build any message at all. No reply is expected; look at what comes yourself."""
        return Message(request, flags, Raw(data), tuple(fds))

    def receive(self, reply: Message) -> Payload:
        """Take the answer to the oldest request that is due one.

        Returns:
            The payload: of the kind the request's row names, or `U64(0)` for an acknowledgement.

        Raises:
            PeerError: the back-end refused the request.
            SessionError: this is not an answer to that request.
            StateError: nothing was asked.
        """
        if not self._expected:
            raise StateError(f"{reply.name()}: nothing was asked")
        asked = self._expected.popleft()
        row = FRONTEND_TABLE.get(asked.request)
        fds = row.reply_fds if row is not None else 0
        if reply.request != asked.request or not reply.is_reply or len(reply.fds) > fds:
            raise SessionError(f"{asked.name()} was answered by {reply.name()} {reply.flags:#x}")
        payload = reply.payload
        if isinstance(payload, Malformed):
            raise SessionError(f"{asked.name()}: reply: {payload.reason}")
        if row is None or row.reply is None:
            if not isinstance(payload, U64):
                payload = U64.unpack(payload.pack())
            if payload.value:
                raise PeerError(f"{asked.name()} was refused")
        elif row.reply is ConfigSpace:
            self._check_config(asked, payload)
        self._learn(asked, payload)
        return payload

    # ------------------------------------------------------------------ requests by name

    def get_features(self) -> Message:
        return self.request(Request.GET_FEATURES)

    def set_features(self, features: int) -> Message:
        return self.request(Request.SET_FEATURES, U64(features))

    def get_protocol_features(self) -> Message:
        return self.request(Request.GET_PROTOCOL_FEATURES)

    def set_protocol_features(self, features: ProtocolFeature) -> Message:
        # Whether an acknowledgement may be asked for is only settled by this message.
        return self.request(Request.SET_PROTOCOL_FEATURES, U64(int(features)), need_reply=False)

    def set_mem_table(self, regions: Sequence[MemoryRegion], fds: Sequence[int]) -> Message:
        return self.request(Request.SET_MEM_TABLE, MemoryTable(tuple(regions)), fds)

    def add_mem_reg(self, region: MemoryRegion, fd: int) -> Message:
        return self.request(Request.ADD_MEM_REG, SingleRegion(region), (fd,))

    def rem_mem_reg(self, region: MemoryRegion) -> Message:
        return self.request(Request.REM_MEM_REG, SingleRegion(region))

    def set_log_base(self, size: int, offset: int, fd: int) -> Message:
        return self.request(Request.SET_LOG_BASE, LogArea(size, offset), (fd,), need_reply=False)

    def set_log_fd(self, fd: int) -> Message:
        return self.request(Request.SET_LOG_FD, fds=(fd,))

    def set_vring_num(self, index: int, size: int) -> Message:
        return self.request(Request.SET_VRING_NUM, VringState(index, size))

    def set_vring_base(self, index: int, base: int) -> Message:
        return self.request(Request.SET_VRING_BASE, VringState(index, base))

    def get_vring_base(self, index: int, *, skip_drain: bool = False) -> Message:
        request = Request.GET_VRING_BASE_SKIP_DRAIN if skip_drain else Request.GET_VRING_BASE
        return self.request(request, VringState(index, 0))

    def set_vring_addr(
        self, index: int, *, desc: int, avail: int, used: int, log: int | None = None
    ) -> Message:
        flags = int(log is not None)
        address = VringAddress(index, flags, desc=desc, used=used, avail=avail, log=log or 0)
        return self.request(Request.SET_VRING_ADDR, address)

    def set_vring_fd(self, index: int, which: VringFd, fd: int | None) -> Message:
        fds = () if fd is None else (fd,)
        return self.request(_FD_REQUESTS[which], VringFile(index, fd is not None), fds)

    def set_vring_enable(self, index: int, enabled: bool) -> Message:
        return self.request(Request.SET_VRING_ENABLE, VringState(index, int(enabled)))

    def set_backend_req_fd(self, fd: int) -> Message:
        return self.request(Request.SET_BACKEND_REQ_FD, fds=(fd,))

    def get_config(self, offset: int, size: int) -> Message:
        return self.request(Request.GET_CONFIG, ConfigSpace(offset, size, 0, bytes(size)))

    def set_config(self, offset: int, data: bytes, *, migration: bool = False) -> Message:
        config = ConfigSpace(offset, len(data), int(migration), data)
        return self.request(Request.SET_CONFIG, config)

    def get_inflight_fd(self, num_queues: int, queue_size: int) -> Message:
        asked = InflightDescription(0, 0, num_queues, queue_size)
        return self.request(Request.GET_INFLIGHT_FD, asked)

    def set_inflight_fd(self, description: InflightDescription, fd: int) -> Message:
        return self.request(Request.SET_INFLIGHT_FD, description, (fd,))

    def set_status(self, status: int) -> Message:
        return self.request(Request.SET_STATUS, U64(status))

    def get_status(self) -> Message:
        return self.request(Request.GET_STATUS)

    def set_device_state_fd(self, fd: int, *, load: bool) -> Message:
        transfer = DeviceStateTransfer(int(load), 0)
        return self.request(Request.SET_DEVICE_STATE_FD, transfer, (fd,), need_reply=False)

    def check_device_state(self) -> Message:
        return self.request(Request.CHECK_DEVICE_STATE, need_reply=False)

    # ------------------------------------------------------------------ checks

    def _check(self, message: Message) -> None:
        row = FRONTEND_TABLE.get(message.request)
        if row is None:
            raise StateError(f"{message.name()} has no row in the table")
        try:
            row.check_syntax(message)
        except PeerError as error:
            raise StateError(str(error)) from error
        if row.feature & ~(self.protocol_features | self.protocol_offered):
            raise StateError(f"{message.name()} needs {row.feature.name}")

    @staticmethod
    def _check_config(asked: Message, payload: Payload) -> None:
        wanted = asked.payload
        assert isinstance(wanted, ConfigSpace)
        if isinstance(payload, Empty):
            raise PeerError(f"{asked.name()} was refused")
        assert isinstance(payload, ConfigSpace)
        # vhost-user, GET_CONFIG: the size of the reply's payload must match the request's.
        if (payload.offset, len(payload.data)) != (wanted.offset, wanted.size):
            raise SessionError(
                f"GET_CONFIG: {wanted.size} bytes at {wanted.offset} were asked,"
                f" {len(payload.data)} at {payload.offset} came"
            )

    def _learn(self, asked: Message, payload: Payload) -> None:
        if isinstance(payload, U64):
            if asked.request == Request.GET_FEATURES:
                self.features_offered = payload.value
            elif asked.request == Request.GET_PROTOCOL_FEATURES:
                self.protocol_offered = ProtocolFeature(payload.value)
