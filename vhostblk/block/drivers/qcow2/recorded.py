"""What an image has recorded about how often its clusters are used, and how that differs from what was counted.

Theory of operation: reference counts are read block by block, where they are, and kept in pieces that the count of uses
(`survey.py`) has, too; pieces that agree are kept once. A block that cannot be read, because of its place, has counts
that nobody knows.

Context: the control loop; nobody changes the image meanwhile.
"""

from __future__ import annotations

import asyncio
import errno
import os
from array import array
from collections.abc import Iterator
from operator import itemgetter

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
        # Of pieces: start and end of clusters in them.
        self._unknown: dict[int, list[tuple[int, int]]] = {}

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
            counted = used.piece(number)
            recorded, unknown = await self._piece(number, counted)
            if unknown:
                self._unknown[number] = unknown
            if recorded == counted:
                self.tally.share(number, used)
            else:
                self.tally.put(number, recorded)
            for at, count, uses in _findings(recorded, counted, unknown):
                cluster = number * PIECE + at
                if count is None:
                    result.check_errors += 1
                    if says:
                        reason = os.strerror(errno.EIO)
                        result.say(f"Can't get refcount for cluster {cluster}: {reason}")
                    continue
                if count < uses:
                    result.corruptions += 1
                    not_counted |= not count
                else:
                    result.leaks += 1
                if says:
                    word = "ERROR" if count < uses else "Leaked"
                    result.say(difference(word, cluster, count, uses))
        result.image_end_offset = self._end(used) * self._size
        return not_counted

    def _end(self, used: Tally) -> int:
        """One more than the last cluster that is used, or recorded to be; but not of those that nobody knows of."""
        if not self._unknown:
            return max(used.end(), self.tally.end())
        for number in sorted({*used.pieces(), *self.tally.pieces()}, reverse=True):
            unknown = {at for run in self._unknown.get(number, ()) for at in range(*run)}
            pairs = zip(used.piece(number), self.tally.piece(number), strict=True)
            known = [at for at, pair in enumerate(pairs) if any(pair) and at not in unknown]
            if known:
                return number * PIECE + known[-1] + 1
        return 1

    async def _piece(self, number: int, counted: Table) -> tuple[Table, list[tuple[int, int]]]:
        """The recorded counts of these clusters of the file, and where nobody knows them (start and end).

        Args:
            counted: which is what stands there then.
        """
        start = number * PIECE
        length = min(PIECE, self.per_block)
        blocks: list[tuple[int, Table]] = []
        unknown: list[tuple[int, int]] = []
        inside = min(self.clusters - start, PIECE)
        for first in range(start, start + inside, length):
            index, at = divmod(first, self.per_block)
            place = first - start
            try:
                block = await self.block(index)
            except ImageError:
                unknown.append((place, min(place + length, inside)))
                blocks.append((place, counted[place : place + length]))
            else:
                if block is not None:
                    blocks.append((place, block[at : at + length]))
        piece = self.tally.empty()
        for place, part in blocks:
            piece[place : place + len(part)] = part
        # Behind the end of the file there is nothing to compare.
        piece[inside:] = self.tally.empty()[inside:]
        return piece, unknown

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


def _findings(
    recorded: Table, counted: Table, unknown: list[tuple[int, int]]
) -> Iterator[tuple[int, int | None, int]]:
    """What there is to say of a piece, in order: place, what is recorded (None: nobody knows) and what was counted."""
    if recorded != counted and not unknown:
        yield from differences(recorded, counted)
    elif unknown:
        found: list[tuple[int, int | None, int]] = [*differences(recorded, counted)]
        found += [(at, None, counted[at]) for run in unknown for at in range(*run)]
        yield from sorted(found, key=itemgetter(0))


def difference(word: str, cluster: int, count: int, uses: int) -> str:
    """The line about a cluster whose recorded count is not how often it is used."""
    return f"{word} cluster {cluster} refcount={count} reference={uses}"
