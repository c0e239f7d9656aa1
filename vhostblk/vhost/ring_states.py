"""All vrings of a session: started or stopped, enabled or disabled, and the actions in between.

vhost-user, "Ring states". A ring starts with SET_VRING_KICK and stops with GET_VRING_BASE; whether
it is enabled is tracked in both states, and told to the data path only while it is started.

Knows nothing about messages, their checks and their replies: that is `session`.
"""

from __future__ import annotations

from collections.abc import Iterable

from vhostblk.errors import PeerError
from vhostblk.vhost.action import (
    Action,
    CloseFds,
    EnableVring,
    SetVringFd,
    StartVring,
    StopVring,
)
from vhostblk.vhost.inflight import InflightState
from vhostblk.vhost.vring import Vring, VringFd

__all__ = ["RingStates", "close_fds"]


def close_fds(fds: Iterable[int | None]) -> tuple[CloseFds, ...]:
    """Give the action that closes those of `fds` that exist: one or none."""
    closing = tuple(fd for fd in fds if fd is not None)
    return (CloseFds(closing),) if closing else ()


class RingStates:
    """The vrings, by index.

    Args:
        count: how many there are.

    Context: the session. Owns: the vrings' fds, until a `CloseFds` lists them.
    """

    def __init__(self, count: int) -> None:
        self.vrings = tuple(Vring(index) for index in range(count))

    @property
    def any_started(self) -> bool:
        """Whether one of them is started; if none is, the device is suspended."""
        return any(vring.is_started for vring in self.vrings)

    def find(self, index: int) -> Vring:
        """Raises: PeerError: there is no such vring."""
        if index >= len(self.vrings):
            raise PeerError(f"vring {index} of {len(self.vrings)}")
        return self.vrings[index]

    def set_fd(self, vring: Vring, which: VringFd, fd: int | None) -> tuple[Action, ...]:
        """Exchange an fd, which changes nothing about the state."""
        closing = close_fds([vring.set_fd(which, fd)])
        if not vring.is_started:
            return closing
        return (SetVringFd(vring.index, which, fd), *closing)

    def start(
        self, vring: Vring, kick_fd: int | None, *, inflight: InflightState, packed: bool
    ) -> tuple[Action, ...]:
        """Start a stopped ring; it counts as started once whoever performs this says so.

        Raises:
            PeerError: its size or addresses were never set, or its requests cannot be tracked.
        """
        vring.check_ready(packed=packed)
        part = inflight.part(vring.index, vring.size, packed=packed)
        closing = self.set_fd(vring, VringFd.KICK, kick_fd)
        return (StartVring(vring.index, vring.snapshot(part, packed=packed)), *closing)

    def stop(self, vring: Vring, *, suspend: bool = False) -> tuple[Action, ...]:
        """Stop a started ring; it counts as started until whoever performs this says so.

        Its call and error fds stay: QEMU sends the latter once per connection.

        Args:
            suspend: see `StopVring`.
        """
        return (StopVring(vring.index, suspend), *close_fds([vring.set_fd(VringFd.KICK, None)]))

    def stop_all(self) -> tuple[Action, ...]:
        """Stop what is started, for good; the results are not reported."""
        actions: tuple[Action, ...] = ()
        for vring in self.vrings:
            if vring.is_started:
                actions += self.stop(vring)
                vring.is_started = False
        return actions

    def enable(self, vrings: Iterable[Vring], enabled: bool) -> tuple[Action, ...]:
        """Enable or disable rings, in whatever state."""
        actions = []
        for vring in vrings:
            if vring.is_started and vring.is_enabled != enabled:
                actions.append(EnableVring(vring.index, enabled))
            vring.is_enabled = enabled
        return tuple(actions)

    def reset(self) -> tuple[Action, ...]:
        """Forget everything but the call and error fds; somebody else stops the rings before."""
        kicks = [vring.set_fd(VringFd.KICK, None) for vring in self.vrings]
        for vring in self.vrings:
            vring.forget()
        return close_fds(kicks)

    def close(self) -> tuple[Action, ...]:
        """Stop what is started and give up all fds."""
        started = tuple(StopVring(v.index) for v in self.vrings if v.is_started)
        for vring in self.vrings:
            vring.is_started = False
        return started + close_fds(fd for vring in self.vrings for fd in vring.close())
