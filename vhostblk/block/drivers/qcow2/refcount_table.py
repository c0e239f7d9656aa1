"""The table that says where blocks of reference counts are (qcow2 specification, "Host cluster management").

What is changed is written by `metadata.py`: single entries, or all of it if the table has moved. Knows nothing about
what the blocks say.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from vhostblk.block.drivers.qcow2.cache import Slice
from vhostblk.block.drivers.qcow2.header import MAX_OFFSET, MAX_REFCOUNT_TABLE_BYTES
from vhostblk.block.drivers.qcow2.tables import OFFSETS, Table, entry_writes
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.errors import BlockError


@lean_dataclass(slots=True)
class RefcountWrites:
    """What has to be written, in this order: blocks, then the entries of the table that name them.

    Attributes: table: several groups, with a flush between: a block may be counted by one of the group before. moved:
        the table's new offset and size in clusters, if it has moved: for the header.
    """

    blocks: list[tuple[int, bytes]]
    table: list[list[tuple[int, bytes]]]
    moved: tuple[int, int] | None
    taken: list[Slice]

    @classmethod
    def none(cls) -> RefcountWrites:
        """If nothing is written: it is put off."""
        return cls([], [], None, [])


class RefcountTable:
    """The table of one image.

    Args:
        covers: bytes of the file that a block is for.

    Attributes: entries: places of blocks in the file, in bytes; 0: there is none. offset: of the table. has_moved: all
        of it has to be written, where nobody looks for it yet.

    Context: the control loop.
    """

    def __init__(self, entries: Table, offset: int, covers: int) -> None:
        self.entries = entries
        self.offset = offset
        self.has_moved = False
        self._covers = covers
        # In the order in which they were made: a block is counted by itself, or by one that was there before.
        self._dirty: dict[int, None] = {}

    @property
    def length(self) -> int:
        """Bytes."""
        return len(self.entries) * 8

    @property
    def is_dirty(self) -> bool:
        """Whether entries have to be written."""
        return bool(self._dirty)

    @property
    def end(self) -> int:
        """Behind the last entry that has a block."""
        return next((at + 1 for at in reversed(range(len(self.entries))) if self.entries[at]), 0)

    def get(self, index: int) -> int:
        """Where a block is; 0: there is none, or no entry for it."""
        return self.entries[index] if index < len(self.entries) else 0

    def set(self, index: int, offset: int) -> None:
        """A block has a place."""
        self.entries[index] = offset
        self._dirty[index] = None

    def removed(self, index: int) -> None:
        """A block has none any more, in the file, too."""
        self.entries[index] = 0
        self._dirty.pop(index, None)

    def move(self, offset: int, entries: int) -> None:
        """To another place, where there is room for more."""
        self.entries.extend([0] * (entries - len(self.entries)))
        self.offset = offset
        self.has_moved = True

    def take_writes(self) -> tuple[list[list[tuple[int, bytes]]], bool]:
        """What has to be written, and whether it has moved; not dirty any more."""
        moved, self.has_moved = self.has_moved, False
        if moved:
            writes = [[(self.offset, OFFSETS.encode(self.entries))]]
        else:
            writes = [
                entry_writes(self.offset, self.entries, indices) for indices in self._groups()
            ]
        self._dirty.clear()
        return writes, moved

    def _groups(self) -> list[list[int]]:
        groups: list[list[int]] = []
        for index in self._dirty:
            home = self.entries[index] // self._covers
            if not groups or (home != index and home in groups[-1]):
                groups.append([])
            groups[-1].append(index)
        return groups

    def not_written(self, writes: list[list[tuple[int, bytes]]], *, moved: bool) -> None:
        """What was taken still has to be."""
        self.has_moved |= moved
        if not moved:
            self.write_again((at - self.offset) // 8 for group in writes for at, _ in group)

    def write_again(self, indices: Iterable[int]) -> None:
        """Nobody knows what the file has there."""
        self._dirty = {**dict.fromkeys(indices), **self._dirty}


def larger_table(index: int, least: int, per_block: int, cluster_size: int) -> tuple[int, int]:
    """A table, in clusters that new blocks from `index` on are for; as large as QEMU would make it.

    Args:
        least: entries that it has.

    Returns: blocks and clusters of the table.

    Raises:
        BlockError: EFBIG: nobody would read one of that size.
    """
    per_cluster = cluster_size // 8
    counted = index * per_block
    _, table = _fixed_point(counted, per_block, per_cluster)
    total, _ = _fixed_point(counted + -(-table // 2), per_block, per_cluster)
    blocks = max(total - index, 1)
    entries = max(total + -(-total // 2), least)
    clusters = -(-entries // per_cluster)
    while blocks * per_block < blocks + clusters:
        blocks += 1
        clusters = max(clusters, -(-(index + blocks) // per_cluster))
    if clusters * cluster_size > MAX_REFCOUNT_TABLE_BYTES:
        raise BlockError(errno.EFBIG, "the reference count table cannot grow any more")
    return blocks, clusters


def _fixed_point(clusters: int, per_block: int, per_cluster: int) -> tuple[int, int]:
    """Blocks, and clusters of a table, that count so many clusters and themselves."""
    blocks = table = 0
    while True:
        more = -(-(clusters + table + blocks) // per_block)
        if more == blocks:
            return blocks, table
        blocks, table = more, -(-more // per_cluster)


def may_be_block(entry: int, cluster_size: int) -> bool:
    """Whether this can be a place in the file."""
    return not entry % cluster_size and entry < MAX_OFFSET
