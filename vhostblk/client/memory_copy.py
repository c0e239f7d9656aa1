"""Copies guest memory as a front-end does that migrates a guest: all of it, then what was written since.

vhost-user, "Migration". The back-end marks the pages that it writes in a log, which is memory that both sides share.
A VMM takes marks away while the back-end makes them, by atomic operations; there are none in Python, so each round
gives the back-end a new log (SET_LOG_BASE) and looks at the old one once that is answered: nobody marks in it any more.

Knows nothing about what the guest itself has written: see `SharedMemory.written`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

from vhostblk.client.client import Client
from vhostblk.virtio.features import Feature

__all__ = ["LOG_PAGE", "MemoryCopy"]

LOG_PAGE = 4096
"""VHOST_LOG_PAGE: what a bit of the log is about, bytes."""

_LOG_ALL = int(Feature.VHOST_F_LOG_ALL)


class MemoryCopy:
    """A copy of a client's guest memory.

    Args:
        client: connected; when its memory changes, call `follow`.
        fd: told by the back-end when it has marked pages; None: nobody is.

    Context: one thread. Owns: the logs.
    """

    def __init__(self, client: Client, *, fd: int | None = None) -> None:
        self._client = client
        self._memory = client.memory
        self._log: mmap.mmap | None = None
        self.content: dict[int, bytearray] = {}
        """By the address of the region."""
        if fd is not None:
            client.control.ask(client.control.frontend.set_log_fd(fd))

    def start(self) -> None:
        """Have what is written from now on logged, and copy all there is."""
        self._log = self._give_log()
        self._turn(True)
        self.content = {region.gpa: bytearray(region.view) for region in self._memory.regions}

    def follow(self) -> None:
        """Regions have come, or gone: the back-end gets a log that is long enough.

        A region that comes must be here before the back-end knows of it; what is not in the log cannot be marked.
        """
        self.round()
        before = self.content
        self.content = {
            region.gpa: before.get(region.gpa) or bytearray(region.view)
            for region in self._memory.regions
        }

    def stop(self) -> None:
        """No more logging; the copy grows old."""
        self._turn(False)

    def round(self) -> int:
        """Copy what was written since the last time; gives how many pages the back-end has written."""
        old, self._log = self._log, self._give_log()
        assert old is not None
        count = 0
        for page in _marks(old):
            if self._has(page * LOG_PAGE):
                self.copy(page * LOG_PAGE)
            count += 1
        old.close()
        return count

    def copy(self, gpa: int) -> None:
        """Copy one page."""
        region = self._memory.region_of(gpa)
        start = gpa - region.gpa
        self.content[region.gpa][start : start + LOG_PAGE] = region.view[start : start + LOG_PAGE]

    def _has(self, gpa: int) -> bool:
        regions = self._memory.regions
        return any(r.gpa <= gpa < r.end and r.gpa in self.content for r in regions)

    def differences(self) -> list[int]:
        """Addresses of the pages that are not as in the guest."""
        return [
            region.gpa + start
            for region in self._memory.regions
            for start in range(0, region.size, LOG_PAGE)
            if self.content[region.gpa][start : start + LOG_PAGE]
            != region.view[start : start + LOG_PAGE]
        ]

    def close(self) -> None:
        """Give the logs up."""
        if self._log is not None:
            self._log.close()

    def _give_log(self) -> mmap.mmap:
        control = self._client.control
        size = -(-max(region.end for region in self._memory.regions) // LOG_PAGE // 8)
        fd = os.memfd_create("vhostblk-log")
        try:
            os.ftruncate(fd, size)
            control.ask(control.frontend.set_log_base(size, 0, fd))
            return mmap.mmap(fd, size)
        finally:
            os.close(fd)

    def _turn(self, enabled: bool) -> None:
        client = self._client
        features = client.control.features & ~_LOG_ALL | (_LOG_ALL if enabled else 0)
        client.control.set_features(features)
        client.log_rings(enabled)


def _marks(log: mmap.mmap) -> Iterator[int]:
    for position, byte in enumerate(log[:]):
        if byte:
            for bit in range(8):
                if byte >> bit & 1:
                    yield position * 8 + bit
