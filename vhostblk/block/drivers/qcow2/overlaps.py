"""Where the tables of an image are, so that nothing else is written there (QEMU's overlap checks).

A damaged image may say that a table is guest data, or a free cluster, or two tables. Who believes it destroys what is
whole. Knows nothing about files.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable

from vhostblk.errors import ImageError


class TablePlaces:
    """Clusters that have tables, in order."""

    def __init__(self, cluster_bits: int) -> None:
        self._bits = cluster_bits
        self._clusters = array("Q")
        self._lookup: frozenset[int] | None = None  # the same, for many questions

    def add_all(self, offsets: Iterable[int]) -> None:
        """Tables of one cluster each; twice the same is one."""
        places = {offset >> self._bits for offset in offsets}
        places.update(self._clusters)
        self._clusters = array("Q", sorted(places))
        self._lookup = None

    def add_alone(self, what: str, offset: int, length: int = 1) -> None:
        """A table that must not be where another one is.

        Raises:
            ImageError: it is.
        """
        self.check(f"{what} overlaps another table", offset, length)
        self._lookup = None
        for cluster in self._range(offset, length):
            insort(self._clusters, cluster)

    def remove(self, offset: int, length: int = 1) -> None:
        """There is no table any more."""
        self._lookup = None
        for cluster in self._range(offset, length):
            at = bisect_left(self._clusters, cluster)
            if at < len(self._clusters) and self._clusters[at] == cluster:
                del self._clusters[at]

    def has(self, offset: int, length: int = 1) -> bool:
        """Whether a table is in one of the clusters that the range touches."""
        clusters = self._range(offset, length)
        at = bisect_left(self._clusters, clusters.start)
        return at < len(self._clusters) and self._clusters[at] < clusters.stop

    def has_any(self, clusters: Iterable[int]) -> bool:
        """Whether a table is in one of these clusters."""
        if self._lookup is None:
            self._lookup = frozenset(self._clusters)
        return not self._lookup.isdisjoint(clusters)

    def check(self, what: str, offset: int, length: int = 1) -> None:
        """Nothing is there.

        Raises:
            ImageError: a table is.
        """
        if self.has(offset, length):
            raise ImageError(f"{what} at offset {offset:#x}: it is a table")

    def _range(self, offset: int, length: int) -> range:
        return range(offset >> self._bits, (offset + length - 1 >> self._bits) + 1 if length else 0)
