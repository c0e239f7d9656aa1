"""Files that a front-end shares, mapped: guest memory, and where requests in flight are tracked.

vhost-user, "Memory access". A front-end decides what the file is and where in it to begin: anything
but a regular file that is long enough is refused. It may still truncate it later, and then pages
beyond the new end raise SIGBUS; only the engine's guard helps against that, which is not known here.
"""

from __future__ import annotations

import mmap
import os
import stat
import sys

from vhostblk.errors import PeerError

__all__ = ["map_file"]

# Until 3.13 a mapping keeps a duplicate of its file descriptor, which nobody here needs.
_NO_FD: dict[str, bool] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


def map_file(fd: int, offset: int, size: int, what: object) -> tuple[mmap.mmap, memoryview]:
    """Map a piece of a file, shared and writable.

    Args:
        fd: borrowed, and not needed once this returns.
        offset, size: bytes; the offset need not be aligned.
        what: for errors.

    Returns:
        The mapping, and a view of the piece, which keeps it alive.

    Raises:
        PeerError: it is not a file, or too short, or cannot be mapped.
    """
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise PeerError(f"{what}: the fd is not a file")
        if offset + size > status.st_size:
            raise PeerError(
                f"{what}: the file has {status.st_size:#x} bytes, the region begins at {offset:#x}"
            )
        # Huge pages: offset and length must be multiples of the page size, which is hugetlbfs's
        # block size. Other file systems may state anything; more alignment does no harm there.
        alignment = max(mmap.ALLOCATIONGRANULARITY, status.st_blksize)
        if alignment & (alignment - 1):
            alignment = mmap.ALLOCATIONGRANULARITY
        start = offset & -alignment
        end = (offset + size + alignment - 1) & -alignment
        mapping = mmap.mmap(
            fd,
            min(end, status.st_size) - start,
            mmap.MAP_SHARED,
            mmap.PROT_READ | mmap.PROT_WRITE,
            offset=start,
            **_NO_FD,
        )
    except (OSError, ValueError, OverflowError) as error:
        # Anything the front-end can bring about: read-only or sealed files, no address space.
        raise PeerError(f"{what}: cannot map: {error}") from error
    # Core files would be as large as the guest, and contain it.
    mapping.madvise(mmap.MADV_DONTDUMP)
    return mapping, memoryview(mapping)[offset - start : offset - start + size]
