"""The device status that the front-end passes on, and whether the device wants to be reset.

vhost-user, SET_STATUS, GET_STATUS; VIRTIO 1.2 §2.1.

The driver writes the status, and the device answers what was written; the one bit of its own is
DEVICE_NEEDS_RESET, which is there as long as a virtqueue is broken (§2.1.2). Writing 0 is a reset:
what that stops and forgets is `session`'s.

Knows nothing about messages.
"""

from __future__ import annotations

from vhostblk.errors import PeerError

__all__ = ["NEEDS_RESET", "DeviceStatus"]

NEEDS_RESET = 64
_BITS = 0xFF


class DeviceStatus:
    """The status byte.

    Context: the session.
    """

    def __init__(self) -> None:
        self._written = 0
        self._broken: set[int] = set()

    @property
    def value(self) -> int:
        """What GET_STATUS answers."""
        return self._written | (NEEDS_RESET if self._broken else 0)

    def write(self, value: int) -> None:
        """Take what the driver wrote. Raises: PeerError: it has more than 8 bits."""
        if value & ~_BITS:
            raise PeerError(f"SET_STATUS: {value:#x} does not fit 8 bits")
        # A driver that adds a bit writes back what it has read; this one is not its to set.
        self._written = value & ~NEEDS_RESET

    def broke(self, index: int) -> None:
        """A virtqueue is broken."""
        self._broken.add(index)

    def stopped(self, index: int) -> None:
        """It is stopped, and the next start begins anew."""
        self._broken.discard(index)

    def reset(self) -> None:
        """The device is as new."""
        self._written = 0
        self._broken.clear()
