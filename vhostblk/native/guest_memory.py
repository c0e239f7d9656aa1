"""Snapshots of guest memory: `struct vb_memory`.

Immutable and counted: a region may be unmapped when every snapshot that holds it has no other
reference than ours. Knows nothing of how regions came to be mapped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from vhostblk.native.binding import check, engine, ffi, lib, pointer_of

__all__ = ["Memory", "Region"]


class Region(Protocol):
    """A piece of guest memory: where it is for the guest, in the front-end, and here."""

    @property
    def gpa(self) -> int: ...
    @property
    def uva(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def hva(self) -> int: ...


class Memory:
    """A snapshot of guest memory.

    Args:
        regions: what to put into it: mapped in this process, disjoint in guest addresses.

    Raises:
        OSError: EINVAL: regions overlap, wrap or are empty.

    Context: the control thread. Owns: one reference; engine threads hold others.
    """

    def __init__(self, regions: Iterable[Region]) -> None:
        lib = engine()
        table = [(r.gpa, r.uva, r.size, r.hva) for r in regions]
        ret = ffi.new("struct vb_memory **")
        check(
            lib.vb_memory_create(ffi.new("struct vb_region[]", table), len(table), ret),
            "guest memory",
        )
        self._memory = ret[0]

    @property
    def pointer(self) -> int:
        """For VB_MEMORY_SET."""
        return pointer_of(self._memory)

    @property
    def handle(self) -> Any:
        """For functions of this package."""
        return self._memory

    @property
    def references(self) -> int:
        """How many hold it; 1 when only this object does."""
        return int(lib.vb_memory_refs(self._memory))

    @property
    def faulted(self) -> bool:
        """Whether the front-end has truncated memory that was used since."""
        return bool(lib.vb_memory_faulted(self._memory))

    def close(self) -> None:
        """Give up the reference. Idempotent."""
        memory, self._memory = self._memory, ffi.NULL
        lib.vb_memory_unref(memory)
