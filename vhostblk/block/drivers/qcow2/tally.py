"""How often each cluster of a file is used: as many numbers as the file has clusters, as narrow as the image's own.

They are kept in pieces, and a piece where nothing is counted takes no room: files may be long, and have holes. Knows
nothing about who uses clusters.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator

from vhostblk.block.drivers.qcow2.tables import Table
from vhostblk.errors import BlockError

PIECE = 8192
"""Clusters; a power of two."""
_FEW = 128
_TYPES = {4: "H", 5: "I", 6: "Q"}


class Tally:
    """Counts of clusters, 0 where nobody has counted.

    Args:
        order: the image's: a count takes `1 << order` bits, and at least one byte here.
        most_bytes: that the counts may take in memory.

    Attributes:
        largest: that a count can be.
    """

    def __init__(self, order: int, most_bytes: int) -> None:
        self.largest = (1 << (1 << order)) - 1
        self._empty = array(_TYPES.get(order, "B"), bytes(PIECE * (1 << max(order - 3, 0))))
        self._ones = array(self._empty.typecode, [1]) * PIECE
        self._pieces: dict[int, Table] = {}
        self._borrowed: set[int] = set()  # pieces that are another tally's, too
        self._most = max(most_bytes // (PIECE * self._empty.itemsize), 1)

    def empty(self) -> Table:
        """A piece of zeroes, to be filled."""
        return self._empty[:]

    def pieces(self) -> Iterator[int]:
        """Numbers of those where something may be counted, in order."""
        return iter(sorted(self._pieces))

    def piece(self, number: int) -> Table:
        """To read."""
        return self._pieces.get(number, self._empty)

    def put(self, number: int, piece: Table) -> None:
        """This is the piece from now on."""
        self._borrowed.discard(number)
        if number in self._pieces or piece != self._empty:
            self._pieces[number] = piece
            self._check_room()

    def share(self, number: int, other: Tally) -> None:
        """The piece is the same as another's, which must not change its own any more."""
        if number in other._pieces:
            self._pieces[number] = other._pieces[number]
            self._borrowed.add(number)
        else:
            self._pieces.pop(number, None)

    def get(self, cluster: int) -> int:
        """The count of one."""
        return self._pieces.get(cluster // PIECE, self._empty)[cluster % PIECE]

    def set(self, cluster: int, count: int) -> None:
        """Change the count of one."""
        self._own(cluster // PIECE)[cluster % PIECE] = count

    def add(self, first: int, clusters: int, times: int = 1) -> list[tuple[int, int]]:
        """So many more uses of these clusters.

        Returns: of which clusters how many of those are too many: a count cannot be that large.

        Raises:
            BlockError: EFBIG: no room for more counts.
        """
        lost: list[tuple[int, int]] = []
        while clusters:
            number, start = divmod(first, PIECE)
            end = min(start + clusters, PIECE)
            piece = self._own(number)
            if times == 1 and end - start > 1 and piece[start:end] == self._empty[start:end]:
                piece[start:end] = self._ones[start:end]
            else:
                for at in range(start, end):
                    count = piece[at] + times
                    if count > self.largest:
                        lost.append((number * PIECE + at, count - self.largest))
                    piece[at] = min(count, self.largest)
            first, clusters = first + end - start, clusters - (end - start)
        return lost

    def add_each(self, clusters: list[int], times: int) -> bool:
        """So many more uses of each of these; False, and nothing is counted: a count could get too large.

        Raises:
            BlockError: EFBIG: no room for more counts.
        """
        pieces = {number: self._own(number) for number in {one // PIECE for one in clusters}}
        most = self.largest - times * len(clusters)
        if any(max(piece) > most for piece in pieces.values()):
            return False
        for cluster in clusters:
            pieces[cluster // PIECE][cluster % PIECE] += times
        return True

    def each_is_one(self, clusters: list[int]) -> bool:
        """Whether each of these counts 1."""
        pieces = {
            number: self._pieces.get(number, self._empty)
            for number in {one // PIECE for one in clusters}
        }
        return all(pieces[one // PIECE][one % PIECE] == 1 for one in clusters)

    def all_are_one(self, first: int, clusters: int) -> bool:
        """Whether each of these counts 1."""
        end = first + clusters
        while first < end:
            at = first % PIECE
            piece = self._pieces.get(first // PIECE, self._empty)
            count = min(PIECE - at, end - first)
            if piece[at : at + count] != self._ones[:count]:
                return False
            first += count
        return True

    def find_free(self, start: int, count: int, end: int) -> int:
        """The first of so many unused clusters in a row; perhaps behind `end`, where all are free."""
        found, at = start, start
        while at < end and at - found < count:
            piece = self._pieces.get(at // PIECE)
            if piece is None:
                at = (at // PIECE + 1) * PIECE
            elif piece[at % PIECE]:
                found = at = at + 1
            else:
                at += 1
        return found

    def end(self) -> int:
        """One more than the last that is used; 0: none is."""
        for number in sorted(self._pieces, reverse=True):
            piece = self._pieces[number]
            if piece != self._empty:
                last = next(at for at in range(PIECE - 1, -1, -1) if piece[at])
                return number * PIECE + last + 1
        return 0

    def _own(self, number: int) -> Table:
        piece = self._pieces.get(number)
        if piece is None:
            piece = self._pieces[number] = self._empty[:]
            self._check_room()
        elif number in self._borrowed:
            self._borrowed.discard(number)
            piece = self._pieces[number] = piece[:]
        return piece

    def _check_room(self) -> None:
        if len(self._pieces) > self._most:
            raise BlockError(errno.EFBIG, "the image is too large to be checked")


def differences(one: Table, other: Table) -> Iterator[tuple[int, int, int]]:
    """Where two pieces differ: place, and both numbers."""
    for start in range(0, PIECE, _FEW):
        few, others = one[start : start + _FEW], other[start : start + _FEW]
        if few != others:
            for at, (left, right) in enumerate(zip(few, others, strict=True), start):
                if left != right:
                    yield at, left, right
