"""What a disk has where, as a list: each range, the layer it comes from, and its place in the file of that.

Neighbours that go on in the same way are one entry (as in QMP's `MapEntry`). Entries come one by one, so that it does
not matter how many there are.

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
from vhostblk.block.status import BlockStatus, block_statuses

_DATA, _ZERO, _ALLOCATED = map(int, (StatusFlag.DATA, StatusFlag.ZERO, StatusFlag.ALLOCATED))
_OFFSET_VALID = int(StatusFlag.OFFSET_VALID)
_CONTENT = _DATA | _ZERO
_KIND = _CONTENT | _ALLOCATED | _OFFSET_VALID
# Flags, the layer, and the node whose file has it.
_Kind: TypeAlias = tuple[int, int, BlockNode | None]


class MapEntry(NamedTuple):
    """A range of the disk.

    Attributes:
        start, length: bytes.
        depth: which layer it comes from; 0 is the disk's own.
        present: that layer has it. Otherwise it reads as zeroes, because no layer has it.
        zero: it reads as zeroes.
        data: there are bytes to be read.
        offset: where those are in the file; None: in no such place (compressed, or not known).
        filename: of that file; empty: it has none.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None
    filename: str


async def map_entries(node: BlockNode, start: int, end: int) -> AsyncIterator[MapEntry]:
    """What is in a range of a disk, in order.

    Args:
        end: inside the disk.

    Raises:
        BlockError: a driver's errno.
    """
    names: dict[BlockNode, str] = {}
    begin = length = 0
    kind: _Kind | None = None
    next_place = 0
    while start < end:
        for (flags, count, file, place), depth in await _statuses(node, start, end - start, 0):
            flags &= _KIND
            if not flags & _OFFSET_VALID:
                file, place = None, next_place
            if kind == (flags, depth, file) and place == next_place:
                length += count
            else:
                if kind is not None:
                    yield _entry(begin, length, kind, next_place, names)
                begin, length, kind = start, count, (flags, depth, file)
            start += count
            next_place = place + count if file is not None else 0
    if kind is not None:
        yield _entry(begin, length, kind, next_place, names)


def _entry(
    start: int, length: int, kind: _Kind, next_place: int, names: dict[BlockNode, str]
) -> MapEntry:
    flags, depth, file = kind
    name = ""
    if file is not None:
        if file not in names:
            names[file] = filename(file)
        name = names[file]
    return MapEntry(
        start,
        length,
        depth,
        bool(flags & _ALLOCATED),
        bool(flags & _ZERO),
        bool(flags & _DATA),
        next_place - length if file is not None else None,
        name,
    )


async def _statuses(
    node: BlockNode, start: int, length: int, depth: int
) -> list[tuple[BlockStatus, int]]:
    """What the disk has from `start` on, each with the number of the layer that it comes from; not all of the range."""
    layer = skip_filters(node)
    edge = cow_child(layer)
    found: list[tuple[BlockStatus, int]] = []
    for status in await block_statuses(layer, start, min(length, layer.length - start)):
        if status.flags & _CONTENT:
            found.append((status, depth))
            start += status.length
            continue
        if edge is None:
            # Nothing is there, so it is nowhere.
            found.append((BlockStatus(0, status.length), depth))
            start += status.length
            continue
        below = await _statuses(edge.node, start, status.length, depth + 1)
        found += below
        covered = sum(one.length for one, _ in below)
        start += covered
        if covered < status.length:
            break
    return found
