"""The memory in which requests in flight are tracked: made for a front-end, and mapped when it comes back.

vhost-user, GET_INFLIGHT_FD, SET_INFLIGHT_FD.

Theory of operation. The file is the front-end's to keep: it outlives this process. Between the two
messages nothing of it stays here. It is sealed against shrinking where we make it, but what comes
back may be another file (QEMU makes one of its own in a migration), which the front-end may
truncate; so the mapping is to be guarded as guest memory is.

Knows nothing about what is written there; `inflight` has the layout.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Iterable

from vhostblk.errors import PeerError
from vhostblk.vhost.shared_file import map_file

__all__ = ["InflightRegion", "create_file"]


def create_file(size: int) -> int:
    """Make a file of zeroes that cannot shrink, for GET_INFLIGHT_FD; the fd is the caller's.

    Raises:
        PeerError: there is no memory or no descriptor for it.
    """
    try:
        fd = os.memfd_create("vhostblk-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise PeerError(f"no in-flight region: {error}") from error
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(fd)
        raise PeerError(f"no in-flight region: {error}") from error
    return fd


class InflightRegion:
    """A mapped region.

    Args:
        fd, offset, size: as in SET_INFLIGHT_FD; the fd is not needed once this returns.
        address_of: gives the address of a buffer's first byte.

    Raises:
        PeerError: it cannot be mapped.

    Context: the control loop. Owns: the mapping.
    """

    gpa = uva = 0
    """No guest knows of it: these make it a `native.Region`, which can be guarded."""

    def __init__(self, fd: int, offset: int, size: int, address_of: Callable[..., int]) -> None:
        self.size = size
        self._mapping: mmap.mmap | None
        self._mapping, self._view = map_file(fd, offset, size, "in-flight region")
        self.hva = address_of(self._view)
        """Address of the first byte in this process."""

    def part(self, part: range) -> memoryview:
        """Give a ring's part; the range must be inside."""
        return self._view[part.start : part.stop]

    def forget(self, versions: Iterable[int]) -> None:
        """Zero 16 bits at each of these offsets; rings must not be served meanwhile."""
        for offset in versions:
            self._view[offset : offset + 2] = bytes(2)

    def close(self) -> None:
        """Unmap, as soon as no view is left. Idempotent."""
        mapping, self._mapping = self._mapping, None
        if mapping is None:
            return
        self._view.release()
        try:
            mapping.close()
        except BufferError:
            # The last view to go unmaps, since they hold the only references now.
            pass
