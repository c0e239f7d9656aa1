"""What the front-end has said about the log of dirty memory, and the actions that follow.

vhost-user, "Migration". A log is a bitmap, in memory that the front-end shares, of pages that the
back-end writes; SET_LOG_BASE says where it is. Two switches say what is marked there: bit 26 of the
features (VHOST_F_LOG_ALL) for what is written to buffers, and a flag of SET_VRING_ADDR
(VHOST_VRING_F_LOG) for a ring's used part. Both come at any time, also while rings run, and are only
told to the data path when they change.

Knows nothing about mappings, nor about what is in the log.
"""

from __future__ import annotations

from vhostblk.errors import PeerError
from vhostblk.vhost.action import Action, CloseFds, SetLogArea, SetLogFd, SetLogging, SetVringLog
from vhostblk.vhost.payload import LogArea, VringAddress
from vhostblk.vhost.ring_states import close_fds
from vhostblk.vhost.vring import Vring

__all__ = ["LogState"]

_VRING_F_LOG = 1


class LogState:
    """The log as far as messages tell.

    Context: the session. Owns: the log's eventfd, until a `CloseFds` lists it.
    """

    def __init__(self) -> None:
        self._enabled = False
        self._fd: int | None = None

    def set_area(self, area: LogArea, fds: tuple[int, ...]) -> tuple[Action, ...]:
        """SET_LOG_BASE. The log's own fd is not needed once it is mapped."""
        return (SetLogArea(area.size, area.offset, fds[0]), CloseFds(fds))

    def set_fd(self, fd: int | None) -> tuple[Action, ...]:
        """SET_LOG_FD, or, without an fd, the end."""
        old, self._fd = self._fd, fd
        if old is None and fd is None:
            return ()
        return (SetLogFd(fd), *close_fds([old]))

    def set_enabled(self, enabled: bool) -> tuple[Action, ...]:
        """Bit 26 of SET_FEATURES."""
        if enabled == self._enabled:
            return ()
        self._enabled = enabled
        return (SetLogging(enabled),)

    def set_vring(
        self, vring: Vring, address: VringAddress, *, may_log: bool
    ) -> tuple[Action, ...]:
        """The flag of SET_VRING_ADDR.

        Args:
            may_log: LOG_SHMFD is negotiated.

        Raises:
            PeerError: other flags, or a log that there cannot be.
        """
        if address.flags & ~(_VRING_F_LOG if may_log else 0):
            raise PeerError(f"SET_VRING_ADDR: flags {address.flags:#x}")
        changed = vring.set_log(address.log if address.flags else None)
        if not (changed and vring.is_started):
            return ()
        return (SetVringLog(vring.index, address.log if address.flags else None),)
