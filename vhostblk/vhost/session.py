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
    MapMemory,
    ReadConfig,
    RemoveRegion,
    ResetDevice,
    SetBackendChannel,
    SetFeatures,
    WriteConfig,
)
from vhostblk.vhost.exchange import Exchange
from vhostblk.vhost.message import (
    FRONTEND_TABLE,
    U64,
    BackendRequest,
    ConfigSpace,
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
from vhostblk.vhost.ring_states import RingStates, close_fds
from vhostblk.vhost.vring import Vring, VringFd

__all__ = ["MAX_MEM_SLOTS", "MAX_QUEUES", "PROTOCOL_FEATURES", "Session"]

MAX_MEM_SLOTS = 509
"""What GET_MAX_MEM_SLOTS answers unless told otherwise.

A VMM refuses to plug memory into a guest once any vhost device is out of slots, and one virtio-mem
device of QEMU's may use 256 of them. 509 is what KVM had when slots were scarce there, and what
QEMU's own back-ends answer. A slot costs us one mapping, and an fd before Python 3.13.
"""

MAX_QUEUES = 256
"""SET_VRING_KICK and its sisters have eight bits for the index."""

_MIGRATION = 1  # SET_CONFIG flag: the front-end restores a migrated configuration


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
        self._config_size = config_size
        self._writable_config = writable_config
        self._has_channel = False
        self._config_change_due = False
        self._exchange: Exchange | None = None
        self._is_over = False
        self._rings = RingStates(num_queues)
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

    def config_changed(self) -> None:
        """Note that the configuration space has changed; `take_backend_message` says the rest."""
        self._config_change_due = True

    def take_backend_message(self) -> Message | None:
        """Give the message that is due on the back-end channel, if one is due and allowed now.

        vhost-user, "Suspended device state": nothing is sent while all vrings are stopped. QEMU
        drops such messages too; so a change is kept until a ring runs. Ask after
        `config_changed` and after each `complete`.
        """
        may_tell = self._agreed.has(ProtocolFeature.CONFIG | ProtocolFeature.BACKEND_REQ)
        if not (may_tell and self._has_channel and self._rings.any_started):
            return None
        is_due, self._config_change_due = self._config_change_due, False
        return Message(BackendRequest.CONFIG_CHANGE_MSG) if is_due else None

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
        return self._rings.close()

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
        actions: tuple[Action, ...] = (SetFeatures(self.features),)
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
        self._agreed.reset()
        return (ResetDevice(), *self._rings.reset())

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
            # Bit 0 is VHOST_VRING_F_LOG, which only LOG_ALL would permit.
            raise PeerError(f"SET_VRING_ADDR: flags {address.flags:#x}")
        self._vring(address).set_addresses(address.desc, address.avail, address.used)
        return ()

    def _get_vring_base(self, message: Message) -> tuple[Action, ...]:
        vring, _ = self._vring_state(message)
        if not vring.is_started:
            self._reply_with(lambda _: VringState(vring.index, vring.base))
            return ()

        def stopped(base: int) -> Payload:
            vring.is_started = False
            vring.base = base
            return VringState(vring.index, base)

        self._reply_with(stopped)
        return self._rings.stop(vring)

    def _set_vring_kick(self, message: Message) -> tuple[Action, ...]:
        # "Ring states": SET_VRING_KICK starts the ring; older texts had the first kick do so.
        vring, fd = self._vring_fd(message)
        if vring.is_started:
            return self._rings.set_fd(vring, VringFd.KICK, fd)
        actions = self._rings.start(vring, fd)
        assert self._exchange is not None
        self._exchange.starting = vring
        return actions

    def _set_vring_call_or_err(self, message: Message) -> tuple[Action, ...]:
        vring, fd = self._vring_fd(message)
        is_call = message.request == Request.SET_VRING_CALL
        return self._rings.set_fd(vring, VringFd.CALL if is_call else VringFd.ERR, fd)

    def _set_vring_enable(self, message: Message) -> tuple[Action, ...]:
        vring, num = self._vring_state(message)
        if num > 1:
            raise PeerError(f"SET_VRING_ENABLE: {num} is neither 0 nor 1")
        return self._rings.enable((vring,), bool(num))

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

    def _reply_with(self, payload: Callable[[Any], Payload]) -> None:
        assert self._exchange is not None
        self._exchange.own_reply = payload

    def _vring_state(self, message: Message) -> tuple[Vring, int]:
        assert isinstance(message.payload, VringState)
        return self._vring(message.payload), message.payload.num

    def _vring_fd(self, message: Message) -> tuple[Vring, int | None]:
        payload = message.payload
        assert isinstance(payload, VringFile)
        if payload.has_fd != bool(message.fds):
            raise PeerError(f"{message.name()}: bit 8 and the fds disagree")
        return self._vring(payload), message.fds[0] if message.fds else None


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
    Request.SET_VRING_NUM: Session._set_vring_num,
    Request.SET_VRING_BASE: Session._set_vring_base,
    Request.SET_VRING_ADDR: Session._set_vring_addr,
    Request.GET_VRING_BASE: Session._get_vring_base,
    Request.SET_VRING_KICK: Session._set_vring_kick,
    Request.SET_VRING_CALL: Session._set_vring_call_or_err,
    Request.SET_VRING_ERR: Session._set_vring_call_or_err,
    Request.SET_VRING_ENABLE: Session._set_vring_enable,
    Request.GET_QUEUE_NUM: Session._get_constant,
    Request.SET_BACKEND_REQ_FD: Session._set_backend_req_fd,
    Request.GET_CONFIG: Session._get_config,
    Request.SET_CONFIG: Session._set_config,
}
