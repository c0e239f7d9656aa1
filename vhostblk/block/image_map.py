"""What a disk has where, as a list: each range, the layer it comes from, and its place in the file of that.

Neighbours that go on in the same way are one entry (as in QMP's `MapEntry`). Entries come one by one, so that it does
not matter how many there are.

Context: the control loop. Knows nothing about formats.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from vhostblk.block.chain import skip_filters
from vhostblk.block.flags import StatusFlag
from vhostblk.block.introspection import filename
from vhostblk.block.node import BlockNode
from vhostblk.block.roles import cow_child
from vhostblk.block.status import BlockStatus, block_status

_CONTENT = StatusFlag.DATA | StatusFlag.ZERO
_KIND = _CONTENT | StatusFlag.ALLOCATED | StatusFlag.OFFSET_VALID


@dataclass(frozen=True, slots=True)
class MapEntry:
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
    last: MapEntry | None = None
    kind: tuple[object, ...] = ()
    while start < end:
        status, depth = await _status(node, start, end - start)
        place = status.map if status.flags & StatusFlag.OFFSET_VALID else None
        file = status.file if place is not None else None
        goes_on = (int(status.flags & _KIND), depth, file)
        if (
            last is not None
            and goes_on == kind
            and (place is None or last.offset is None or last.offset + last.length == place)
        ):
            last = replace(last, length=last.length + status.length)
        else:
            if last is not None:
                yield last
            if file is not None and file not in names:
                names[file] = filename(file)
            flags = status.flags
            last = MapEntry(
                start,
                status.length,
                depth,
                bool(flags & StatusFlag.ALLOCATED),
                bool(flags & StatusFlag.ZERO),
                bool(flags & StatusFlag.DATA),
                place,
                names[file] if file is not None else "",
            )
            kind = goes_on
        start += status.length
    if last is not None:
        yield last


async def _status(node: BlockNode, offset: int, length: int) -> tuple[BlockStatus, int]:
    """The status of the layer that the bytes come from, and which one that is."""
    layer, depth = skip_filters(node), 0
    while True:
        status = await block_status(layer, offset, length)
        assert status.length
        edge = cow_child(layer)
        if status.flags & _CONTENT or edge is None:
            return status, depth
        layer, length = skip_filters(edge.node), status.length
        depth += 1
