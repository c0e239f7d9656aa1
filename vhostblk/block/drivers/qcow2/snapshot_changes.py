"""Making internal snapshots, deleting them, going back to one: what becomes of tables and counts.

Theory of operation: each change is a new set of roots: the active L1 table and those of the snapshots. Counts of all
that is below a root that comes or goes change by one. Then the flags of the active tables (nobody else uses the
cluster) are made right, and L2 tables where that changes something get a new place. All of it is built in a
`Shadow`; the caller writes the header.

Context: the control loop, in an image that nobody else uses meanwhile.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeAlias

from vhostblk.block.drivers.qcow2.entries import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    OFFSET_MASK,
    ZERO,
    EntryReader,
)
from vhostblk.block.drivers.qcow2.header import MAX_SNAPSHOTS, Header
from vhostblk.block.drivers.qcow2.metadata import Metadata
from vhostblk.block.drivers.qcow2.overlaps import TablePlaces
from vhostblk.block.drivers.qcow2.shadow import Shadow
from vhostblk.block.drivers.qcow2.snapshots import (
    MAX_TABLE,
    NO_ICOUNT,
    Snapshot,
    SnapshotTable,
    load_snapshots,
)
from vhostblk.block.drivers.qcow2.tables import OFFSETS, Table, read_table
from vhostblk.block.edge import Edge
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError, ImageError

Fields: TypeAlias = dict[str, int]
"""What the header is going to say."""


class SnapshotChange:
    """One change of an image, on its way.

    Args:
        places: of all tables that there are now.
        snapshots: those that there are now.
    """

    def __init__(
        self,
        file: Edge,
        header: Header,
        shadow: Shadow,
        places: TablePlaces,
        snapshots: SnapshotTable,
    ) -> None:
        self._file = file
        self._header = header
        self._shadow = shadow
        self._places = places
        self._snapshots = snapshots
        self._entries = EntryReader(header)
        self._active: set[int] = set()  # L2 tables of the active L1 table, which are in `places`

    # ------------------------------------------------------------------ the changes

    async def create(self, snapshot: Snapshot) -> Fields:
        """A further snapshot, of what is active now; where its L1 table is, is not said yet.

        Raises:
            BlockError: EFBIG: there are too many; EINVAL: reference counts cannot be as large; the child's errno.
            ImageError: a table is wrong.
        """
        active = await self._load_active()
        await self._add_tree(active, 1)
        active = await self._with_flags(active, shared=True)
        inactive = OFFSETS.decode(OFFSETS.encode(active))
        for index, entry in enumerate(inactive):
            inactive[index] = entry & ~COPIED
        made = replace(snapshot, l1_offset=await self._write_l1(inactive), l1_entries=len(inactive))
        fields = await self._replace_active(active)
        return fields | await self._replace_snapshots([*self._snapshots.snapshots, made])

    async def rewrite(self) -> Fields:
        """The table, as version 3 wants it; raises as `create`."""
        return await self._replace_snapshots(list(self._snapshots.snapshots))

    async def without_zeroes(self, *, has_backing: bool) -> Fields:
        """All snapshots without zero clusters, which version 2 does not have; active tables have none any more.

        Args:
            has_backing: what is not allocated may show something: there are clusters of zeroes instead.

        Raises:
            BlockError, ImageError: as `create`; EFBIG, EINVAL: an L1 table cannot be.
        """
        expanded: dict[int, int] = {}
        fresh: list[int] = []
        trees: list[tuple[Table, Table]] = []
        snapshots: list[Snapshot] = []
        await self._load_active()
        for one in self._snapshots.snapshots:
            one.check_l1(self._header.cluster_size)
            old = await self._load_l1(one.l1_offset, one.l1_entries)
            new = old[:]
            for index, entry in enumerate(old):
                if table := entry & OFFSET_MASK:
                    if table not in expanded:
                        expanded[table] = await self._expand(table, fresh, has_backing=has_backing)
                    if expanded[table] != table:
                        new[index] = expanded[table]
            if new == old:
                snapshots.append(one)
                continue
            trees.append((old, new))
            await self._give_up(one.l1_offset, one.l1_bytes)
            snapshots.append(replace(one, l1_offset=await self._write_l1(new)))
        # What is new is counted once already, whoever uses it.
        for _, new in trees:
            await self._add_tree(new, 1)
        await self._shadow.add(fresh, -1)
        for old, _ in trees:
            await self._add_tree(old, -1)
        fields = await self._replace_active(await self._with_flags(await self._load_active()))
        return fields | await self._replace_snapshots(snapshots)

    async def _expand(self, table: int, fresh: list[int], *, has_backing: bool) -> int:
        """Where an L2 table is that has clusters of zeroes, or none, instead of zero clusters; adds what is new."""
        l2, size = await self._load_l2(table), self._header.cluster_size
        zeroes = [index for index, entry in enumerate(l2) if entry & (ZERO | COMPRESSED) == ZERO]
        if not zeroes:
            return table
        for index in zeroes:
            l2[index] = 0
            if has_backing:
                l2[index] = await self._shadow.allocate(1)
                fresh.append(l2[index] // size)
                await self._file.pwrite_zeroes(l2[index], size)
        place = await self._shadow.allocate(1)
        fresh.append(place // size)
        await self._file.pwritev(place, IoVec.of(OFFSETS.encode(l2)))
        return place

    async def delete(self, snapshot: Snapshot) -> Fields:
        """One snapshot less; raises as `create`; BlockError EFBIG, EINVAL: its L1 table cannot be."""
        snapshot.check_l1(self._header.cluster_size)
        await self._load_active()
        await self._add_tree(await self._load_l1(snapshot.l1_offset, snapshot.l1_entries), -1)
        await self._give_up(snapshot.l1_offset, snapshot.l1_bytes)
        fields = await self._replace_active(await self._with_flags(await self._load_active()))
        left = [one for one in self._snapshots.snapshots if one.id != snapshot.id]
        return fields | await self._replace_snapshots(left)

    async def go_to(self, snapshot: Snapshot, size: int) -> Fields:
        """What the snapshot shows becomes active, in a disk of this size; raises as `delete`."""
        snapshot.check_l1(self._header.cluster_size)
        old = await self._load_active()
        wanted = await self._load_l1(snapshot.l1_offset, snapshot.l1_entries)
        await self._add_tree(wanted, 1)
        await self._add_tree(old, -1)
        active = await self._with_flags(wanted)
        missing = self._header.l1_entries_needed(size) - len(active)
        active.extend([0] * max(missing, 0))
        return {**await self._replace_active(active), "size": size}

    # ------------------------------------------------------------------ trees

    async def _load_active(self) -> Table:
        l1 = await self._load_l1(self._header.l1_offset, self._header.l1_entries)
        self._active = {entry & OFFSET_MASK for entry in l1}
        return l1

    async def _load_l1(self, offset: int, entries: int) -> Table:
        l1 = await read_table(self._file, offset, entries)
        for index, entry in enumerate(l1):
            if entry & L1_RESERVED or entry & OFFSET_MASK & (self._header.cluster_size - 1):
                raise ImageError(f"L2 table offset {entry:#x} unaligned (L1 index: {index})")
        return l1

    async def _load_l2(self, offset: int) -> Table:
        if offset not in self._active and self._places.has(offset):
            raise ImageError(f"L2 table at offset {offset:#x} overlaps another table")
        return await read_table(self._file, offset, self._header.cluster_size // 8)

    async def _add_tree(self, l1: Table, change: int) -> None:
        bits = self._header.cluster_bits
        for entry in l1:
            if table := entry & OFFSET_MASK:
                used = self._used_by(await self._load_l2(table))
                if self._places.has_any(used):
                    raise ImageError(
                        f"L2 table at offset {table:#x} says that a table is guest data"
                    )
                await self._shadow.add([table >> bits, *used], change)

    def _used_by(self, l2: Table) -> list[int]:
        """The clusters that entries of an L2 table refer to."""
        bits, below = self._header.cluster_bits, self._header.cluster_size - 1
        used: list[int] = []
        for entry in l2[::2] if self._header.has_subclusters else l2:
            if entry & COMPRESSED:
                host, length = self._entries.compressed_place(entry)
                used += range(host >> bits, (host + length - 1 >> bits) + 1)
            elif host := entry & OFFSET_MASK:
                if host & below:
                    raise ImageError(f"Cluster allocation offset {host:#x} unaligned")
                used.append(host >> bits)
        return used

    async def _with_flags(self, l1: Table, *, shared: bool = False) -> Table:
        """An active L1 table, whose flags, and those of its L2 tables, are right.

        Args:
            shared: a snapshot refers to the same tables, wherever they will be.
        """
        bits = self._header.cluster_bits
        users = 2 if shared else 1
        active = l1[:]
        for index, entry in enumerate(l1):
            table = entry & OFFSET_MASK
            if not table:
                active[index] = 0
                continue
            l2 = await self._load_l2(table)
            if await self._set_flags(l2):
                await self._shadow.add([table >> bits], -users)
                table = await self._shadow.allocate(1)
                await self._shadow.add([table >> bits] * (users - 1), 1)
                await self._file.pwritev(table, IoVec.of(OFFSETS.encode(l2)))
            (count,) = await self._shadow.counts([table >> bits])
            active[index] = table | COPIED if count == 1 else table
        return active

    async def _set_flags(self, l2: Table) -> bool:
        """Make the flags of a table right; returns whether any was not."""
        bits, step = self._header.cluster_bits, 2 if self._header.has_subclusters else 1
        indices = [
            index
            for index in range(0, len(l2), step)
            if l2[index] & OFFSET_MASK and not l2[index] & COMPRESSED
        ]
        places = [(l2[index] & OFFSET_MASK) >> bits for index in indices]
        changed = False
        for index, count in zip(indices, await self._shadow.counts(places), strict=True):
            if (count == 1) != bool(l2[index] & COPIED):
                l2[index] ^= COPIED
                changed = True
        return changed

    # ------------------------------------------------------------------ roots

    async def _replace_active(self, l1: Table) -> Fields:
        await self._give_up(self._header.l1_offset, self._header.l1_entries * 8)
        return {"l1_offset": await self._write_l1(l1), "l1_entries": len(l1)}

    async def _write_l1(self, l1: Table) -> int:
        return await self._write_anew(OFFSETS.encode(l1))

    async def _replace_snapshots(self, snapshots: list[Snapshot]) -> Fields:
        if len(snapshots) > MAX_SNAPSHOTS:
            raise BlockError(errno.EFBIG, "there are too many snapshots")
        table = b"".join(
            replace(
                one,
                # Version 2 need not say them; then they are those of the disk as it is.
                disk_size=self._header.size if one.disk_size is None else one.disk_size,
                icount=NO_ICOUNT if one.icount is None else one.icount,
            ).to_bytes()
            for one in snapshots
        )
        if len(table) > MAX_TABLE:
            raise BlockError(errno.EFBIG, "the snapshot table cannot grow any more")
        await self._give_up(self._snapshots.offset, self._snapshots.length)
        return {"snapshots": len(snapshots), "snapshots_offset": await self._write_anew(table)}

    async def _write_anew(self, data: bytes) -> int:
        """Where it is; 0 if there is nothing to write."""
        if not data:
            return 0
        offset = await self._shadow.allocate(-(-len(data) // self._header.cluster_size))
        await self._file.pwritev(offset, IoVec.of(data))
        return offset

    async def _give_up(self, offset: int, length: int) -> None:
        bits = self._header.cluster_bits
        await self._shadow.add(
            range(offset >> bits, (offset + length - 1 >> bits) + 1 if length else 0), -1
        )


Build: TypeAlias = Callable[[SnapshotChange], Awaitable[Fields]]


class HalfWrittenError(Exception):
    """The header could be written neither as it is going to be nor as it was: nobody knows what the image is."""


async def switch(file: Edge, metadata: Metadata, build: Build) -> Shadow:
    """Change an image that nobody uses, from one moment to the next; what is in memory is out of date then.

    Returns: what became of the counts.

    Raises:
        BlockError: the child's errno, or those of the change; the image is as it was.
        ImageError: a table is wrong; the image is as it was.
        HalfWrittenError: nobody may write to the image any more.
    """
    header, places = metadata.header, metadata.refcounts.places
    shadow = await Shadow.load(file, header, places)
    change = SnapshotChange(file, header, shadow, places, await load_snapshots(file, header))
    fields = await build(change)
    fields |= await shadow.write()
    replace(header, **fields).check()  # type: ignore[arg-type]
    await file.flush()
    try:
        await metadata.write_header(**fields)
        await file.flush()
    except BlockError as error:
        try:
            await metadata.write_header(**{name: getattr(header, name) for name in fields})
            await file.flush()
        except BlockError:
            raise HalfWrittenError(error.strerror) from error
        raise
    return shadow
