"""The back-end's side of a vhost-user session: message in, actions out, reply when they are done.

vhost-user, "Communication", "Ring states", "Protocol features", "Front-end message types".

Theory of operation. The caller hands over one message, performs the actions in order, whether or
not an earlier one failed, and reports with `complete`, which gives the reply to send, if any:

    for action in session.receive(message):
        result = perform(action)
    reply = session.complete(result)                  # or complete(error=...)

Messages are handled strictly one after the other, so replies go out in order however long an action
takes. Each message is first checked against its row of `message.FRONTEND_TABLE` (payload, fds,
negotiated feature, state of its ring); only then does its handler, one small method, run.

A message that is refused here changes nothing. The front-end is told if it asked to be
(REPLY_ACK), or by GET_CONFIG's empty reply. Where the protocol has no way to tell, `complete`
raises `SessionError`, because a front-end that believes in a refused message must not go on.

File descriptors: every one received is either lent, or given away once. The session owns the fds
it receives until it gives them up, and it does that in two ways only: in a `CloseFds`, which comes
after the action that ends their use, or in `SetBackendChannel`. All other actions lend.

Memory regions pass through; only `mem_table` knows whether they overlap or can be mapped. Whether a
ring lies in memory is found out by who starts it. This module knows nothing about sockets, mappings
or what the device is, except for which bytes of its configuration space are writable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vhostblk.errors import PeerError, SessionError, StateError
from vhostblk.vhost.action import (
    Action,
    AddRegion,
    CloseFds,
    ForgetInflight,
    MapMemory,
    RemoveRegion,
    ResetDevice,
    SetBackendChannel,
    SetFeatures,
)
from vhostblk.vhost.backend_messages import BackendMessages
from vhostblk.vhost.config_access import ConfigAccess
from vhostblk.vhost.device_messages import DeviceMessages
from vhostblk.vhost.exchange import Exchange
from vhostblk.vhost.log_state import LogState
from vhostblk.vhost.message import (
    FRONTEND_TABLE,
    U64,
    LogArea,
    MemoryTable,
    Message,
    Payload,
    ProtocolFeature,
    Request,
    Ring,
    Row,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
)
from vhostblk.vhost.negotiation import PROTOCOL_FEATURES, Negotiation
from vhostblk.vhost.ring_messages import RingMessages
from vhostblk.vhost.ring_states import RingStates, close_fds
from vhostblk.vhost.vring import Vring

__all__ = ["MAX_MEM_SLOTS", "MAX_QUEUES", "PROTOCOL_FEATURES", "Session"]

MAX_MEM_SLOTS = 509
"""What GET_MAX_MEM_SLOTS answers unless told otherwise.

A VMM refuses to plug memory into a guest once any vhost device is out of slots, and one virtio-mem
device of QEMU's may use 256 of them. 509 is what KVM had when slots were scarce there, and what
QEMU's own back-ends answer. A slot costs us one mapping, and an fd before Python 3.13.
"""

MAX_QUEUES = 256
"""SET_VRING_KICK and its sisters have eight bits for the index."""


class Session:
    """The state machine of one connection.

    Args:
        device_features: VIRTIO feature bits on offer; bit 30 is added here.
        num_queues: vrings, 1 to 256.
        config_size: bytes of configuration space that can be read.
        writable_config: bytes of it that the driver may write.
        max_mem_slots: what GET_MAX_MEM_SLOTS answers.
        protocol_features: a subset of `PROTOCOL_FEATURES`.

    Raises:
        ValueError: `num_queues` or `protocol_features` is impossible.

    Context: the control loop.
    Owns: the vrings' fds, and those of a message until they are given up.
    """

    def __init__(
        self,
        *,
        device_features: int,
        num_queues: int,
        config_size: int,
        writable_config: range = range(0),
        max_mem_slots: int = MAX_MEM_SLOTS,
        protocol_features: ProtocolFeature = PROTOCOL_FEATURES,
    ) -> None:
        if not 1 <= num_queues <= MAX_QUEUES:
            raise ValueError(f"{num_queues} vrings: 1 to {MAX_QUEUES} are possible")
        self._agreed = Negotiation(device_features, protocol_features)
        self._own = BackendMessages()
        self._exchange: Exchange | None = None
        self._is_over = False
        self._rings = RingStates(num_queues)
        self._log = LogState()
        config = ConfigAccess(config_size, writable_config)
        self._device = DeviceMessages(
            self._reply_with, self._agreed, self._rings, self._log, config
        )
        self._ring_messages = RingMessages(
            self._current, self._agreed, self._rings, self._log, self._device.status
        )
        self._constants: Mapping[int, int] = {
            Request.GET_FEATURES: self._agreed.offered,
            Request.GET_PROTOCOL_FEATURES: int(protocol_features),
            Request.GET_QUEUE_NUM: num_queues,
            Request.GET_MAX_MEM_SLOTS: max_mem_slots,
        }
        self.vrings = self._rings.vrings
        """The control copies, by index; to look at, not to change."""

    @property
    def features(self) -> int:
        """VIRTIO features acknowledged, without bit 30."""
        return self._agreed.features

    @property
    def protocol_features(self) -> ProtocolFeature:
        """Protocol features negotiated."""
        return self._agreed.protocol

    @property
    def refusal(self) -> PeerError | None:
        """Why the message being handled is refused, for the log; None if it is not."""
        return self._exchange.refusal if self._exchange else None

    def receive(self, message: Message) -> tuple[Action, ...]:
        """Take the next message.

        Returns:
            What to do, in this order; then call `complete`, also if there is nothing to do.

        Raises:
            StateError: the message before is not complete, or the session is over.
        """
        if self._is_over:
            raise StateError("the session is over")
        if self._exchange is not None:
            raise StateError(f"{self._exchange.message.name()} is not complete")
        self._exchange = Exchange(message)
        try:
            row = self._check(message)
            return _HANDLERS[Request(row.request)](self, message)
        except PeerError as error:
            self._exchange.refusal = error
            return close_fds(message.fds)

    def complete(
        self, result: int | bytes | None = None, *, error: PeerError | None = None
    ) -> Message | None:
        """Report that all actions of the message are done.

        Args:
            result: StopVring's base or ReadConfig's bytes.
            error: why an action failed, if one did; the message is then refused.

        Returns:
            The reply to send, or None.

        Raises:
            SessionError: the message was refused, and the front-end cannot be told otherwise.
            StateError: no message is being handled.
        """
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            raise StateError("no message to complete")
        acks = self._agreed.has(ProtocolFeature.REPLY_ACK)
        error = error or exchange.refusal
        if error is not None:
            try:
                return exchange.refuse(error, acks=acks)
            except SessionError:
                self._is_over = True
                raise
        if exchange.starting is not None:
            exchange.starting.is_started = True
        return exchange.answer(result, acks=acks)

    def vring_stopped(self, index: int, base: int) -> None:
        """Note where a StopVring has stopped: QEMU says SET_STATUS 0 first, and then asks for the base."""
        self.vrings[index].set_base(base, packed=True)

    def config_changed(self) -> None:
        """Note that the configuration space has changed; `take_backend_message` says the rest."""
        self._own.config_changed()

    def vring_broke(self, index: int) -> None:
        """Note that a queue is broken: the device needs a reset until it is stopped."""
        self._device.status.broke(index)

    def take_backend_message(self) -> Message | None:
        """Give the message that is due on the back-end channel, if one is due and allowed now.

        Ask after `config_changed` and after each `complete`.
        """
        return self._own.take(self._agreed, is_running=self._rings.any_started)

    def close(self) -> tuple[Action, ...]:
        """End the session, as after a disconnect, also while a message is being handled.

        Returns:
            StopVring for each ring that is, or may be, started (results are not reported), then
            CloseFds. If a message was being handled, those of its actions that were not performed
            yet are still the caller's to perform: its CloseFds at least.
        """
        self._is_over = True
        exchange, self._exchange = self._exchange, None
        if exchange is not None and exchange.starting is not None:
            exchange.starting.is_started = True
        return self._rings.close() + self._log.set_fd(None)

    # ------------------------------------------------------------------ the columns of the table

    def _check(self, message: Message) -> Row:
        if message.is_reply:
            raise SessionError(f"{message.name()}: a reply where a request belongs")
        row = FRONTEND_TABLE.get(message.request)
        if row is None:
            raise PeerError(f"{message.name()} is not supported")
        row.check_syntax(message)
        self._agreed.check(row)
        if row.ring is not Ring.NONE:
            vring = self._vring(message.payload)
            if row.ring is Ring.STOPPED and vring.is_started:
                raise PeerError(f"{message.name()}: vring {vring.index} is started")
        return row

    def _vring(self, payload: Payload) -> Vring:
        assert isinstance(payload, VringState | VringAddress | VringFile)
        return self._rings.find(payload.index)

    # ------------------------------------------------------------------ handlers

    def _get_constant(self, message: Message) -> tuple[Action, ...]:
        value = self._constants[message.request]
        self._reply_with(lambda _: U64(value))
        return ()

    def _set_features(self, message: Message) -> tuple[Action, ...]:
        self._agreed.set_features(_u64(message), is_running=self._rings.any_started)
        actions = (SetFeatures(self.features), *self._log.set_enabled(self._agreed.logs))
        if not self._agreed.has_protocol_bit:
            # "Ring states": without F_PROTOCOL_FEATURES all rings are enabled immediately.
            actions += self._rings.enable(self.vrings, True)
        return actions

    def _set_protocol_features(self, message: Message) -> tuple[Action, ...]:
        # In force at once: this very message is acknowledged if it asks to be.
        self._agreed.set_protocol(_u64(message))
        return ()

    def _set_owner(self, message: Message) -> tuple[Action, ...]:
        return ()

    def _reset_owner(self, message: Message) -> tuple[Action, ...]:
        # Deprecated: "either ignore this message, or use it to disable all rings".
        return self._rings.enable(self.vrings, False)

    def _reset_device(self, message: Message) -> tuple[Action, ...]:
        # Memory, the channel, the protocol features and the call and error fds stay: QEMU sends
        # them once per connection, not once per reset.
        versions = self._ring_messages.inflight.versions(packed=self._agreed.is_packed)
        self._agreed.reset()
        self._device.status.reset()
        reset = (ResetDevice(), *self._rings.reset(), *self._log.set_enabled(False))
        return (*reset, ForgetInflight(versions)) if versions else reset

    def _set_mem_table(self, message: Message) -> tuple[Action, ...]:
        assert isinstance(message.payload, MemoryTable)
        regions = message.payload.regions
        if len(regions) != len(message.fds):
            raise PeerError(f"SET_MEM_TABLE: {len(regions)} regions, {len(message.fds)} fds")
        return (MapMemory(regions, message.fds), CloseFds(message.fds))

    def _add_mem_reg(self, message: Message) -> tuple[Action, ...]:
        assert isinstance(message.payload, SingleRegion)
        return (AddRegion(message.payload.region, message.fds[0]), CloseFds(message.fds))

    def _rem_mem_reg(self, message: Message) -> tuple[Action, ...]:
        assert isinstance(message.payload, SingleRegion)
        return (RemoveRegion(message.payload.region), *close_fds(message.fds))

    def _set_log_base(self, message: Message) -> tuple[Action, ...]:
        assert isinstance(message.payload, LogArea)
        self._reply_with(lambda _: U64(0))  # there is no way to refuse it
        return self._log.set_area(message.payload, message.fds)

    def _set_log_fd(self, message: Message) -> tuple[Action, ...]:
        return self._log.set_fd(message.fds[0])

    def _set_backend_req_fd(self, message: Message) -> tuple[Action, ...]:
        self._own.has_channel = True
        return (SetBackendChannel(message.fds[0]),)

    def _current(self) -> Exchange:
        assert self._exchange is not None
        return self._exchange

    def _reply_with(self, payload: Callable[[Any], Payload]) -> None:
        self._current().own_reply = payload


def _u64(message: Message) -> int:
    assert isinstance(message.payload, U64)
    return message.payload.value


# Every row of FRONTEND_TABLE has its handler here; a test compares the two.
_HANDLERS: Mapping[Request, Callable[[Session, Message], tuple[Action, ...]]] = {
    Request.GET_FEATURES: Session._get_constant,
    Request.SET_FEATURES: Session._set_features,
    Request.GET_PROTOCOL_FEATURES: Session._get_constant,
    Request.SET_PROTOCOL_FEATURES: Session._set_protocol_features,
    Request.SET_OWNER: Session._set_owner,
    Request.RESET_OWNER: Session._reset_owner,
    Request.RESET_DEVICE: Session._reset_device,
    Request.SET_MEM_TABLE: Session._set_mem_table,
    Request.GET_MAX_MEM_SLOTS: Session._get_constant,
    Request.ADD_MEM_REG: Session._add_mem_reg,
    Request.REM_MEM_REG: Session._rem_mem_reg,
    Request.SET_LOG_BASE: Session._set_log_base,
    Request.SET_LOG_FD: Session._set_log_fd,
    Request.SET_VRING_NUM: lambda session, message: session._ring_messages.set_num(message),
    Request.SET_VRING_BASE: lambda session, message: session._ring_messages.set_base(message),
    Request.SET_VRING_ADDR: lambda session, message: session._ring_messages.set_addresses(message),
    Request.GET_VRING_BASE: lambda session, message: session._ring_messages.get_base(message),
    Request.GET_VRING_BASE_SKIP_DRAIN: lambda session, message: session._ring_messages.get_base(
        message
    ),
    Request.SET_VRING_KICK: lambda session, message: session._ring_messages.set_kick(message),
    Request.SET_VRING_CALL: lambda session, message: session._ring_messages.set_call_or_err(
        message
    ),
    Request.SET_VRING_ERR: lambda session, message: session._ring_messages.set_call_or_err(message),
    Request.SET_VRING_ENABLE: lambda session, message: session._ring_messages.set_enabled(message),
    Request.GET_QUEUE_NUM: Session._get_constant,
    Request.SET_BACKEND_REQ_FD: Session._set_backend_req_fd,
    Request.GET_CONFIG: lambda session, message: session._device.get_config(message),
    Request.SET_CONFIG: lambda session, message: session._device.set_config(message),
    Request.GET_INFLIGHT_FD: lambda session, message: session._ring_messages.get_inflight_fd(
        message
    ),
    Request.SET_INFLIGHT_FD: lambda session, message: session._ring_messages.set_inflight_fd(
        message
    ),
    Request.SET_STATUS: lambda session, message: session._device.set_status(message),
    Request.GET_STATUS: lambda session, message: session._device.get_status(message),
    Request.SET_DEVICE_STATE_FD: lambda session, message: session._device.set_device_state_fd(
        message
    ),
    Request.CHECK_DEVICE_STATE: lambda session, message: session._device.check_device_state(
        message
    ),
}
