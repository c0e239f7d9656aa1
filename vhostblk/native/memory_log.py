"""The log of guest memory that was written, for live migration: `struct vb_memory_log`.

Knows nothing of how the log came to be mapped, nor of who reads it.
"""

from __future__ import annotations

from vhostblk.native.binding import check, engine, ffi, lib, pointer_of
from vhostblk.native.guest_memory import Memory

__all__ = ["MemoryLog"]


class MemoryLog:
    """A bit for each 4096 bytes of guest physical memory.

    Args:
        address: where it is mapped in this process.
        size: bytes of it.

    Raises:
        OSError: ENOMEM, or ENOSPC: too many mappings are guarded.

    Context: the control thread. Must live until every thread has answered a VB_LOG_SET that came
    after the last one that named it.
    """

    def __init__(self, address: int, size: int) -> None:
        lib = engine()
        ret = ffi.new("struct vb_memory_log **")
        check(lib.vb_memory_log_create(address, size, ret), "log of dirty memory")
        self._log = ret[0]

    @property
    def pointer(self) -> int:
        """For VB_LOG_SET."""
        return pointer_of(self._log)

    @property
    def lost(self) -> bool:
        """Whether something was written beyond its end, or it was truncated: it is not the truth."""
        return bool(lib.vb_memory_log_lost(self._log))

    def mark(self, gpa: int, length: int) -> None:
        """What was written, by its guest physical address."""
        lib.vb_memory_log_mark(self._log, gpa, length)

    def mark_at(self, memory: Memory, address: int, length: int) -> None:
        """What was written, by its address in this process."""
        lib.vb_memory_log_mark_at(self._log, memory.handle, address, length)

    def close(self) -> None:
        """Give it up. Idempotent."""
        log, self._log = self._log, ffi.NULL
        lib.vb_memory_log_destroy(log)
