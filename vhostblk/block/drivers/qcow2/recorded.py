"""What an image has recorded about how often its clusters are used, and how that differs from what was counted.

Theory of operation: reference counts are read block by block, where they are, and kept in pieces that the count of uses
(`survey.py`) has, too; pieces that agree are kept once. A block that cannot be read, because of its place, has counts
that nobody knows.

Context: the control loop; nobody changes the image meanwhile.
"""

from __future__ import annotations

import asyncio
from array import array

from vhostblk.block.check import CheckResult
from vhostblk.block.drivers.qcow2.header import Header
from vhostblk.block.drivers.qcow2.tables import Codec, Table, read_bytes, read_table
from vhostblk.block.drivers.qcow2.tally import PIECE, Tally, differences
from vhostblk.block.edge import Edge
from vhostblk.block.limits import MAX_LENGTH
from vhostblk.errors import ImageError

# Bits of an entry of the table that have no meaning.
BLOCK_RESERVED = 0x1FF
_BLOCK_OFFSET = ~BLOCK_RESERVED & (1 << 64) - 1


class RecordedCounts:
    """Reference counts as they are in the file.

    Attributes:
        tally: the counts, where they were compared.
        table: its entries say where blocks of counts are.
        per_block: clusters that a block is for.
        clusters: those before this number were compared.
    """

    def __init__(self, file: Edge, header: Header, most_bytes: int) -> None:
        self.tally = Tally(header.refcount_order, most_bytes)
        self.codec = Codec(header.refcount_order)
        self.per_block = header.cluster_size * 8 >> header.refcount_order
        self.table: Table = array("Q")
        self.clusters = 0
        self._file = file
        self._header = header
        self._size = header.cluster_size
        self._length = file.node.length
        self._block: tuple[int, Table] = (-1, array("B"))

    async def load(self) -> None:
        """Read the table.

        Raises:
            BlockError: the child's errno.
        """
        entries = self._header.refcount_table_clusters * self._size // 8
        self.table = await read_table(self._file, self._header.refcount_table_offset, entries)

    async def block(self, index: int) -> Table | None:
        """A block of reference counts as it is in the file; None: there is none.

        Raises:
            BlockError: the child's errno.
            ImageError: its place is wrong.
        """
        entry = self.table[index] if index < len(self.table) else 0
        offset = entry & _BLOCK_OFFSET
        if not self._can_be_read(offset):
            raise ImageError(f"Reference count block {index} is where none can be")
        if not offset or offset >= self._length:
            return None
        if self._block[0] != index:
            data = await read_bytes(self._file, offset, self._size)
            self._block = (index, self.codec.decode(data))
        return self._block[1]

    def forget_block(self) -> None:
        """It was changed in the file."""
        self._block = (-1, array("B"))

    async def compare(self, used: Tally, clusters: int, result: CheckResult, *, says: bool) -> bool:
        """Compare what is recorded to what was counted; sets `tally`.

        Args:
            clusters: how many there are.
            result: is told what differs; also in words, if `says`.

        Returns: whether something is used that has no count.

        Raises:
            BlockError: the child's errno.
        """
        self.clusters = clusters
        not_counted = False
        for number in range(-(-clusters // PIECE)):
            if not number % 64:
                await asyncio.sleep(0)
            recorded = await self._piece(number, result) or used.empty()
            counted = used.piece(number)
            if recorded == counted:
                self.tally.share(number, used)
                continue
            self.tally.put(number, recorded)
            for at, count, uses in differences(recorded, counted):
                if count < uses:
                    result.corruptions += 1
                    not_counted |= not count
                else:
                    result.leaks += 1
                if says:
                    word = "ERROR" if count < uses else "Leaked"
                    result.say(difference(word, number * PIECE + at, count, uses))
        result.image_end_offset = max(used.end(), self.tally.end()) * self._size
        return not_counted

    async def _piece(self, number: int, result: CheckResult) -> Table | None:
        """The recorded counts of these clusters of the file; None: there are none."""
        start = number * PIECE
        length = min(PIECE, self.per_block)
        blocks = []
        for first in range(start, min(start + PIECE, self.clusters), length):
            index, at = divmod(first, self.per_block)
            try:
                block = await self.block(index)
            except ImageError:
                # Nobody knows what it says.
                result.check_errors += min(length, self.clusters - first)
                block = None
            if block is not None:
                blocks.append((first - start, block[at : at + length]))
        if not blocks:
            return None
        piece = self.tally.empty()
        for at, part in blocks:
            piece[at : at + len(part)] = part
        # Behind the end of the file there is nothing to compare.
        inside = min(self.clusters - start, PIECE)
        piece[inside:] = self.tally.empty()[inside:]
        return piece

    async def count(self, cluster: int) -> int | None:
        """What the image says about one cluster, wherever it is; None: nobody knows."""
        if cluster < self.clusters and self.is_known(cluster):
            return self.tally.get(cluster)
        try:
            block = await self.block(cluster // self.per_block)
        except ImageError:
            return None
        return block[cluster % self.per_block] if block is not None else 0

    def is_known(self, cluster: int) -> bool:
        """Whether the block that says it is where a block can be."""
        index = cluster // self.per_block
        if index >= len(self.table):
            return True
        return self._can_be_read(self.table[index] & _BLOCK_OFFSET)

    def _can_be_read(self, offset: int) -> bool:
        return not offset % self._size and offset + self._size <= MAX_LENGTH


def difference(word: str, cluster: int, count: int, uses: int) -> str:
    """The line about a cluster whose recorded count is not how often it is used."""
    return f"{word} cluster {cluster} refcount={count} reference={uses}"
