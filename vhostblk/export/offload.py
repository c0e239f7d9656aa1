"""What the engine may do by itself: the block layer's answers in the engine's terms.

Sans-io. The extent map is a cache of the graph's answers: an entry is installed when a request misses, the whole run
around it at once, and revoked before the graph changes what it promised.
"""

from __future__ import annotations

from collections.abc import Iterable

from vhostblk.block.backend import BlockBackend
from vhostblk.block.node import ExtentFlag, FlushTarget, HostExtent
from vhostblk.native import FLUSH_MISS, FLUSH_NOTHING

# offset, length, host offset, fd, flags, request alignment, memory alignment: the fields of struct vb_extent
ExtentEntry = tuple[int, int, int, int, int, int, int]


def covers(extents: Iterable[HostExtent], offset: int, length: int, write: bool) -> bool:
    """Whether the engine could serve a request with these extents, which are in ascending order."""
    needed = ExtentFlag.WRITE if write else ExtentFlag.READ
    position, end = offset, offset + length
    for extent in extents:
        if extent.offset <= position < extent.end:
            if not extent.flags & needed:
                return False
            position = extent.end
    return position >= end


def entry(extent: HostExtent) -> ExtentEntry:
    """An extent as the engine takes it."""
    return (
        extent.offset,
        extent.length,
        extent.host_offset,
        -1 if extent.fd is None else extent.fd,
        int(extent.flags),
        extent.request_alignment,
        extent.memory_alignment,
    )


def flush_target(backend: BlockBackend) -> int:
    """The fd that the engine may fdatasync for a guest's flush, or what it must do instead."""
    target = backend.flush_target()
    if target is FlushTarget.NOTHING:
        return FLUSH_NOTHING
    if target is FlushTarget.ASK:
        return FLUSH_MISS
    assert isinstance(target, int)
    return target
