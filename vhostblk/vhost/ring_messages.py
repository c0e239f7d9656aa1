"""What front-ends say about one ring, and about where requests in flight are tracked.

vhost-user, SET_VRING_NUM to SET_VRING_ENABLE, GET_VRING_BASE, GET_VRING_BASE_SKIP_DRAIN, GET_INFLIGHT_FD,
SET_INFLIGHT_FD. Each method handles one message, as those of `session` do.

A ring that stops is drained, unless the front-end allows that requests stay in flight, where they
are tracked. It says so for each stop by GET_VRING_BASE_SKIP_DRAIN. One that knows only the older
GET_VRING_BASE_INFLIGHT says so once, for every GET_VRING_BASE; where both are negotiated, GET_VRING_BASE
drains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vhostblk.errors import PeerError
from vhostblk.vhost.action import Action, CloseFds, CreateInflight, MapInflight
from vhostblk.vhost.device_status import DeviceStatus
from vhostblk.vhost.exchange import Exchange
from vhostblk.vhost.inflight import InflightState
from vhostblk.vhost.log_state import LogState
from vhostblk.vhost.message import (
    InflightDescription,
    Message,
    Payload,
    ProtocolFeature,
    Request,
    VringAddress,
    VringFile,
    VringState,
)
from vhostblk.vhost.negotiation import Negotiation
from vhostblk.vhost.ring_states import RingStates
from vhostblk.vhost.vring import Vring, VringFd

__all__ = ["RingMessages"]


class RingMessages:
    """Their handlers.

    Args:
        exchange: gives the message being handled.
        agreed, rings, log, status: the session's.

    Context: the session.
    """

    def __init__(
        self,
        exchange: Callable[[], Exchange],
        agreed: Negotiation,
        rings: RingStates,
        log: LogState,
        status: DeviceStatus,
    ) -> None:
        self._exchange = exchange
        self._agreed = agreed
        self._rings = rings
        self._log = log
        self._status = status
        self.inflight = InflightState()

    def set_num(self, message: Message) -> tuple[Action, ...]:
        vring, num = self._vring_state(message)
        vring.set_size(num, packed=self._agreed.is_packed)
        return ()

    def set_base(self, message: Message) -> tuple[Action, ...]:
        vring, num = self._vring_state(message)
        vring.set_base(num, packed=self._agreed.is_packed)
        return ()

    def set_addresses(self, message: Message) -> tuple[Action, ...]:
        address = message.payload
        assert isinstance(address, VringAddress)
        vring = self._rings.find(address.index)
        vring.set_addresses(address.desc, address.avail, address.used)
        may_log = self._agreed.has(ProtocolFeature.LOG_SHMFD)
        return self._log.set_vring(vring, address, may_log=may_log)

    def get_base(self, message: Message) -> tuple[Action, ...]:
        vring, _ = self._vring_state(message)
        packed = self._agreed.is_packed
        if not vring.is_started:
            self._reply_with(lambda _: VringState(vring.index, vring.base(packed=packed)))
            return ()

        def stopped(base: int) -> Payload:
            vring.is_started = False
            vring.set_base(base, packed=packed)
            self._status.stopped(vring.index)
            return VringState(vring.index, base)

        self._reply_with(stopped)
        return self._rings.stop(vring, suspend=self._suspends(message))

    def _suspends(self, message: Message) -> bool:
        """Whether requests may stay in flight: see the module."""
        if message.request == Request.GET_VRING_BASE_SKIP_DRAIN:
            return True
        has = self._agreed.has
        return has(ProtocolFeature.GET_VRING_BASE_INFLIGHT) and not has(
            ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN
        )

    def set_kick(self, message: Message) -> tuple[Action, ...]:
        # "Ring states": SET_VRING_KICK starts the ring; older texts had the first kick do so.
        vring, fd = self._vring_fd(message)
        if vring.is_started:
            return self._rings.set_fd(vring, VringFd.KICK, fd)
        actions = self._rings.start(
            vring, fd, inflight=self.inflight, packed=self._agreed.is_packed
        )
        self._exchange().starting = vring
        return actions

    def set_call_or_err(self, message: Message) -> tuple[Action, ...]:
        vring, fd = self._vring_fd(message)
        is_call = message.request == Request.SET_VRING_CALL
        return self._rings.set_fd(vring, VringFd.CALL if is_call else VringFd.ERR, fd)

    def set_enabled(self, message: Message) -> tuple[Action, ...]:
        vring, num = self._vring_state(message)
        if num > 1:
            raise PeerError(f"SET_VRING_ENABLE: {num} is neither 0 nor 1")
        return self._rings.enable((vring,), bool(num))

    def get_inflight_fd(self, message: Message) -> tuple[Action, ...]:
        asked = message.payload
        assert isinstance(asked, InflightDescription)
        answer = self.inflight.answer(asked, packed=self._agreed.is_packed)
        self._reply_with(lambda _: answer)
        self._exchange().gives_fd = True
        return (CreateInflight(answer.mmap_size),) if answer.mmap_size else ()

    def set_inflight_fd(self, message: Message) -> tuple[Action, ...]:
        region = message.payload
        assert isinstance(region, InflightDescription)
        if self._rings.any_started:
            raise PeerError("SET_INFLIGHT_FD: a vring is started")
        self.inflight.adopt(region, packed=self._agreed.is_packed)
        (fd,) = message.fds
        mapping = MapInflight(region.mmap_offset, region.mmap_size, fd, self.inflight.note)
        return (mapping, CloseFds((fd,)))

    def _vring_state(self, message: Message) -> tuple[Vring, int]:
        assert isinstance(message.payload, VringState)
        return self._rings.find(message.payload.index), message.payload.num

    def _vring_fd(self, message: Message) -> tuple[Vring, int | None]:
        payload = message.payload
        assert isinstance(payload, VringFile)
        if payload.has_fd != bool(message.fds):
            raise PeerError(f"{message.name()}: bit 8 and the fds disagree")
        return self._rings.find(payload.index), message.fds[0] if message.fds else None

    def _reply_with(self, payload: Callable[[Any], Payload]) -> None:
        self._exchange().own_reply = payload
