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

MAX_RING_SIZE = 32768  # VIRTIO 1.2 §2.7, §2.8: the maximum queue size value is 32768

_FIRST_PACKED_BASE = 0x8000_8000  # VIRTIO 1.2 §2.8.1: wrap counters begin with 1
# So that no sum of it and an offset in a ring wraps around.
_MAX_LOG_GPA = (1 << 64) - (1 << 20)


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
    log_gpa: int | None = None
    """Guest physical address of the used ring, if it is to be marked in the log."""
    inflight: range | None = None
    """Bytes of the in-flight region that are this ring's; None: requests are not tracked."""


class Vring:
    """The control copy.

    Args:
        index: the guest's number of the queue.

    Context: the session. Owns: its three fds, until `close` or a replacement gives them back.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self._base: int | None = None
        self.is_started = False
        self.is_enabled = False
        self._size: int | None = None
        self._addresses: tuple[int, int, int] | None = None
        self._log_gpa: int | None = None
        self._fds: dict[VringFd, int | None] = dict.fromkeys(VringFd)

    def set_size(self, size: int, *, packed: bool = False) -> None:
        """Raises: PeerError: not up to 32768, and a power of two unless the ring is packed."""
        self._check_size(size, packed)
        self._size = size

    def _check_size(self, size: int, packed: bool) -> None:
        if not 1 <= size <= MAX_RING_SIZE:
            raise PeerError(f"vring {self.index}: size {size} is not from 1 to {MAX_RING_SIZE}")
        # VIRTIO 1.2 §2.7: queue size is always a power of 2; §2.8.10.1: need not be.
        if not packed and size & (size - 1):
            raise PeerError(f"vring {self.index}: size {size} is not a power of two")

    def set_base(self, base: int, *, packed: bool = False) -> None:
        """Set where the ring begins: VHOST_USER_SET_VRING_BASE.

        Args:
            base: the next available index. Packed: in bits 0-15 the next available descriptor and
                its wrap counter, in bits 16-31 the next used one and its wrap counter.

        Raises:
            PeerError: it has more than 16 bits, and the ring is not packed.
        """
        self._check_base(base, packed)
        self._base = base

    def _check_base(self, base: int, packed: bool) -> None:
        if base > 0xFFFF and not packed:
            raise PeerError(f"vring {self.index}: base {base:#x} does not fit 16 bits")

    def base(self, *, packed: bool = False) -> int:
        """What was set, or where a new ring begins."""
        if self._base is not None:
            return self._base
        return _FIRST_PACKED_BASE if packed else 0

    def set_addresses(self, desc: int, avail: int, used: int) -> None:
        """Raises: PeerError: one is not aligned; whether they are in memory is not known here."""
        if self.is_started:
            # To turn logging on and off they come again.
            if self._addresses != (desc, avail, used):
                raise PeerError(f"vring {self.index}: other addresses while it is started")
            return
        # VIRTIO 1.2 §2.7: descriptor table 16, available ring 2, used ring 4; §2.8.10.1: 16, 4, 4.
        if desc % 16 or avail % 2 or used % 4:
            raise PeerError(
                f"vring {self.index}: misaligned: desc {desc:#x}, avail {avail:#x}, used {used:#x}"
            )
        self._addresses = (desc, avail, used)

    def set_log(self, gpa: int | None) -> bool:
        """Say where the used ring is marked in the log, if it is; gives whether that is new.

        Raises:
            PeerError: there can be no guest memory there.
        """
        if gpa is not None and gpa > _MAX_LOG_GPA:
            raise PeerError(f"vring {self.index}: a used ring at {gpa:#x} in the log")
        before, self._log_gpa = self._log_gpa, gpa
        return gpa != before

    def set_fd(self, which: VringFd, fd: int | None) -> int | None:
        """Take over `fd` and return the one it replaces, which is now the caller's."""
        old, self._fds[which] = self._fds[which], fd
        return old

    def check_ready(self, *, packed: bool = False) -> None:
        """Raises: PeerError: the ring cannot start: no size, no addresses, or of another format."""
        if self._size is None or self._addresses is None:
            missing = "size" if self._size is None else "addresses"
            raise PeerError(f"vring {self.index}: kick fd before its {missing}")
        # They may have been set before the features.
        self._check_size(self._size, packed)
        self._check_base(self.base(packed=packed), packed)
        if packed and self._addresses[1] % 4:
            raise PeerError(f"vring {self.index}: misaligned: driver area {self._addresses[1]:#x}")

    @property
    def size(self) -> int:
        """Entries; `check_ready` must have passed."""
        assert self._size is not None
        return self._size

    def snapshot(self, inflight: range | None = None, *, packed: bool = False) -> VringSnapshot:
        """Copy the state for the data path; `check_ready` must have passed."""
        assert self._addresses is not None
        desc, avail, used = self._addresses
        return VringSnapshot(
            index=self.index,
            size=self.size,
            base=self.base(packed=packed),
            desc=desc,
            avail=avail,
            used=used,
            kick_fd=self._fds[VringFd.KICK],
            call_fd=self._fds[VringFd.CALL],
            err_fd=self._fds[VringFd.ERR],
            enabled=self.is_enabled,
            log_gpa=self._log_gpa,
            inflight=inflight,
        )

    def forget(self) -> None:
        """Go back to a new ring's state, but for the fds: RESET_DEVICE."""
        self._base = None
        self.is_started = self.is_enabled = False
        self._size = self._addresses = self._log_gpa = None

    def close(self) -> tuple[int, ...]:
        """Give up all fds; the caller closes them."""
        fds = tuple(fd for fd in self._fds.values() if fd is not None)
        self._fds = dict.fromkeys(VringFd)
        return fds
