"""Guest memory without a guest: shared files, where a back-end can map them, and room in them.

vhost-user, "Memory region description": a region has an address in the guest (gpa), one in the
front-end (uva), a size, and an offset in a file. Nothing requires the uva to be where the file is
mapped, so ours are far from both the gpa and the mapping: who confuses two of them is found out.

Knows nothing of sockets and queues.
"""

from __future__ import annotations

import bisect
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Literal

import posix_ipc

from vhostblk.errors import StateError
from vhostblk.vhost.message import MemoryRegion
from vhostblk.virtio.driver import Buffer

__all__ = ["Kind", "MakeFile", "SharedMemory", "SharedRegion"]

Kind = Literal["memfd", "posix"]
"""memfd_create, or shm_open of a name that is unlinked at once."""

MakeFile = Callable[[int], int]
"""Makes a file of so many bytes; gives an fd, which is the caller's."""

_PAGE = mmap.PAGESIZE
_FIRST_GPA = 0x1000_0000
_FIRST_UVA = 0x7000_0000_0000
_UVA_STRIDE = 1 << 40


class SharedRegion:
    """One region of guest memory.

    Owns: its fd and its mapping.
    """

    def __init__(self, fd: int, gpa: int, uva: int, size: int, offset: int) -> None:
        self.fd = fd
        self.gpa = gpa
        self.uva = uva
        self.size = size
        self.offset = offset
        self._map = mmap.mmap(fd, size, offset=offset)
        self.view = memoryview(self._map)
        """All of it."""

    @property
    def end(self) -> int:
        """Guest physical address of the first byte behind it."""
        return self.gpa + self.size

    @property
    def description(self) -> MemoryRegion:
        """What to tell the back-end."""
        return MemoryRegion(self.gpa, self.size, self.uva, self.offset)

    def truncate(self, size: int) -> None:
        """Cut the file to `size` bytes while both sides have it mapped.

        Whoever touches the lost pages from now on dies of SIGBUS, this process included.
        """
        os.ftruncate(self.fd, size)

    def close(self) -> None:
        """Unmap and close. Idempotent.

        Raises:
            BufferError: somebody still holds a view.
        """
        self.view.release()
        self._map.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class SharedMemory:
    """All regions, and an allocator over them.

    Args:
        sizes: bytes of each region, multiples of the page size.
        kind: what the files are, or who makes them.
        one_file: put the regions into one file, one behind the other, as QEMU does.
        gap: bytes between two regions in the guest's address space; with 0, buffers may lie in two.
        spread: allocate round and round, not at the lowest free address, so that every part of the
            memory gets used.

    Context: one thread at a time. Owns: the regions.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        kind: Kind | MakeFile = "memfd",
        one_file: bool = False,
        gap: int = 1 << 30,
        spread: bool = False,
    ) -> None:
        self.regions: list[SharedRegion] = []
        self._kind = kind
        self._gap = gap
        self._spread = spread
        self._next_gpa = _FIRST_GPA
        self._next_uva = _FIRST_UVA
        self._cursor = 0
        self._retired: set[SharedRegion] = set()
        self.written: set[int] | None = None
        """If there is one: addresses of the pages that `write` has written are added."""
        # Sorted, disjoint, never adjacent: [start, end) in guest physical addresses.
        self._free: list[tuple[int, int]] = []
        if one_file:
            file = _create(kind, sum(sizes))
            try:
                offset = 0
                for size in sizes:
                    self._map_region(os.dup(file), size, offset)
                    offset += size
            finally:
                os.close(file)
        else:
            for size in sizes:
                self.add_region(size)

    def add_region(self, size: int) -> SharedRegion:
        """Make one more region, behind all others. The back-end is not told here."""
        return self._map_region(_create(self._kind, size), size, 0)

    def retire(self, region: SharedRegion) -> None:
        """Allocate nothing there any more: once all that is there has been freed it can be removed."""
        self._retired.add(region)

    def is_idle(self, region: SharedRegion) -> bool:
        """Whether nothing is allocated there."""
        return any(a <= region.gpa and region.end <= b for a, b in self._free)

    def remove_region(self, region: SharedRegion) -> None:
        """Unmap a region in which nothing is allocated.

        Raises:
            StateError: something is.
        """
        if not self.is_idle(region):
            raise StateError(f"the region at {region.gpa:#x} is in use")
        self._free = [
            piece
            for a, b in self._free
            for piece in ((a, min(b, region.gpa)), (max(a, region.end), b))
            if piece[0] < piece[1]
        ]
        self._retired.discard(region)
        self.regions.remove(region)
        region.close()

    def region_of(self, gpa: int) -> SharedRegion:
        """Find the region that holds the byte at `gpa`.

        Raises:
            StateError: none does.
        """
        for region in self.regions:
            if region.gpa <= gpa < region.end:
                return region
        raise StateError(f"{gpa:#x} is not guest memory")

    def uva(self, gpa: int) -> int:
        """Translate an address as SET_VRING_ADDR wants it."""
        region = self.region_of(gpa)
        return region.uva + gpa - region.gpa

    def views(self, buffer: Buffer) -> list[memoryview]:
        """Give the memory of a buffer, in as many pieces as it has regions."""
        gpa, length = buffer
        pieces = []
        while length:
            region = self.region_of(gpa)
            start = gpa - region.gpa
            piece = region.view[start : start + length]
            pieces.append(piece)
            gpa += len(piece)
            length -= len(piece)
        return pieces

    def read(self, buffer: Buffer) -> bytes:
        """Copy out of a buffer."""
        return b"".join(self.views(buffer))

    def write(self, gpa: int, data: bytes) -> None:
        """Copy into guest memory."""
        if self.written is not None:
            first = gpa & -_PAGE
            self.written.update(range(first, gpa + len(data), _PAGE))
        done = 0
        for view in self.views(Buffer(gpa, len(data))):
            view[:] = data[done : done + len(view)]
            done += len(view)

    def allocate(self, length: int, *, alignment: int = 16, contiguous: bool = False) -> Buffer:
        """Reserve guest memory; its contents are whatever was there.

        Args:
            length: bytes, positive.
            alignment: of the guest physical address; a power of two.
            contiguous: all in one region, as rings need.

        Raises:
            StateError: no such room.
        """
        for low, high in self._holes(contiguous):
            start = -(-low // alignment) * alignment
            if start + length <= high:
                self._take(start, start + length)
                self._cursor = start + length
                return Buffer(start, length)
        raise StateError(f"no room for {length} bytes of guest memory")

    def free(self, buffer: Buffer) -> None:
        """Give back what `allocate` gave."""
        start, end = buffer.gpa, buffer.gpa + buffer.length
        i = bisect.bisect(self._free, (start, end))
        if i < len(self._free) and self._free[i][0] == end:
            end = self._free.pop(i)[1]
        if i and self._free[i - 1][1] == start:
            i -= 1
            start = self._free.pop(i)[0]
        self._free.insert(i, (start, end))

    def close(self) -> None:
        """Unmap and close everything. Idempotent."""
        for region in self.regions:
            region.close()

    def _map_region(self, fd: int, size: int, offset: int) -> SharedRegion:
        try:
            region = SharedRegion(fd, self._next_gpa, self._next_uva, size, offset)
        except BaseException:
            os.close(fd)
            raise
        self.regions.append(region)
        self._next_gpa = region.end + self._gap
        self._next_uva += _UVA_STRIDE
        self.free(Buffer(region.gpa, size))
        return region

    def _holes(self, contiguous: bool) -> list[tuple[int, int]]:
        """List where to look for room, best first."""
        holes = self._free
        for region in self._retired:
            holes = [
                piece
                for a, b in holes
                for piece in ((a, min(b, region.gpa)), (max(a, region.end), b))
                if piece[0] < piece[1]
            ]
        if contiguous:
            holes = [
                (max(a, region.gpa), min(b, region.end))
                for a, b in holes
                for region in self.regions
            ]
        if self._spread:
            ahead = [(max(a, self._cursor), b) for a, b in holes if b > self._cursor]
            holes = ahead + holes
        return holes

    def _take(self, start: int, end: int) -> None:
        i = bisect.bisect(self._free, (start, 1 << 64)) - 1
        low, high = self._free[i]
        self._free[i : i + 1] = [(a, b) for a, b in ((low, start), (end, high)) if a < b]


def _create(kind: Kind | MakeFile, size: int) -> int:
    """Make a file of `size` bytes that has no name."""
    if size <= 0 or size % _PAGE:
        raise StateError(f"a region of {size} bytes is not a number of pages")
    if callable(kind):
        return kind(size)
    if kind == "memfd":
        fd = os.memfd_create("vhostblk-client", os.MFD_CLOEXEC)
    else:
        shared = posix_ipc.SharedMemory(None, posix_ipc.O_CREX)
        # Gone from /dev/shm before anything can go wrong; the fd is all that is needed.
        shared.unlink()
        fd = shared.fd
    try:
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd
