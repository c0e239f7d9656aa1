"""The log of dirty memory that a front-end shares, mapped.

vhost-user, "Migration"; SET_LOG_BASE. Marks are the engine's affair (`native.MemoryLog`), because
the front-end takes them away while we make them: so there is no log where the engine is not built.

A front-end may truncate the file at any time, as it may guest memory; the engine's guard keeps that
from killing us. Whether the log is long enough is found out when something is written that is not
in it: front-ends may give a longer one after more memory, and nothing is written in between.

Knows nothing about sessions, nor about who marks.
"""

from __future__ import annotations

from vhostblk import native
from vhostblk.errors import PeerError
from vhostblk.vhost.shared_file import map_file

__all__ = ["DirtyLog"]


class DirtyLog:
    """A log.

    Args:
        size, offset: where it is in the file, bytes.
        fd: borrowed, and not needed once this returns.

    Raises:
        PeerError: it is not a file, or too short, or cannot be mapped.

    Context: the control loop. Owns: the mapping, until `close`.
    """

    def __init__(self, size: int, offset: int, fd: int) -> None:
        what = f"log of {size:#x} bytes at {offset:#x}"
        if not size:
            raise PeerError(f"{what}: empty")
        self._mapping, self._view = map_file(fd, offset, size, what)
        try:
            self.marks = native.MemoryLog(native.address_of(self._view), size)
            """For whoever writes guest memory."""
        except OSError as error:
            self._unmap()
            raise PeerError(f"log of dirty memory: {error.strerror}") from None

    @property
    def lost(self) -> bool:
        """Whether it does not tell the truth any more: see `native.MemoryLog`."""
        return self.marks.lost

    def close(self) -> None:
        """Unmap it; nobody marks any more."""
        self.marks.close()
        self._unmap()

    def _unmap(self) -> None:
        self._view.release()
        self._mapping.close()
