"""What the tables of an image say about its clusters, and whether they agree (qcow2 specification, all of it).

Theory of operation: everything that refers to clusters is read: the header, the active L1 table and those of all
snapshots, L2 tables, reference counts, the snapshot table, bitmaps. Each reference is counted (`used`), and then
compared to what the image has recorded. An L2 table that several L1 tables share is read once. What is counted as wrong
is what QEMU counts.

Memory is bounded by `most_bytes` for each of the two tallies; time by how much of the file there really is: tables that
are nothing but holes are not read, and tables may not overlap without end.

Context: the control loop; nobody changes the image meanwhile. Only `repair.py` writes.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Mapping
from typing import TypeAlias

from vhostblk.block.check import CheckResult
from vhostblk.block.drivers.qcow2.bitmaps import entry_problem, load_directory
from vhostblk.block.drivers.qcow2.entries import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    OFFSET_MASK,
    EntryReader,
)
from vhostblk.block.drivers.qcow2.header import SUBCLUSTERS, Header
from vhostblk.block.drivers.qcow2.l2_table import L2Entries, L2Table
from vhostblk.block.drivers.qcow2.recorded import BLOCK_RESERVED, RecordedCounts
from vhostblk.block.drivers.qcow2.snapshots import SnapshotTable
from vhostblk.block.drivers.qcow2.tables import (
    OFFSETS,
    Table,
    read_bytes,
)
from vhostblk.block.drivers.qcow2.tally import Tally
from vhostblk.block.edge import Edge
from vhostblk.block.flags import StatusFlag
from vhostblk.block.status import block_status
from vhostblk.errors import BlockError, ImageError

MOST_BYTES = 1 << 30
"""For counts: enough for 32 TiB of 64 KiB clusters."""
_MOST_CLUSTERS = (1 << 31) - 1
_ZERO = 1
_ALL = (1 << SUBCLUSTERS) - 1
# Bits of a standard descriptor that have no meaning.
_L2_RESERVED = 0x3F00_0000_0000_01FE
# L2 tables to remember before they are read, so that those that are shared are read once.
_AT_ONCE = 1 << 18
_PIECE = 1 << 20
_MOST_MISALIGNED = 1 << 16
# All tables together have that many bytes more than the file at most, if they are no trick.
_SLACK = 64 << 20
_OFTEN = 16
# Lines about a table that are said again.
_MOST_HEARD = 1 << 14


# An entry, whether its table is the active one, None, its number; or where a table is, which comes before its entries.
_L1Entry: TypeAlias = tuple[int, bool, tuple[int, int] | None, int]


class Survey:
    """One look through an image.

    Args:
        result: where findings go.
        fixes: errors are going to be repaired.

    Attributes:
        used: how often each cluster is referred to.
        recorded: what the image says about that.
        entries: what entries of L2 tables are like.
        clusters: of the file.
        structural: corruptions besides counts that are too low.
        is_cut: something begins in the file and ends behind it, so what it uses was not counted.
        must_rebuild: reference counts cannot be repaired where they are.
        misaligned: entries for zeroes whose place, which nobody needs, is wrong: table, index, bitmap. They are not
            counted at all, if errors are going to be repaired.
    """

    def __init__(
        self,
        file: Edge,
        header: Header,
        result: CheckResult,
        *,
        fixes: bool = False,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.file = file
        self.header = header
        self.result = result
        self.used = Tally(header.refcount_order, most_bytes)
        self.recorded = RecordedCounts(file, header, most_bytes)
        self.entries = L2Entries(header)
        self.clusters = 0
        self.structural = 0
        self.must_rebuild = self.is_cut = False
        self.misaligned: list[tuple[int, int, int]] = []
        self._fixes = fixes
        self._entries = EntryReader(header)
        self._extended, self._has_data_file = header.has_subclusters, header.has_data_file
        self._size = header.cluster_size
        self._bits = header.cluster_bits
        self._length = file.node.length
        self._most_read = self._budget = 0
        self._heard: list[str] | None = None

    # ------------------------------------------------------------------ counting

    async def count(self, snapshots: SnapshotTable) -> None:
        """Count all references.

        Args:
            snapshots: the image's.

        Raises:
            BlockError: the child's errno; EFBIG: too large to be checked.
            ImageError: something that names clusters cannot be read, so nobody knows which ones are free.
        """
        header, result = self.header, self.result
        self.clusters = -(-self._length // self._size)
        if self.clusters > _MOST_CLUSTERS:
            raise ImageError(f"The file has too many clusters to be checked: {self.clusters}")
        result.total_clusters = -(-header.size // self._size)
        self._most_read = min(self._length, _OFTEN * await self._allocated()) + _SLACK
        self._refer(0, self._size)
        l1_tables = [(header.l1_offset, header.l1_entries, True)]
        if header.has_data_file and snapshots.snapshots:
            self.wrong(f"ERROR {len(snapshots.snapshots)} snapshots in image with data file")
        bad = []
        for one in snapshots.snapshots:
            if problem := one.l1_problem(self._size):
                bad.append(f"ERROR snapshot {one.id} ({one.name}) {problem}")
            else:
                l1_tables += [(one.l1_offset, one.l1_entries, False)]
        async for table in self.l2_tables(l1_tables, check=True):
            self._count_l2(table)
        for message in bad:
            self.wrong(message)
        self._refer(snapshots.offset, snapshots.length)
        length = header.refcount_table_clusters * self._size
        self._refer(header.refcount_table_offset, length)
        self._refer(*header.crypt_area)
        await self._count_bitmaps()
        await self.recorded.load()
        self._count_blocks()
        self.structural = result.corruptions

    async def _allocated(self) -> int:
        """Bytes of the file that are not holes, about."""
        try:
            return await self.file.node.driver_allocated_size()
        except BlockError:
            return self._length

    def wrong(self, message: str, times: int = 1) -> None:
        """Something is; the message is said once, and again wherever the same table is used again."""
        self.result.corruptions += times
        self.say(message)

    def say(self, message: str) -> None:
        """One line for people, in the words of QEMU."""
        self.result.say(message)
        if self._heard is not None and len(self._heard) < _MOST_HEARD:
            self._heard.append(message)

    def _refer(self, offset: int, length: int, times: int = 1) -> bool:
        """So many references to clusters that the range touches. Returns whether some cannot be counted."""
        if not length:
            return False
        if offset + length - self._length >= self._size:
            self.wrong(
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more:"
                f" offset 0x{offset:x} size 0x{length:x}",
                times,
            )
            self.is_cut |= offset < self._length
            return False
        first = offset >> self._bits
        last = offset + length - 1 >> self._bits
        self.clusters = max(self.clusters, last + 1)
        lost = self.used.add(first, last + 1 - first, times)
        for cluster, count in lost:
            self.wrong(f"ERROR: overflow cluster offset=0x{cluster << self._bits:x}", count)
            self.say(
                "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy"
                " if the image cannot be opened for writing"
            )
        return bool(lost)

    # ------------------------------------------------------------------ L1 and L2 tables

    async def l2_tables(
        self,
        l1_tables: list[tuple[int, int, bool]],
        *,
        check: bool = False,
        said_before: Mapping[int, str] | None = None,
    ) -> AsyncIterator[L2Table]:
        """All L2 tables of these L1 tables (offset, entries, is the active one), each once, mostly.

        Args:
            check: count references to both kinds, and what is wrong with the L1 tables.
            said_before: what to say before the table of an L1 entry, by the number of that.
        """
        self._budget = self._most_read
        said_before = said_before or {}
        batch: list[_L1Entry] = []
        for offset, entries, is_active in l1_tables:
            if check:
                batch.append((0, False, (offset, entries * 8), 0))
            for at in range(0, entries * 8, _PIECE):
                length = min(_PIECE, entries * 8 - at)
                table = await self._table_or_nothing(offset + at, length)
                batch += [
                    (entry, is_active, None, index)
                    for index, entry in enumerate(table, at // 8)
                    if entry and (check or entry & OFFSET_MASK)
                ]
                if len(batch) >= _AT_ONCE:
                    async for read in self._read_all(batch, said_before, check=check):
                        yield read
                    batch = []
        async for read in self._read_all(batch, said_before, check=check):
            yield read

    def _check_l1_entry(self, entry: int, table: int) -> None:
        if entry & L1_RESERVED:
            self.wrong(f"ERROR found L1 entry with reserved bits set: {entry:x}")
        self._refer(table, self._size)
        if table % self._size:
            self.wrong(
                f"ERROR l2_offset={table:x}: Table is not cluster aligned; L1 entry corrupted"
            )

    async def _read_all(
        self, batch: list[_L1Entry], said_before: Mapping[int, str], *, check: bool
    ) -> AsyncIterator[L2Table]:
        """Each table once, where it is met first; what was said then is said again where it is met again."""
        found: dict[int, tuple[int, int]] = {}
        for entry, is_active, *_ in batch:
            if entry:
                times, active = found.get(entry & OFFSET_MASK, (0, 0))
                found[entry & OFFSET_MASK] = (times + 1, active + is_active)
        heard: dict[int, list[str]] = {}
        for entry, _, l1_table, index in batch:
            if l1_table is not None:
                self._refer(*l1_table)
                continue
            offset = entry & OFFSET_MASK
            if check:
                self._check_l1_entry(entry, offset)
            if index in said_before:
                self.result.say(said_before[index])
            if offset in heard:
                for message in heard[offset]:
                    self.result.say(message)
                continue
            lines: list[str] = []
            heard[offset] = lines
            # Others want to do something, too.
            await asyncio.sleep(0)
            table = await self._table_or_nothing(offset, self._size)
            if not table:
                continue
            self._heard = lines
            if self.header.has_subclusters:
                yield L2Table(offset, table[::2], table[1::2], *found[offset])
            else:
                yield L2Table(offset, table, None, *found[offset])
            self._heard = None

    async def _table_or_nothing(self, offset: int, length: int) -> Table:
        """The table; an empty one if it is nothing but zeroes."""
        if offset >= self._length:
            return array("Q")
        inside = min(length, self._length - offset)
        status = await block_status(self.file.node, offset, inside)
        if status.flags & StatusFlag.ZERO and status.length >= inside:
            return array("Q")
        self._budget -= length
        if self._budget < 0:
            raise ImageError("Tables overlap: there are more than the file has room for")
        data = await read_bytes(self.file, offset, length)
        return OFFSETS.decode(data) if data != bytes(length) else array("Q")

    def _count_l2(self, table: L2Table) -> None:
        if self.entries.is_scattered(table) and self._count_scattered(table):
            return
        expected = 0
        for index, count, entry, bitmap in self.entries.runs(table):
            if entry & COMPRESSED:
                self._count_compressed(table, index, entry, bitmap)
                continue
            offset = entry & OFFSET_MASK
            if entry & _L2_RESERVED:
                self._wrong_run(
                    "ERROR found l2 entry with reserved bits set: ", entry, count, table.times
                )
            if not self.entries.has_place(entry):
                if self._extended and bitmap & _ALL:
                    for _ in range(count):
                        self.wrong(
                            "ERROR: Unallocated cluster has non-zero subcluster allocation map",
                            table.times,
                        )
                continue
            if bitmap >> SUBCLUSTERS & bitmap:
                for at in range(count):
                    self.wrong(
                        f"ERROR offset={offset + at * self._size:x}: Allocated cluster has corrupted"
                        " subcluster allocation bitmap",
                        table.times,
                    )
            if offset % self._size and self._is_dropped(table, index, entry, bitmap):
                continue
            result = self.result
            result.allocated_clusters += count * table.active
            if expected and offset != expected:
                result.fragmented_clusters += table.active
            expected = offset + count * self._size
            if self._has_data_file:
                continue
            if offset + count * self._size <= self._length:
                self._refer(offset, count * self._size, table.times)
            else:
                for at in range(count):
                    self._refer(offset + at * self._size, self._size, table.times)

    def _count_scattered(self, table: L2Table) -> bool:
        """Count each cluster; False, and nothing is counted: something may be wrong with one."""
        entries, size = table.entries, self._size
        odd = _L2_RESERVED | COMPRESSED | OFFSET_MASK & size - 1
        if any(entry & odd for entry in entries):
            return False
        clusters = [(entry & OFFSET_MASK) >> self._bits for entry in entries if entry & OFFSET_MASK]
        if not clusters:
            return True
        if max(clusters) >= self._length // size or not self.used.add_each(clusters, table.times):
            return False
        self.result.allocated_clusters += len(clusters) * table.active
        following = clusters[1:]
        jumps = sum([after - one != 1 for one, after in zip(clusters, following, strict=False)])
        self.result.fragmented_clusters += jumps * table.active
        return True

    def _wrong_run(self, message: str, entry: int, count: int, times: int) -> None:
        step = self._size if entry & OFFSET_MASK else 0
        for at in range(count):
            self.wrong(f"{message}{entry + at * step:x}", times)

    def _is_dropped(self, table: L2Table, index: int, entry: int, bitmap: int) -> bool:
        """A place that no cluster can have is wrong; whether it is going to be dropped, so that it does not count."""
        offset = entry & OFFSET_MASK
        if bitmap & _ALL if self.header.has_subclusters else not entry & _ZERO:
            what = "Data cluster is not properly aligned; L2 entry corrupted."
            self.wrong(f"ERROR offset={offset:x}: {what}", table.times)
            return False
        what = (
            f"offset={offset:x}: Preallocated cluster is not properly aligned; L2 entry corrupted."
        )
        if self._fixes and len(self.misaligned) < _MOST_MISALIGNED:
            self.result.say(f"Repairing {what}")
            self.misaligned.append((table.offset, index, bitmap))
            return True
        self.wrong(f"ERROR {what}", table.times)
        return False

    def _count_compressed(self, table: L2Table, index: int, entry: int, bitmap: int) -> None:
        host, length = self._entries.compressed_place(entry)
        if entry & COPIED:
            self.wrong(
                f"ERROR: coffset=0x{host:x}: copied flag must never be set for compressed clusters",
                table.times,
            )
        what = f"entry=0x{entry & ~COPIED:x}"
        if self.header.has_data_file:
            self.wrong(f"ERROR compressed cluster {index} with data file, {what}", table.times)
            return
        if bitmap:
            self.wrong(
                f"ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, {what}",
                table.times,
            )
            return
        self._refer(host, length, table.times)
        self.result.allocated_clusters += table.active
        self.result.compressed_clusters += table.active
        self.result.fragmented_clusters += table.active

    # ------------------------------------------------------------------ bitmaps and reference counts

    async def _count_bitmaps(self) -> None:
        directory = await load_directory(self.file, self.header)
        for offset, length in directory.places():
            self._refer(offset, length)
        for bitmap in directory.bitmaps:
            for at in range(0, bitmap.table_bytes, _PIECE):
                length = min(_PIECE, bitmap.table_bytes - at)
                for entry in await self._table_or_nothing(bitmap.table_offset + at, length):
                    if entry_problem(entry, self._size):
                        self.result.corruptions += 1  # which QEMU has no words for
                    elif entry & OFFSET_MASK:
                        self._refer(entry & OFFSET_MASK, self._size)

    def _count_blocks(self) -> None:
        for index, entry in enumerate(self.recorded.table):
            offset = entry & ~BLOCK_RESERVED
            if entry & BLOCK_RESERVED:
                self._wrong_block(f"ERROR refcount table entry {index} has reserved bits set")
            elif offset % self._size:
                self._wrong_block(
                    f"ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"
                )
            elif offset >> self._bits >= self.clusters:
                word = "Repairing" if self._fixes else "ERROR"
                self.wrong(f"{word} refcount block {index} is outside image")
                # Leaks can be repaired without it, unless it should have counted something.
                self.must_rebuild |= self._fixes
            elif offset:
                if self._refer(offset, self._size):
                    self.must_rebuild = True
                elif (count := self.used.get(offset >> self._bits)) != 1:
                    self._wrong_block(f"ERROR refcount block {index} refcount={count}")

    def _wrong_block(self, message: str) -> None:
        self.wrong(message)
        self.must_rebuild = True

    async def compare(self, *, says: bool = True) -> None:
        """Compare what is recorded to what was counted.

        Args:
            says: what differs is said.

        Raises:
            BlockError: the child's errno.
        """
        recorded, result = self.recorded, self.result
        self.must_rebuild |= await recorded.compare(self.used, self.clusters, result, says=says)
