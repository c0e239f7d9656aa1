"""What front-ends say about the device as a whole: its configuration space, its status, its state.

vhost-user, GET_CONFIG, SET_CONFIG, SET_STATUS, GET_STATUS, SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE.

Each method handles one message, as those of `session` do: it returns the actions, and gives the way
to make a reply out of the last one's result to `reply_with`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vhostblk.errors import PeerError
from vhostblk.vhost.action import Action, CheckState, CloseFds, LoadState, SaveState, SetFeatures
from vhostblk.vhost.config_access import ConfigAccess
from vhostblk.vhost.device_status import DeviceStatus
from vhostblk.vhost.log_state import LogState
from vhostblk.vhost.message import U64, ConfigSpace, DeviceStateTransfer, Message, Payload
from vhostblk.vhost.negotiation import Negotiation
from vhostblk.vhost.ring_states import RingStates

__all__ = ["DeviceMessages"]

_NO_FD = 0x100  # SET_DEVICE_STATE_FD: success, and the front-end's own fd is used

ReplyWith = Callable[[Callable[[Any], Payload]], None]


class DeviceMessages:
    """Their handlers.

    Args:
        reply_with: takes what makes the reply's payload.
        agreed, rings, log: the session's.
        config: what may be read and written.

    Context: the session.
    """

    def __init__(
        self,
        reply_with: ReplyWith,
        agreed: Negotiation,
        rings: RingStates,
        log: LogState,
        config: ConfigAccess,
    ) -> None:
        self._reply_with = reply_with
        self._agreed = agreed
        self._rings = rings
        self._log = log
        self._config = config
        self.status = DeviceStatus()

    def get_config(self, message: Message) -> tuple[Action, ...]:
        config = message.payload
        assert isinstance(config, ConfigSpace)
        # The payload of the reply has the size that was asked: initiators check it.
        self._reply_with(
            lambda data: ConfigSpace(config.offset, config.size, config.flags, bytes(data))
        )
        return (self._config.read(message),)

    def set_config(self, message: Message) -> tuple[Action, ...]:
        return (self._config.write(message),)

    def set_status(self, message: Message) -> tuple[Action, ...]:
        payload = message.payload
        assert isinstance(payload, U64)
        self.status.write(payload.value)
        if payload.value:
            return ()
        # A reset (VIRTIO 1.2 §2.1). QEMU also says so when it stops the virtual machine, whose driver
        # knows nothing of it: so the cache mode that it has set, and requests in flight, are kept.
        self.status.reset()
        self._agreed.reset()
        return (*self._rings.stop_all(), SetFeatures(0), *self._log.set_enabled(False))

    def get_status(self, _message: Message) -> tuple[Action, ...]:
        self._reply_with(lambda _: U64(self.status.value))
        return ()

    def set_device_state_fd(self, message: Message) -> tuple[Action, ...]:
        asked = message.payload
        assert isinstance(asked, DeviceStateTransfer)
        if asked.direction > 1 or asked.phase:
            raise PeerError(f"SET_DEVICE_STATE_FD: way {asked.direction} in phase {asked.phase}")
        if self._rings.any_started:
            raise PeerError("SET_DEVICE_STATE_FD: a vring is started")
        self._reply_with(lambda _: U64(_NO_FD))
        (fd,) = message.fds
        return (LoadState(fd),) if asked.direction else (SaveState(fd), CloseFds((fd,)))

    def check_device_state(self, _message: Message) -> tuple[Action, ...]:
        self._reply_with(lambda _: U64(0))
        return (CheckState(),)
