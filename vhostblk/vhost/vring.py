"""A vring as the front-end has described it so far: the control copy of its state.

vhost-user, "Ring states". A vring has a size, addresses, a base and up to three fds; it is started
or stopped, and independently enabled or disabled. The data path gets a `VringSnapshot` when the
ring starts, and from then on is told of changes one by one: state exists twice, with one hand-over.

Knows nothing about what is inside the rings, nor where their addresses point.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from vhostblk.errors import PeerError

__all__ = ["MAX_RING_SIZE", "Vring", "VringFd", "VringSnapshot"]

MAX_RING_SIZE = 32768  # VIRTIO 1.2 §2.7: the maximum queue size value is 32768


class VringFd(enum.Enum):
    """Which of a vring's three file descriptors."""

    KICK = "kick"
    CALL = "call"
    ERR = "err"


@dataclass(frozen=True)
class VringSnapshot:
    """All that a data path has to know to start a vring.

    The addresses are the front-end's (uva). The fds are lent; None means that the driver and the
    device poll instead (kick, call), or that nobody wants to hear of errors (err).
    """

    index: int
    size: int
    base: int
    desc: int
    avail: int
    used: int
    kick_fd: int | None
    call_fd: int | None
    err_fd: int | None
    enabled: bool


class Vring:
    """The control copy.

    Args:
        index: the guest's number of the queue.

    Context: the session. Owns: its three fds, until `close` or a replacement gives them back.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.base = 0
        self.is_started = False
        self.is_enabled = False
        self._size: int | None = None
        self._addresses: tuple[int, int, int] | None = None
        self._fds: dict[VringFd, int | None] = dict.fromkeys(VringFd)

    def set_size(self, size: int) -> None:
        """Raises: PeerError: not a power of two up to 32768."""
        # VIRTIO 1.2 §2.7: queue size is always a power of 2.
        if not 1 <= size <= MAX_RING_SIZE or size & (size - 1):
            raise PeerError(f"vring {self.index}: size {size} is not a power of two up to 32768")
        self._size = size

    def set_base(self, base: int) -> None:
        """Set the next available index. Raises: PeerError: it has more than 16 bits."""
        if base > 0xFFFF:
            raise PeerError(f"vring {self.index}: base {base:#x} does not fit 16 bits")
        self.base = base

    def set_addresses(self, desc: int, avail: int, used: int) -> None:
        """Raises: PeerError: one is not aligned; whether they are in memory is not known here."""
        # VIRTIO 1.2 §2.7: descriptor table 16, available ring 2, used ring 4.
        if desc % 16 or avail % 2 or used % 4:
            raise PeerError(
                f"vring {self.index}: misaligned: desc {desc:#x}, avail {avail:#x}, used {used:#x}"
            )
        self._addresses = (desc, avail, used)

    def set_fd(self, which: VringFd, fd: int | None) -> int | None:
        """Take over `fd` and return the one it replaces, which is now the caller's."""
        old, self._fds[which] = self._fds[which], fd
        return old

    def check_ready(self) -> None:
        """Raises: PeerError: the ring cannot start: its size or addresses were never set."""
        if self._size is None or self._addresses is None:
            missing = "size" if self._size is None else "addresses"
            raise PeerError(f"vring {self.index}: kick fd before its {missing}")

    def snapshot(self) -> VringSnapshot:
        """Copy the state for the data path; `check_ready` must have passed."""
        assert self._size is not None
        assert self._addresses is not None
        desc, avail, used = self._addresses
        return VringSnapshot(
            index=self.index,
            size=self._size,
            base=self.base,
            desc=desc,
            avail=avail,
            used=used,
            kick_fd=self._fds[VringFd.KICK],
            call_fd=self._fds[VringFd.CALL],
            err_fd=self._fds[VringFd.ERR],
            enabled=self.is_enabled,
        )

    def forget(self) -> None:
        """Go back to a new ring's state, but for the fds: RESET_DEVICE."""
        self.base = 0
        self.is_started = self.is_enabled = False
        self._size = self._addresses = None

    def close(self) -> tuple[int, ...]:
        """Give up all fds; the caller closes them."""
        fds = tuple(fd for fd in self._fds.values() if fd is not None)
        self._fds = dict.fromkeys(VringFd)
        return fds
