"""The front-end's half of in-flight tracking: it keeps the file, whichever back-end writes it.

vhost-user, "Inflight I/O tracking", GET_INFLIGHT_FD, SET_INFLIGHT_FD.

Knows nothing of sockets, nor of what back-ends write into the file.
"""

from __future__ import annotations

import mmap
import os

from vhostblk.vhost.message import InflightDescription

__all__ = ["InflightFile"]


class InflightFile:
    """A file in which back-ends track requests in flight.

    Args:
        fd: becomes this object's.
        description: as the back-end gave it.

    Raises:
        OSError: the file cannot be mapped; the fd is closed.

    Owns: the fd, and a mapping to look at.
    """

    def __init__(self, fd: int, description: InflightDescription) -> None:
        self.fd = fd
        self.description = description
        try:
            self._map = mmap.mmap(fd, description.mmap_size, offset=description.mmap_offset)
        except BaseException:
            os.close(fd)
            raise
        self.view = memoryview(self._map)
        """All of it: to look at, and for front-ends that misbehave."""

    def close(self) -> None:
        """Unmap and close. Idempotent. Raises: BufferError: somebody still holds a view."""
        if self.fd >= 0:
            self.view.release()
            self._map.close()
            os.close(self.fd)
            self.fd = -1
