"""Aligned scratch memory for requests whose own memory will not do (block layer row B13.1).

Buffers are anonymous mappings, kept for reuse in power-of-two sizes; what is kept is bounded.
"""

from __future__ import annotations

import mmap
from collections import defaultdict

from vhostblk.block.iov import address_of

_MIN_SIZE = mmap.PAGESIZE
_KEEP_BYTES = 4 << 20
# Python's default, a shared mapping, would be backed by shmem.
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class BouncePool:
    """Scratch buffers for one graph.

    Context: the control loop.
    """

    def __init__(self, keep: int = _KEEP_BYTES) -> None:
        self._keep = keep
        self._kept = 0
        self._free: dict[int, list[memoryview]] = defaultdict(list)

    def acquire(self, size: int, alignment: int = 1) -> memoryview:
        """A writable buffer of at least `size` bytes (at least one page), aligned; its content is arbitrary.

        Raises:
            MemoryError, OSError: there is no memory.
        """
        rounded = max(_MIN_SIZE, 1 << (max(size, 1) - 1).bit_length())
        if alignment <= mmap.PAGESIZE:
            free = self._free.get(rounded)
            if free:
                self._kept -= rounded
                return free.pop()
            return memoryview(mmap.mmap(-1, rounded, flags=_FLAGS))
        whole = memoryview(mmap.mmap(-1, rounded + alignment, flags=_FLAGS))
        skip = -address_of(whole) % alignment
        return whole[skip : skip + rounded]

    def release(self, buffer: memoryview) -> None:
        """Give a buffer back; nobody may use it any more."""
        size = len(buffer)
        # Those with larger alignment are cut out of a larger mapping and are too rare to keep.
        whole = isinstance(buffer.obj, mmap.mmap) and len(buffer.obj) == size
        if whole and self._kept + size <= self._keep:
            self._kept += size
            self._free[size].append(buffer)

    def close(self) -> None:
        """Unmap what is kept."""
        self._free.clear()
        self._kept = 0


def zeroes(size: int) -> memoryview:
    """A fresh buffer of zeroes, page-aligned; read only, or it stops being one.

    Raises:
        OSError: there is no memory.
    """
    # Untouched private pages are all the same zero page of the kernel's.
    return memoryview(mmap.mmap(-1, size, flags=_FLAGS))


def aligned_bytes(length: int) -> bytearray:
    """Zeroes at the beginning of a page: the kernel copies to such memory several times as fast.

    Unlike a view of other memory it can be compared as a whole, which Python does as fast as memory is read.
    """
    content = bytearray(length + mmap.PAGESIZE)
    # Cutting off the beginning moves nothing; the end is cut off in place.
    del content[: -address_of(content) % mmap.PAGESIZE]
    del content[length:]
    return content
