"""What a disk has where, as a list: each range, the layer it comes from, and its place in the file of that.

Neighbours that go on in the same way are one entry (as in QMP's `MapEntry`). Entries come in batches, each of what a
table of the image says, so that it does not matter how many there are; what they have in common (`MapKind`) is made
once.

Context: the control loop. Knows nothing about formats.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple, TypeAlias

from vhostblk.block.chain import next_layer, skip_filters
from vhostblk.block.flags import StatusFlag
from vhostblk.block.introspection import filename
from vhostblk.block.node import BlockNode
from vhostblk.block.status import layered_runs

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


_Kinds: TypeAlias = dict[tuple[int, tuple[int, BlockNode | None]], MapKind]


async def map_entries(node: BlockNode, start: int, end: int) -> AsyncIterator[list[MapEntry]]:
    """What is in a range of a disk, in order.

    Args:
        end: inside the disk.

    Raises:
        BlockError: a driver's errno.
    """
    kinds: _Kinds = {}
    begin, length, place, next_place = start, 0, 0, 0
    last: MapKind | None = None
    layer = skip_filters(node)
    while start < end:
        found: list[MapEntry] = []
        for flags, count, at, where in await layered_runs(
            layer, next_layer, _CONTENT, start, end - start
        ):
            kind = kinds.get((flags, where)) or _kind(flags, where, kinds)
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


def _kind(flags: int, where: tuple[int, BlockNode | None], kinds: _Kinds) -> MapKind:
    """One object for all that are the same."""
    depth, file = where
    # What is in no layer is nowhere.
    known = flags & _KIND if flags & _CONTENT else 0
    file = file if known & _OFFSET_VALID else None
    kind = MapKind(
        depth,
        bool(known & _ALLOCATED),
        bool(known & _ZERO),
        bool(known & _DATA),
        filename(file) if file is not None else None,
    )
    same = kinds.setdefault((known, (depth, file)), kind)
    kinds[flags, where] = same
    return same
