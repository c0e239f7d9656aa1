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

A message that is refused changes nothing. The front-end is told if it asked to be (REPLY_ACK), or
by GET_CONFIG's empty reply. Where the protocol has no way to tell, `complete` raises
`SessionError`, because a front-end that believes in a refused message must not go on.

File descriptors: every one received is either lent, or given away once. The session owns the fds
it receives until it gives them up, and it does that in two ways only: in a `CloseFds`, which comes
after the action that ends their use, or in `SetBackendChannel`. All other actions lend.

Memory regions pass through; only `mem_table` knows whether they overlap or can be mapped. Whether a
ring lies in memory is found out by who starts it. This module knows nothing about sockets, mappings
or what the device is, except for which bytes of its configuration space are writable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vhostblk.errors import PeerError, SessionError, StateError
from vhostblk.vhost.action import (
    Action,
    AddRegion,
    CloseFds,
    EnableVring,
    MapMemory,
    ReadConfig,
    RemoveRegion,
    ResetDevice,
    SetBackendChannel,
    SetFeatures,
    SetVringFd,
    StartVring,
    StopVring,
    WriteConfig,
)
from vhostblk.vhost.message import (
    FRONTEND_TABLE,
    U64,
    BackendRequest,
    ConfigSpace,
    Empty,
    Gate,
    Malformed,
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
from vhostblk.vhost.vring import Vring, VringFd
from vhostblk.virtio.features import Feature, feature_names

__all__ = [
    "MAX_MEM_SLOTS",
    "MAX_QUEUES",
    "PROTOCOL_FEATURES",
    "Action",
    "AddRegion",
    "CloseFds",
    "EnableVring",
    "MapMemory",
    "ReadConfig",
    "RemoveRegion",
    "ResetDevice",
    "Session",
    "SetBackendChannel",
    "SetFeatures",
    "SetVringFd",
    "StartVring",
    "StopVring",
    "WriteConfig",
]

PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)
"""What this session can serve."""

MAX_MEM_SLOTS = 509
"""What GET_MAX_MEM_SLOTS answers unless told otherwise.

A VMM refuses to plug memory into a guest once any vhost device is out of slots, and one virtio-mem
device of QEMU's may use 256 of them. 509 is what KVM had when slots were scarce there, and what
QEMU's own back-ends answer. A slot costs us one mapping, and an fd before Python 3.13.
"""

MAX_QUEUES = 256
"""SET_VRING_KICK and its sisters have eight bits for the index."""

_PROTOCOL_BIT = int(Feature.VHOST_USER_F_PROTOCOL_FEATURES)
# QEMU passes on whatever the guest has acknowledged, and for this bit it never asks the back-end:
# guests that use the legacy interface may set it. It promises nothing that any framing does not.
_HARMLESS_FEATURES = int(Feature.VIRTIO_F_ANY_LAYOUT)

_MIGRATION = 1  # SET_CONFIG flag: the front-end restores a migrated configuration


@dataclass
class _Pending:
    """The message whose actions are being performed."""

    message: Message
    own_reply: Callable[[Any], Payload] | None = None
    starting: Vring | None = None
    refusal: PeerError | None = None


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
        if protocol_features & ~PROTOCOL_FEATURES:
            raise ValueError(f"protocol features {protocol_features!r} are not all served")
        self._offered = device_features | _PROTOCOL_BIT
        self._offered_protocol = protocol_features
        self._config_size = config_size
        self._writable_config = writable_config
        self._max_mem_slots = max_mem_slots
        self._acked = 0
        self._protocol = ProtocolFeature.NONE
        self._has_channel = False
        self._config_change_due = False
        self._pending: _Pending | None = None
        self._is_over = False
        self.vrings = tuple(Vring(index) for index in range(num_queues))
        """The control copies, by index; to look at, not to change."""

    @property
    def features(self) -> int:
        """VIRTIO features acknowledged, without bit 30."""
        return self._acked & ~_PROTOCOL_BIT

    @property
    def protocol_features(self) -> ProtocolFeature:
        """Protocol features negotiated."""
        return self._protocol

    @property
    def refusal(self) -> PeerError | None:
        """Why the message being handled is refused, for the log; None if it is not."""
        return self._pending.refusal if self._pending else None

    def receive(self, message: Message) -> tuple[Action, ...]:
        """Take the next message.

        Returns:
            What to do, in this order; then call `complete`, also if there is nothing to do.

        Raises:
            StateError: the message before is not complete, or the session is over.
        """
        if self._is_over:
            raise StateError("the session is over")
        if self._pending is not None:
            raise StateError(f"{self._pending.message.name()} is not complete")
        self._pending = _Pending(message)
        try:
            row = self._check(message)
            return _HANDLERS[Request(row.request)](self, message)
        except PeerError as error:
            self._pending.refusal = error
            return _close(message.fds)

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
        pending, self._pending = self._pending, None
        if pending is None:
            raise StateError("no message to complete")
        message = pending.message
        error = error or pending.refusal
        if isinstance(error, SessionError):
            self._is_over = True
            raise error
        if error is not None:
            return self._refuse(message, error)
        if pending.starting is not None:
            pending.starting.is_started = True
        if pending.own_reply is not None:
            return message.reply(pending.own_reply(result))
        # vhost-user, "REPLY_ACK": messages that have a reply of their own get no other.
        if self._wants_ack(message):
            return message.reply(U64(0))
        return None

    def config_changed(self) -> Message | None:
        """Note that the configuration space has changed; the rest is `take_backend_message`."""
        self._config_change_due = True
        return self.take_backend_message()

    def take_backend_message(self) -> Message | None:
        """Give the message that is due on the back-end channel, if one is due and allowed now.

        vhost-user, "Suspended device state": nothing is sent while all vrings are stopped. QEMU
        drops such messages too; so a change is kept until a ring runs: ask after each `complete`.
        """
        wanted = ProtocolFeature.CONFIG | ProtocolFeature.BACKEND_REQ
        if (
            not self._config_change_due
            or not self._has_channel
            or self._protocol & wanted != wanted
            or not any(vring.is_started for vring in self.vrings)
        ):
            return None
        self._config_change_due = False
        return Message(BackendRequest.CONFIG_CHANGE_MSG)

    def close(self) -> tuple[Action, ...]:
        """End the session, as after a disconnect, also while a message is being handled.

        Returns:
            StopVring for each started ring (results are not reported), then CloseFds. If a message
            was being handled, its actions that were not performed yet are still the caller's to
            perform, or its CloseFds at least.
        """
        self._is_over = True
        self._pending = None
        started = tuple(StopVring(v.index) for v in self.vrings if v.is_started)
        for vring in self.vrings:
            vring.is_started = False
        return started + _close(fd for vring in self.vrings for fd in vring.close())

    # ------------------------------------------------------------------ the columns of the table

    def _check(self, message: Message) -> Row:
        if message.is_reply:
            raise SessionError(f"{message.name()}: a reply where a request belongs")
        row = FRONTEND_TABLE.get(message.request)
        if row is None:
            raise PeerError(f"{message.name()} is not supported")
        name, payload = message.name(), message.payload
        if not isinstance(payload, row.payload):
            reason = payload.reason if isinstance(payload, Malformed) else "wrong payload"
            raise PeerError(f"{name}: {reason}")
        fewest, most = row.fds
        if not fewest <= len(message.fds) <= most:
            wanted = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            raise PeerError(f"{name}: {len(message.fds)} fds where {wanted} belong")
        available = self._protocol if row.gate is Gate.NEGOTIATED else self._offered_protocol
        if row.feature & ~available:
            raise PeerError(f"{name}: {row.feature.name} is not {row.gate.name.lower()}")
        if row.ring is not Ring.NONE:
            vring = self._vring(payload)
            if row.ring is Ring.STOPPED and vring.is_started:
                raise PeerError(f"{name}: vring {vring.index} is started")
        return row

    def _vring(self, payload: Payload) -> Vring:
        assert isinstance(payload, VringState | VringAddress | VringFile)
        if payload.index >= len(self.vrings):
            raise PeerError(f"vring {payload.index} of {len(self.vrings)}")
        return self.vrings[payload.index]

    # ------------------------------------------------------------------ replies

    def _wants_ack(self, message: Message) -> bool:
        return message.needs_reply and bool(self._protocol & ProtocolFeature.REPLY_ACK)

    def _refuse(self, message: Message, error: PeerError) -> Message:
        row = FRONTEND_TABLE.get(message.request)
        if row is not None and row.reply is ConfigSpace:
            return message.reply(Empty())
        # A non-zero u64 in the place of another reply would be taken for that reply.
        if (row is None or row.reply is None) and self._wants_ack(message):
            return message.reply(U64(1))
        self._is_over = True
        raise SessionError(str(error)) from error

    def _reply_with(self, payload: Callable[[Any], Payload]) -> None:
        assert self._pending is not None
        self._pending.own_reply = payload

    # ------------------------------------------------------------------ handlers, one per row

    def _get_features(self, message: Message) -> tuple[Action, ...]:
        self._reply_with(lambda _: U64(self._offered))
        return ()

    def _set_features(self, message: Message) -> tuple[Action, ...]:
        features = _u64(message)
        unknown = features & ~(self._offered | _HARMLESS_FEATURES)
        if unknown:
            raise PeerError(f"SET_FEATURES: not offered: {feature_names(unknown)}")
        features &= self._offered
        if (features ^ self._acked) & ~_PROTOCOL_BIT and any(v.is_started for v in self.vrings):
            raise PeerError("SET_FEATURES: other features while a vring is started")
        self._acked = features
        actions: tuple[Action, ...] = (SetFeatures(self.features),)
        if not features & _PROTOCOL_BIT:
            # "Ring states": without F_PROTOCOL_FEATURES all rings are enabled immediately.
            actions += self._enable(self.vrings, True)
        return actions

    def _get_protocol_features(self, message: Message) -> tuple[Action, ...]:
        self._reply_with(lambda _: U64(int(self._offered_protocol)))
        return ()

    def _set_protocol_features(self, message: Message) -> tuple[Action, ...]:
        features = _u64(message)
        unknown = features & ~int(self._offered_protocol)
        if unknown:
            raise PeerError(f"SET_PROTOCOL_FEATURES: not offered: {unknown:#x}")
        # From here on: this very message is acknowledged if it asks to be.
        self._protocol = ProtocolFeature(features)
        return ()

    def _set_owner(self, message: Message) -> tuple[Action, ...]:
        return ()

    def _reset_owner(self, message: Message) -> tuple[Action, ...]:
        # Deprecated: "either ignore this message, or use it to disable all rings".
        return self._enable(self.vrings, False)

    def _reset_device(self, message: Message) -> tuple[Action, ...]:
        # Memory, the channel, the protocol features and the call and error fds stay: QEMU sends
        # them once per connection, not once per reset.
        kicks = [vring.set_fd(VringFd.KICK, None) for vring in self.vrings]
        for vring in self.vrings:
            vring.forget()
        self._acked = 0
        return (ResetDevice(), *_close(kicks))

    def _set_mem_table(self, message: Message) -> tuple[Action, ...]:
        assert isinstance(message.payload, MemoryTable)
        regions = message.payload.regions
        if len(regions) != len(message.fds) or not regions:
            raise PeerError(f"SET_MEM_TABLE: {len(regions)} regions, {len(message.fds)} fds")
        return (MapMemory(regions, message.fds), CloseFds(message.fds))

    def _get_max_mem_slots(self, message: Message) -> tuple[Action, ...]:
        self._reply_with(lambda _: U64(self._max_mem_slots))
        return ()

    def _add_mem_reg(self, message: Message) -> tuple[Action, ...]:
        assert isinstance(message.payload, SingleRegion)
        return (AddRegion(message.payload.region, message.fds[0]), CloseFds(message.fds))

    def _rem_mem_reg(self, message: Message) -> tuple[Action, ...]:
        assert isinstance(message.payload, SingleRegion)
        return (RemoveRegion(message.payload.region), *_close(message.fds))

    def _set_vring_num(self, message: Message) -> tuple[Action, ...]:
        vring, num = self._vring_state(message)
        vring.set_size(num)
        return ()

    def _set_vring_base(self, message: Message) -> tuple[Action, ...]:
        vring, num = self._vring_state(message)
        vring.set_base(num)
        return ()

    def _set_vring_addr(self, message: Message) -> tuple[Action, ...]:
        address = message.payload
        assert isinstance(address, VringAddress)
        if address.flags:
            # Bit 0 is VHOST_VRING_F_LOG, which LOG_ALL would have to permit.
            raise PeerError(f"SET_VRING_ADDR: flags {address.flags:#x}")
        self._vring(address).set_addresses(address.desc, address.avail, address.used)
        return ()

    def _get_vring_base(self, message: Message) -> tuple[Action, ...]:
        vring, _ = self._vring_state(message)
        if not vring.is_started:
            self._reply_with(lambda _: VringState(vring.index, vring.base))
            return ()

        def stopped(base: int) -> Payload:
            vring.base = base
            return VringState(vring.index, base)

        self._reply_with(stopped)
        vring.is_started = False
        # The call and error fds stay: QEMU sends the error fd once per connection.
        return (StopVring(vring.index), *_close([vring.set_fd(VringFd.KICK, None)]))

    def _set_vring_kick(self, message: Message) -> tuple[Action, ...]:
        # "Ring states": SET_VRING_KICK starts the ring; older texts had the first kick do so.
        vring = self._vring(message.payload)
        if vring.is_started:
            return self._set_vring_fd(message, VringFd.KICK)
        vring.check_ready()
        closing = self._set_vring_fd(message, VringFd.KICK)
        assert self._pending is not None
        self._pending.starting = vring
        return (StartVring(vring.index, vring.snapshot()), *closing)

    def _set_vring_call(self, message: Message) -> tuple[Action, ...]:
        return self._set_vring_fd(message, VringFd.CALL)

    def _set_vring_err(self, message: Message) -> tuple[Action, ...]:
        return self._set_vring_fd(message, VringFd.ERR)

    def _set_vring_fd(self, message: Message, which: VringFd) -> tuple[Action, ...]:
        payload = message.payload
        assert isinstance(payload, VringFile)
        if payload.has_fd != bool(message.fds):
            raise PeerError(f"{message.name()}: bit 8 and the fds disagree")
        vring = self._vring(payload)
        fd = message.fds[0] if message.fds else None
        closing = _close([vring.set_fd(which, fd)])
        if not vring.is_started:
            return closing
        return (SetVringFd(vring.index, which, fd), *closing)

    def _set_vring_enable(self, message: Message) -> tuple[Action, ...]:
        vring, num = self._vring_state(message)
        if num > 1:
            raise PeerError(f"SET_VRING_ENABLE: {num} is neither 0 nor 1")
        return self._enable((vring,), bool(num))

    def _enable(self, vrings: Iterable[Vring], enabled: bool) -> tuple[Action, ...]:
        actions = []
        for vring in vrings:
            if vring.is_started and vring.is_enabled != enabled:
                actions.append(EnableVring(vring.index, enabled))
            vring.is_enabled = enabled
        return tuple(actions)

    def _get_queue_num(self, message: Message) -> tuple[Action, ...]:
        self._reply_with(lambda _: U64(len(self.vrings)))
        return ()

    def _set_backend_req_fd(self, message: Message) -> tuple[Action, ...]:
        self._has_channel = True
        return (SetBackendChannel(message.fds[0]),)

    def _get_config(self, message: Message) -> tuple[Action, ...]:
        config = self._config(message)
        # The payload of the reply has the size that was asked: initiators check it.
        self._reply_with(
            lambda data: ConfigSpace(config.offset, config.size, config.flags, bytes(data))
        )
        return (ReadConfig(config.offset, config.size),)

    def _set_config(self, message: Message) -> tuple[Action, ...]:
        config = self._config(message)
        if not config.data:
            raise PeerError("SET_CONFIG without data")
        if config.flags not in (0, _MIGRATION):
            raise PeerError(f"SET_CONFIG: flags {config.flags:#x}")
        end = config.offset + config.size
        writable = self._writable_config
        if not config.flags and not writable.start <= config.offset <= end <= writable.stop:
            raise PeerError(f"SET_CONFIG: bytes {config.offset} to {end - 1} are read-only")
        return (WriteConfig(config.offset, config.data, config.flags == _MIGRATION),)

    def _config(self, message: Message) -> ConfigSpace:
        config = message.payload
        assert isinstance(config, ConfigSpace)
        if config.offset + config.size > self._config_size:
            raise PeerError(
                f"{message.name()}: {config.size} bytes at {config.offset}, there are"
                f" {self._config_size}"
            )
        return config

    def _vring_state(self, message: Message) -> tuple[Vring, int]:
        assert isinstance(message.payload, VringState)
        return self._vring(message.payload), message.payload.num


def _close(fds: Iterable[int | None]) -> tuple[CloseFds, ...]:
    closing = tuple(fd for fd in fds if fd is not None)
    return (CloseFds(closing),) if closing else ()


def _u64(message: Message) -> int:
    assert isinstance(message.payload, U64)
    return message.payload.value


_HANDLERS: Mapping[Request, Callable[[Session, Message], tuple[Action, ...]]] = {
    Request.GET_FEATURES: Session._get_features,
    Request.SET_FEATURES: Session._set_features,
    Request.GET_PROTOCOL_FEATURES: Session._get_protocol_features,
    Request.SET_PROTOCOL_FEATURES: Session._set_protocol_features,
    Request.SET_OWNER: Session._set_owner,
    Request.RESET_OWNER: Session._reset_owner,
    Request.RESET_DEVICE: Session._reset_device,
    Request.SET_MEM_TABLE: Session._set_mem_table,
    Request.GET_MAX_MEM_SLOTS: Session._get_max_mem_slots,
    Request.ADD_MEM_REG: Session._add_mem_reg,
    Request.REM_MEM_REG: Session._rem_mem_reg,
    Request.SET_VRING_NUM: Session._set_vring_num,
    Request.SET_VRING_BASE: Session._set_vring_base,
    Request.SET_VRING_ADDR: Session._set_vring_addr,
    Request.GET_VRING_BASE: Session._get_vring_base,
    Request.SET_VRING_KICK: Session._set_vring_kick,
    Request.SET_VRING_CALL: Session._set_vring_call,
    Request.SET_VRING_ERR: Session._set_vring_err,
    Request.SET_VRING_ENABLE: Session._set_vring_enable,
    Request.GET_QUEUE_NUM: Session._get_queue_num,
    Request.SET_BACKEND_REQ_FD: Session._set_backend_req_fd,
    Request.GET_CONFIG: Session._get_config,
    Request.SET_CONFIG: Session._set_config,
}
