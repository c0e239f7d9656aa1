"""What a device leaves to its successor besides requests in flight: a few bytes at the end of their region.

vhost-user, "Inflight I/O tracking": the back-end decides how large the region is, and the front-end
keeps it. Behind the rings' parts there is room for two words: what `device_state` says in a
migration. A back-end that knows nothing of them leaves them alone.

A killed process leaves the stores it has made. Each word is one store, and the words do not depend on
each other, so there is no moment at which they make no sense.

Knows nothing about mappings.
"""

from __future__ import annotations

from vhostblk.vhost.device_state import DeviceState

__all__ = ["NOTE_SIZE", "DeviceNote"]

NOTE_SIZE = 64
"""Bytes at the end of the region; the first 16 of them are used."""

_MAGIC = int.from_bytes(b"vhblk", "big") << 24 | 1 << 16
"""Of the first word, with the version; flags are in its lowest 16 bits."""
_WRITEBACK = 1
_IS_DRIVERS = 2


class DeviceNote:
    """The two words.

    Args:
        view: `NOTE_SIZE` bytes, aligned to 8.
    """

    def __init__(self, view: memoryview) -> None:
        self._words = view[:16].cast("Q")

    def read(self) -> DeviceState | None:
        """What is there; None: nothing, or nothing that makes sense."""
        flags = self._words[0] ^ _MAGIC
        if flags & ~(_WRITEBACK | _IS_DRIVERS):
            return None
        return DeviceState(self._words[1], bool(flags & _WRITEBACK), bool(flags & _IS_DRIVERS))

    def write(self, state: DeviceState) -> None:
        """Take the place of what is there."""
        flags = (_WRITEBACK if state.writeback else 0) | (_IS_DRIVERS if state.is_drivers else 0)
        self._words[1] = state.capacity
        self._words[0] = _MAGIC | flags

    def close(self) -> None:
        """Let go of the memory."""
        self._words.release()
