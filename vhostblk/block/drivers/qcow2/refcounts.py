"""Who uses which cluster of the file (qcow2 specification, "Host cluster management").

Theory of operation: changes are made in memory and written by `metadata.py`. On the disk a cluster never counts as less
used than it is: what is taken is written before anybody refers to it, and what is given up (`give_up`) counts as used
until nobody on the disk refers to it any more (`settle`), so that it cannot be taken again before. A crash leaves
clusters that nobody uses, at worst.

Context: the control loop.
"""

from __future__ import annotations

from vhostblk.block.drivers.qcow2.header import Header
from vhostblk.block.drivers.qcow2.overlaps import TablePlaces
from vhostblk.block.drivers.qcow2.places import load_places
from vhostblk.block.drivers.qcow2.refcount_blocks import RefcountBlocks
from vhostblk.block.drivers.qcow2.refcount_table import may_be_block
from vhostblk.block.drivers.qcow2.snapshots import inactive_tables
from vhostblk.block.drivers.qcow2.tables import Table, read_table
from vhostblk.block.edge import Edge
from vhostblk.block.iov import IoVec
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.errors import ImageError

# Bytes. Two flushes make them free.
_WORTH_WHILE = 8 << 20


@lean_dataclass(slots=True)
class Old:
    """What a cluster was, and gives up.

    Attributes: is_alone: nobody else uses it.
    """

    offset: int
    length: int
    is_alone: bool = False


class Refcounts(RefcountBlocks):
    """Reference counts of one image.

    Attributes: inactive: places of L2 tables that snapshots use, if somebody wants to know.
    """

    def __init__(
        self, file: Edge, header: Header, table: Table, cache_bytes: int, places: TablePlaces
    ) -> None:
        super().__init__(file, header, table, cache_bytes, places)
        self._cluster_size = header.cluster_size
        self._hint = self._freed = 0
        # Behind the compressed cluster that was last. If a cluster of the file begins there, there is no room.
        self._free_byte = 0
        self.inactive = TablePlaces(header.cluster_bits)

    @classmethod
    async def load(
        cls, file: Edge, header: Header, cache_bytes: int, *, protects_inactive: bool = False
    ) -> Refcounts:
        """Read the table.

        Args:
            protects_inactive: look where the snapshots' L2 tables are, too.

        Raises:
            BlockError: the child's errno.
            ImageError: an entry makes no sense.
        """
        length = header.refcount_table_clusters * header.cluster_size
        table = await read_table(file, header.refcount_table_offset, length // 8)
        places = await load_places(file, header, table)
        refcounts = cls(file, header, table, cache_bytes, places)
        if protects_inactive:
            refcounts.inactive.add_all(await inactive_tables(file, header))
        return refcounts

    # ------------------------------------------------------------------ taking and giving up

    @property
    def has_writes(self) -> bool:
        """Whether something has to be written."""
        return self._blocks.is_dirty or self._table.is_dirty

    @property
    def has_given_up(self) -> bool:
        """Whether something has to be settled."""
        return bool(self._given_up)

    @property
    def could_settle(self) -> bool:
        """Whether so much is going to be free that it is worth while to settle it before the file grows."""
        return self._freed >= _WORTH_WHILE

    @property
    def is_full(self) -> bool:
        """Whether so much waits to be written that it is time."""
        return self._blocks.is_full or len(self._given_up) > 1 << 16

    async def allocate(
        self,
        count: int,
        *,
        behind: int = 0,
        together: bool = False,
        what: str = "data cluster",
    ) -> tuple[int, int]:
        """Take free clusters that are next to each other.

        Args:
            count: how many there should be.
            behind: none before this offset; a multiple of the cluster size.
            together: pass over gaps that have not so many, as QEMU does.
            what: they are for, for messages.

        Returns: the offset of the first, and how many they are: at least one.

        Raises:
            BlockError: EFBIG: the image cannot grow; or the child's errno.
            ImageError: free clusters turn out to be tables.
        """
        await self._file.debug_event("cluster_alloc")
        async with self._lock:
            return await self._allocate(count, behind, count if together else 1, what)

    async def _allocate(
        self, count: int, behind: int = 0, least: int = 1, what: str = "data cluster"
    ) -> tuple[int, int]:
        """Clusters are taken where QEMU takes them, in the same order, so that files are the same."""
        first = max(self._hint, behind >> self._cluster_bits)
        while True:
            first, got = await self.find_free(first, count, least)
            self._check_free(what, first, got)
            await self._file.debug_event("refblock_alloc")
            missing = await self.first_missing(first, got)
            if missing is None:
                await self._file.debug_event("refblock_load")
                break
            await self.add_block(missing, first, first + got)
        await self.count_new(first, got)
        if not behind:
            self._hint = first + got
        return first << self._cluster_bits, got

    async def allocate_at(self, offset: int, count: int) -> int:
        """Take clusters from this place on, if they are free, so that what is written is in one piece.

        Args:
            offset: behind a cluster that was written just now; a multiple of the cluster size.
            count: how many there should be.

        Returns: how many they are.

        Raises: as `allocate`.
        """
        first = offset >> self._cluster_bits
        async with self._lock:
            while True:
                found, got = await self.find_free(first, count, 1)
                if found != first:
                    return 0
                self._check_free("data cluster", first, got)
                missing = await self.first_missing(first, got)
                if missing is None:
                    break
                # As in QEMU, the part for which there is a block is counted already.
                is_first = missing == first // self.per_block
                start = self._hint if is_first else max(self._hint, missing * self.per_block)
                await self.add_block(missing, first, start)
            await self.count_new(first, got)
            return got

    def _check_free(self, what: str, first: int, count: int) -> None:
        """If tables are there, counts are wrong."""
        if not first and self.places.has(0):
            raise ImageError(f"Preventing invalid allocation of {what} at offset 0")
        for places in (self.places, self.inactive):
            places.check(
                "Preventing invalid allocation",
                *(first << self._cluster_bits, count << self._cluster_bits),
            )

    async def allocate_run(self, count: int) -> int:
        """Take clusters that are next to each other, however many, behind all others; with new blocks for them.

        Returns: the offset of the first.

        Raises:
            BlockError: EFBIG: the image cannot grow; or the child's errno.
            ImageError: free clusters turn out to be tables.
        """
        await self._file.debug_event("cluster_alloc")
        async with self._lock:
            return self.add_run(count) << self._cluster_bits

    async def allocate_bytes(self, length: int) -> int:
        """Take room for a compressed cluster, behind the one before if there is some; not more than a cluster.

        Whatever has bytes in a cluster of the file uses it once more.

        Returns: its offset.

        Raises:
            BlockError, ImageError: as `allocate`.
        """
        await self._file.debug_event("cluster_alloc_bytes")
        async with self._lock:
            new = None
            if length > -self._free_byte % self._cluster_size:
                new, _ = await self._allocate(1)
            place = self._free_byte
            room = -place % self._cluster_size
            if room and (new is None or new == place + room):
                index, at = divmod(place >> self._cluster_bits, self.per_block)
                block = await self.existing_block(index)
                # It may have been given up while we waited.
                is_ours = block is not None and self._free_byte == place
                if block is not None and is_ours and block.table[at] < self._most_users:
                    block.table[at] += 1
                    self._blocks.changed(block)
                    self._free_byte = place + length
                    return place
            if new is None:
                new, _ = await self._allocate(1)
            self._free_byte = new + length
            return new

    def skip(self, offset: int, clusters: int) -> None:
        """Do not look for free clusters before the end of this range any more, for now."""
        self._hint = max(self._hint, (offset >> self._cluster_bits) + clusters)

    async def count(self, offset: int) -> int:
        """How many use the cluster at this offset.

        Raises:
            BlockError: the child's errno.
        """
        async with self._lock:
            index, at = divmod(offset >> self._cluster_bits, self.per_block)
            block = await self.existing_block(index)
            return block.table[at] if block is not None else 0

    async def counts(self, first: int, count: int) -> list[int]:
        """How many use each of these clusters, by number.

        Raises:
            BlockError: the child's errno.
        """
        found: list[int] = []
        async with self._lock:
            while len(found) < count:
                index, at = divmod(first + len(found), self.per_block)
                block = await self.existing_block(index)
                length = min(count - len(found), self.per_block - at)
                found += block.table[at : at + length] if block is not None else [0] * length
        return found

    def block_offsets(self) -> list[int]:
        """Where blocks are."""
        return [offset for offset in self._table.entries if offset]

    def give_up(self, offset: int, length: int = 1, *, frees: bool = False) -> None:
        """One user less of the clusters that the range touches, when nobody on the disk refers to them any more.

        Args:
            frees: there is no other user.
        """
        clusters = self._touched(offset, length)
        self._given_up.extend(clusters)
        if frees:
            self._freed += length
        if self._free_byte >> self._cluster_bits in clusters:
            self._free_byte = 0  # the host may be given its room as soon as nobody else is in it

    async def release(self, offset: int, length: int) -> None:
        """Undo `allocate`, or `allocate_bytes`: nobody has referred to these bytes.

        Raises:
            BlockError: the child's errno; those that are left are given up.
        """
        await self._decrement(self._touched(offset, length))

    def _touched(self, offset: int, length: int) -> range:
        last = offset + length - 1 >> self._cluster_bits
        return range(offset >> self._cluster_bits, last + 1)

    def take_given_up(self) -> list[int]:
        """What was given up so far, for `settle` once that is known to the disk."""
        taken, self._given_up, self._freed = self._given_up, [], 0
        return taken

    def not_settled(self, clusters: list[int]) -> None:
        """It is not known to the disk."""
        self._given_up[:0] = clusters

    async def settle(self, clusters: list[int]) -> None:
        """Nobody on the disk refers to these any more.

        Raises:
            BlockError: the child's errno; those that are left are given up again.
            ImageError: a count was 0 already: all counts may be wrong.
        """
        await self._decrement(clusters)

    async def _decrement(self, clusters: list[int] | range) -> None:
        free: int | None = None
        if clusters:
            await self._file.debug_event("cluster_free")
        async with self._lock:
            for done, cluster in enumerate(clusters):
                index, at = divmod(cluster, self.per_block)
                try:
                    block = await self.existing_block(index)
                except BaseException:
                    self._given_up.extend(clusters[done:])
                    self._free_byte = 0  # as in `give_up`
                    raise
                if block is None or not block.table[at]:
                    free = cluster
                    continue
                block.table[at] -= 1
                self._blocks.changed(block)
                if not block.table[at]:
                    self._hint = min(self._hint, cluster)
                    if self._free_byte >> self._cluster_bits == cluster:
                        self._free_byte = 0
        if free is not None:
            raise ImageError(f"Cluster {free} was in use, but its reference count is 0")

    # ------------------------------------------------------------------ getting smaller

    async def drop_empty_blocks(self) -> bool:
        """Forget the blocks that count nothing but themselves, here and on the disk; nobody takes clusters meanwhile.

        Returns: whether there were any.

        Raises:
            BlockError: the child's errno.
        """
        async with self._lock:
            found = []
            for index, offset in enumerate(self._table.entries):
                if (
                    not offset
                    or self._table.has_moved
                    or not may_be_block(offset, self._cluster_size)
                ):
                    continue
                block = await self._blocks.get(offset)
                used = len(block.table) - block.table.count(0)
                here = (offset >> self._cluster_bits) - index * self.per_block
                in_itself = 0 <= here < self.per_block
                if used == in_itself and (not in_itself or block.table[here] == 1):
                    found.append((index, offset, in_itself))
            try:
                for index, _, _ in found:
                    await self._file.pwritev(self._table.offset + 8 * index, IoVec.of(bytes(8)))
                if found:
                    await self._file.flush()
            except BaseException:
                self._table.write_again(index for index, _, _ in found)
                raise
            for index, offset, in_itself in found:
                self._table.removed(index)
                self._blocks.forget(offset)
                self.places.remove(offset)
                if not in_itself:
                    self.give_up(offset)
            return bool(found)
