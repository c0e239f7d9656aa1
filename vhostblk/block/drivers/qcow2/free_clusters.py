"""Clusters that nobody uses, in a block of reference counts.

Context: any. Knows nothing about where blocks are.
"""

from __future__ import annotations

from vhostblk.block.drivers.qcow2.tables import Table


def find_free(counts: Table, start: int, least: int) -> int | None:
    """The first of so many clusters in a row that are free."""
    try:
        first = counts.index(0, start)
    except ValueError:
        return None
    if least == 1 or not any(counts[first : first + least]):
        return first if first + least <= len(counts) else None
    data, size = counts.tobytes(), counts.itemsize
    wanted, at = bytes(least * size), first * size
    while (at := data.find(wanted, at)) >= 0:
        if not at % size:
            return at // size
        at += 1
    return None


def free_at_the_end(counts: Table, start: int) -> int | None:
    """The first of the clusters at the end that are free."""
    used = -(-len(counts.tobytes().rstrip(b"\0")) // counts.itemsize)
    first = max(used, start)
    return first if first < len(counts) else None
