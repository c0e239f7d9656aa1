"""The front-end's memory in this process: mappings, and snapshots of which are in use.

vhost-user, "Memory access"; rows B13.3 and B13.4 of the block layer hang on the life of regions.

Theory of operation. A `MemTable` never changes: SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG make a
new one out of the old one. Regions that stay are shared between the two and counted, so mappings
live as long as the last table that has them. Whoever exchanges tables closes the old one, once its
data path no longer uses it; `close` unmaps what no other table holds.

A Python memoryview keeps its mapping alive: where views are left at `close`, the mapping goes with
the last of them. Addresses (`Region.hva`) keep nothing alive; a C data path has to have let go.

A front-end may truncate its file at any time, and pages beyond the new end then raise SIGBUS. The
size is checked when mapping; after that only the engine's guard helps, which is not known here.

Knows nothing about sessions, and nothing about what the memory contains.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

from vhostblk.errors import GuestError, PeerError
from vhostblk.vhost.payload import MemoryRegion
from vhostblk.vhost.shared_file import map_file

__all__ = ["MemTable", "Region"]

_LIMIT = 1 << 64


class Region:
    """One mapped region.

    Context: the control loop. Owns: the mapping, while any table holds it.
    """

    def __init__(
        self,
        region: MemoryRegion,
        mapping: mmap.mmap,
        view: memoryview,
        address_of: Callable[..., int],
    ) -> None:
        self.gpa = region.gpa
        self.uva = region.uva
        self.size = region.size
        self._mapping: mmap.mmap | None = mapping
        self._view = view
        self._holders = 0
        self.hva = address_of(self._view)
        """Address of the first byte in this process."""

    def __repr__(self) -> str:
        return f"<region gpa {self.gpa:#x} uva {self.uva:#x} size {self.size:#x}>"

    @property
    def end(self) -> int:
        """First gpa behind the region."""
        return self.gpa + self.size

    def view(self, offset: int, length: int) -> memoryview:
        """Give a writable view; the range must be inside."""
        return self._view[offset : offset + length]

    def hold(self) -> None:
        """Count one more table."""
        self._holders += 1

    def release(self) -> None:
        """Count one table less; the last one unmaps."""
        self._holders -= 1
        if self._holders or self._mapping is None:
            return
        self._view.release()
        mapping, self._mapping = self._mapping, None
        try:
            mapping.close()
        except BufferError:
            # Views are left: the last one to go unmaps, since they hold the only references now.
            pass


class MemTable:
    """An immutable snapshot of guest memory; implements `virtio.memory.GuestMemory`.

    Args:
        address_of: gives the address of a buffer's first byte.
        max_slots: regions a table may have.
        regions: for this module only; begin with an empty table.

    Context: the control loop; `view` and `ring` may be called from anywhere until `close`.
    Owns: its share of the regions.
    """

    def __init__(
        self,
        address_of: Callable[..., int],
        max_slots: int,
        regions: Sequence[Region] = (),
    ) -> None:
        self._address_of = address_of
        self._max_slots = max_slots
        self.regions = tuple(sorted(regions, key=lambda region: region.gpa))
        """Mapped regions by ascending gpa."""
        self._starts = [region.gpa for region in self.regions]
        self._is_closed = False
        for region in self.regions:
            region.hold()

    def replaced(self, regions: Sequence[MemoryRegion], fds: Sequence[int]) -> MemTable:
        """Map all of guest memory anew (SET_MEM_TABLE).

        Args:
            regions, fds: pairs; the fds are borrowed, and not needed once this returns.

        Raises:
            PeerError: too many regions, an overlap in gpa, an empty or wrapping region, a file that
                is too short, or not a file, or cannot be mapped. Nothing stays mapped then.
        """
        if len(regions) != len(fds):
            raise PeerError(f"{len(regions)} regions, {len(fds)} fds")
        return self._with((), list(zip(regions, fds, strict=True)))

    def added(self, region: MemoryRegion, fd: int) -> MemTable:
        """Map one more region (ADD_MEM_REG). Arguments and errors are those of `replaced`."""
        return self._with(self.regions, [(region, fd)])

    def removed(self, region: MemoryRegion) -> MemTable:
        """Leave one region out (REM_MEM_REG).

        Raises:
            PeerError: no region has this gpa, uva and size.
        """
        # vhost-user, REM_MEM_REG: identified by gpa, uva and size; the mmap offset is ignored.
        wanted = (region.gpa, region.uva, region.size)
        kept = [r for r in self.regions if (r.gpa, r.uva, r.size) != wanted]
        if len(kept) == len(self.regions):
            raise PeerError(f"{region} is not mapped")
        return MemTable(self._address_of, self._max_slots, kept)

    def close(self) -> None:
        """Let go of the regions. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            for region in self.regions:
                region.release()

    def view(self, gpa: int, length: int) -> list[memoryview]:
        """See `GuestMemory.view`."""
        views = []
        index = bisect_right(self._starts, gpa) - 1
        while length > 0:
            if not 0 <= index < len(self.regions) or not self.regions[index].gpa <= gpa:
                break
            region = self.regions[index]
            step = min(length, region.end - gpa)
            if step <= 0:
                break
            views.append(region.view(gpa - region.gpa, step))
            gpa += step
            length -= step
            index += 1
        if length or not views:
            raise GuestError(f"guest physical address {gpa:#x} is outside guest memory")
        return views

    def ring(self, address: int, length: int) -> memoryview:
        """See `GuestMemory.ring`; `address` is the front-end's (uva)."""
        # Regions may overlap in uva where a VMM shows the same memory twice: the first one does.
        for region in self.regions:
            offset = address - region.uva
            if offset >= 0 and offset + length <= region.size:
                return region.view(offset, length)
        raise GuestError(f"[{address:#x}, +{length:#x}) in the front-end is not guest memory")

    def _with(self, kept: Sequence[Region], new: list[tuple[MemoryRegion, int]]) -> MemTable:
        if len(kept) + len(new) > self._max_slots:
            raise PeerError(f"{len(kept) + len(new)} regions, {self._max_slots} slots")
        ranges = [(r.gpa, r.size) for r in kept]
        for region, _ in new:
            _check(region)
            ranges.append((region.gpa, region.size))
        ranges.sort()
        for (gpa, size), (following, _) in pairwise(ranges):
            if gpa + size > following:
                raise PeerError(f"regions overlap at guest physical address {following:#x}")
        mapped: list[Region] = []
        try:
            for region, fd in new:
                mapping, view = map_file(fd, region.mmap_offset, region.size, region)
                mapped.append(Region(region, mapping, view, self._address_of))
        except PeerError:
            for done in mapped:
                done.hold()
                done.release()
            raise
        return MemTable(self._address_of, self._max_slots, [*kept, *mapped])


def _check(region: MemoryRegion) -> None:
    if not region.size:
        raise PeerError(f"{region}: empty")
    if region.gpa + region.size >= _LIMIT or region.uva + region.size >= _LIMIT:
        raise PeerError(f"{region}: wraps around")
