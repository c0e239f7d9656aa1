"""What a disk has where, as a list: each range, the layer it comes from, and its place in the file of that.

Neighbours that go on in the same way are one entry (as in QMP's `MapEntry`). Entries come in batches, each of what a
table of the image says, so that it does not matter how many there are; what they have in common (`MapKind`) is made
once.

Context: the control loop. Knows nothing about formats.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple, TypeAlias

from vhostblk.block.chain import skip_filters
from vhostblk.block.flags import StatusFlag
from vhostblk.block.introspection import filename
from vhostblk.block.node import BlockNode
from vhostblk.block.roles import cow_child
from vhostblk.block.status import StatusRun, block_statuses

_DATA, _ZERO, _ALLOCATED = map(int, (StatusFlag.DATA, StatusFlag.ZERO, StatusFlag.ALLOCATED))
_OFFSET_VALID = int(StatusFlag.OFFSET_VALID)
_CONTENT = _DATA | _ZERO
_KIND = _CONTENT | _ALLOCATED | _OFFSET_VALID


class MapKind(NamedTuple):
    """What many ranges have in common.

    Attributes:
        depth: which layer they come from; 0 is the disk's own.
        present: that layer has them. Otherwise they read as zeroes, because no layer has them.
        zero: they read as zeroes.
        data: there are bytes to be read.
        filename: of the file where those are; empty: it has none; None: they are in no such place (compressed, or not
            known).
    """

    depth: int
    present: bool
    zero: bool
    data: bool
    filename: str | None


MapEntry: TypeAlias = tuple[int, int, int, MapKind]
"""A range of the disk: its start and its length in bytes, its place in the file if it has one, and what it is."""


class _Layer(NamedTuple):
    """Runs one behind the other that come from one layer, and whose places are in one file."""

    runs: list[StatusRun]
    depth: int
    file: BlockNode | None


async def map_entries(node: BlockNode, start: int, end: int) -> AsyncIterator[list[MapEntry]]:
    """What is in a range of a disk, in order.

    Args:
        end: inside the disk.

    Raises:
        BlockError: a driver's errno.
    """
    kinds: dict[tuple[int, int, BlockNode | None], MapKind] = {}
    begin, length, place, next_place = start, 0, 0, 0
    last: MapKind | None = None
    while start < end:
        found: list[MapEntry] = []
        for runs, depth, file in await _layers(node, start, end - start, 0):
            of_flags: dict[int, MapKind] = {}
            for flags, count, at in runs:
                kind = of_flags.get(flags)
                if kind is None:
                    kind = of_flags[flags] = _kind(flags, depth, file, kinds)
                if kind is last and (at == next_place or kind.filename is None):
                    length += count
                else:
                    if last is not None:
                        found.append((begin, length, place, last))
                    begin, length, place, last = start, count, at, kind
                start += count
                next_place = at + count
        if found:
            yield found
    if last is not None:
        yield [(begin, length, place, last)]


def _kind(
    flags: int,
    depth: int,
    file: BlockNode | None,
    known: dict[tuple[int, int, BlockNode | None], MapKind],
) -> MapKind:
    """One object for all that are the same."""
    # What is in no layer is nowhere.
    flags = flags & _KIND if flags & _CONTENT else 0
    where = file if flags & _OFFSET_VALID else None
    key = flags, depth, where
    if key not in known:
        known[key] = MapKind(
            depth,
            bool(flags & _ALLOCATED),
            bool(flags & _ZERO),
            bool(flags & _DATA),
            filename(where) if where is not None else None,
        )
    return known[key]


async def _layers(node: BlockNode, start: int, length: int, depth: int) -> list[_Layer]:
    """What the disk has from `start` on; not all of the range."""
    layer = skip_filters(node)
    edge = cow_child(layer)
    runs, file = await block_statuses(layer, start, min(length, layer.length - start))
    if edge is None:
        return [_Layer(runs, depth, file)]
    found: list[_Layer] = []
    own: list[StatusRun] = []
    for run in runs:
        flags, count, _ = run
        if flags & _CONTENT:
            own.append(run)
            start += count
            continue
        if own:
            found.append(_Layer(own, depth, file))
            own = []
        below = await _layers(edge.node, start, count, depth + 1)
        found += below
        covered = sum(length for one in below for _, length, _ in one.runs)
        start += covered
        if covered < count:
            return found
    if own:
        found.append(_Layer(own, depth, file))
    return found
