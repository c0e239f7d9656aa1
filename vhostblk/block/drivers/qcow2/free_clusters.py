"""Clusters that nobody uses, in a block of reference counts.

Context: any. Knows nothing about where blocks are.
"""

from __future__ import annotations

from vhostblk.block.drivers.qcow2.tables import Table


def leading_zeroes(counts: Table, start: int, most: int) -> int:
    """How many clusters from `start` on are free, one after the other; no need to know of more than `most`."""
    if counts[start]:
        return 0
    data = counts[start : start + most].tobytes()
    return (len(data) - len(data.lstrip(b"\0"))) // counts.itemsize


def free_run(counts: Table, start: int, least: int) -> int:
    """The first of so many clusters in a row that are free; or of those at the end that are, or the end."""
    first = _find_free(counts, start, least)
    if first is None and least > 1:
        first = _free_at_the_end(counts, start)
    return len(counts) if first is None else first


def _find_free(counts: Table, start: int, least: int) -> int | None:
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


def _free_at_the_end(counts: Table, start: int) -> int | None:
    """The first of the clusters at the end that are free."""
    used = -(-len(counts.tobytes().rstrip(b"\0")) // counts.itemsize)
    first = max(used, start)
    return first if first < len(counts) else None
