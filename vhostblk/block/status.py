"""Block status: what a layer has where, and where that is in a file (block layer row B21).

A driver answers for its own layer only (`driver_block_status`); here the answer is completed: what is unallocated in an
image that could have a backing node, and has none, reads as zeroes, a `RAW` answer is asked again of the child it
points to, a long answer is cut.

| DATA | ZERO | OFFSET_VALID | |
|---|---|---|---|
| x | x | x | zeroes, at that offset of the file |
| x | | x | data, at that offset of the file |
| | x | x | preallocated: reads as zeroes, what the file has there is nobody's business |
| | | x | preallocated, the content comes from the backing node |
| x | x | | preallocated, reads as zeroes, place unknown |
| x | | | data, place unknown (compressed, encrypted) |
| | x | | reads as zeroes |
| | | | not in this layer: ask the backing node; of a driver that has no such thing: nobody knows what it reads as |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from vhostblk.block.flags import Req, StatusFlag
from vhostblk.block.limits import align_down, align_up
from vhostblk.block.roles import chain_child
from vhostblk.errors import BlockError

if TYPE_CHECKING:
    from vhostblk.block.node import BlockNode


class BlockStatus(NamedTuple):
    """What is so for `length` bytes from the offset that was asked.

    Attributes:
        flags: of `StatusFlag`. A plain number, as those are slow, and images may have millions of ranges.
        length: bytes; 0 only at the end of the node.
        file, map: the node, and the offset in it, where the data is; valid with OFFSET_VALID. A driver that names no
            node means its own.
    """

    flags: int
    length: int
    file: BlockNode | None = None
    map: int = 0


StatusRun: TypeAlias = tuple[int, int, int]
"""Flags, bytes, place: one of many, see `BlockStatus`. A plain tuple for the same reason."""


LayerRun: TypeAlias = "tuple[int, int, int, tuple[int, BlockNode | None]]"
"""The same, and from where: how many layers are above, and the node in which it has its place with OFFSET_VALID."""


Below: TypeAlias = "Callable[[BlockNode], BlockNode | None]"
"""The next layer down."""


class StatusRuns(NamedTuple):
    """What is so for ranges one behind the other.

    Attributes:
        file: the node in which those with OFFSET_VALID have their place.
    """

    runs: list[StatusRun]
    file: BlockNode | None = None


_DATA, _ZERO, _OFFSET_VALID = map(int, (StatusFlag.DATA, StatusFlag.ZERO, StatusFlag.OFFSET_VALID))
_ALLOCATED, _EOF, _RAW = map(int, (StatusFlag.ALLOCATED, StatusFlag.EOF, StatusFlag.RAW))
_CONTENT = _DATA | _ZERO
_ASKED_BELOW = int(StatusFlag.RECURSE) | _DATA | _OFFSET_VALID
_ASKS = int(StatusFlag.RECURSE) | _RAW  # the answer depends on the file
_NOT_RECURSE = ~int(StatusFlag.RECURSE)


async def block_status(
    node: BlockNode, offset: int, length: int, precise: bool = True
) -> BlockStatus:
    """The status of one layer.

    Args:
        precise: False: only what is allocated matters, zeroes may be called data (row B21.10).

    Raises:
        BlockError: the driver's errno.
    """
    end = node.length
    if offset >= end:
        return BlockStatus(_EOF, 0)
    if not length:
        return BlockStatus(0, 0)
    node.in_flight += 1
    try:
        found = await _own_status(node, offset, min(length, end - offset), precise)
    finally:
        node.leave()
    return _with_end(found, offset, end)


async def block_statuses(node: BlockNode, offset: int, length: int) -> StatusRuns:
    """The same for ranges one behind the other, from `offset` on: as many as the driver knows at once, at least one.

    Args:
        offset, length: inside the node; not 0 bytes.

    Raises:
        BlockError: the driver's errno.
    """
    align = node.limits.request_alignment
    if offset % align or length % align:
        return _alone(await block_status(node, offset, length))
    node.in_flight += 1
    try:
        many = await node.driver_block_statuses(offset, length)
        if not many.runs:
            found = await _own_status(node, offset, length, precise=True)
            return _alone(_with_end(found, offset, node.length))
        runs = await _complete_all(node, offset, many)
    finally:
        node.leave()
    offset += sum([count for _, count, _ in runs])
    if offset == node.length:
        flags, count, place = runs[-1]
        runs[-1] = flags | _EOF, count, place
    return StatusRuns(runs, many.file)


def _alone(found: BlockStatus) -> StatusRuns:
    return StatusRuns([(found.flags, found.length, found.map)], found.file)


async def _complete_all(node: BlockNode, offset: int, many: StatusRuns) -> list[StatusRun]:
    """What a driver says of many runs, and what follows from it; perhaps fewer of them."""
    runs, file = many
    backing = node.backing
    backed = backing.length if backing is not None else 0
    end = offset + sum([count for _, count, _ in runs])
    kinds = {flags for flags, _, _ in runs}
    if not any(flags & _ASKS for flags in kinds) and not offset < backed < end:
        # There are few kinds, and perhaps millions of runs.
        nowhere = _ZERO if "backing" in node.child_keys and offset >= backed else 0
        whole = {flags: flags | (_ALLOCATED if flags & _CONTENT else nowhere) for flags in kinds}
        return [(whole[flags], count, place) for flags, count, place in runs]
    completed = []
    for flags, length, place in runs:
        assert not flags & _RAW, f"{node.node_name}: many runs of which others know"
        where = file if flags & _OFFSET_VALID else None
        found = await _complete(
            node, offset, BlockStatus(flags, length, where, place), precise=True
        )
        completed.append((found.flags, found.length, found.map))
        offset += found.length
        if found.length != length:
            break
    return completed


def _with_end(found: BlockStatus, offset: int, end: int) -> BlockStatus:
    flags, length, file, place = found
    flags &= ~_EOF
    if offset + length == end:
        flags |= _EOF
    return BlockStatus(flags, length, file, place)


async def _own_status(node: BlockNode, offset: int, length: int, precise: bool) -> BlockStatus:
    """Ask the driver for whole blocks, cut what it says, follow it to its file."""
    align = node.limits.request_alignment
    start, end = align_down(offset, align), align_up(offset + length, align)
    flags, count, file, place = await node.driver_block_status(start, end - start, precise)
    assert count > 0, f"{node.node_name}: no progress at {offset}"
    assert not count % align, f"{node.node_name}: {count} bytes at {offset}"
    skip = offset - start
    found = BlockStatus(int(flags), min(count - skip, length), file, place + skip)
    return await _complete(node, offset, found, precise=precise)


async def _complete(
    node: BlockNode, offset: int, found: BlockStatus, *, precise: bool
) -> BlockStatus:
    """What a driver says, and what follows from it."""
    flags, length, file, place = found
    if flags & _OFFSET_VALID and file is None:
        file = node
    if flags & _RAW:
        assert flags & _OFFSET_VALID
        assert file is not None
        below = await block_status(file, place, length, precise)
        # Behind the end of the file are zeroes.
        return below if below.length else BlockStatus(_ZERO, length)
    if flags & _CONTENT:
        flags |= _ALLOCATED
    elif "backing" in node.child_keys:
        backing = node.backing
        if backing is None or offset >= backing.length:
            flags |= _ZERO
    recurses = precise and flags & (_ASKED_BELOW | _ZERO) == _ASKED_BELOW
    found = BlockStatus(flags & _NOT_RECURSE, length, file, place)
    if recurses and file is not None and file is not node:
        return await _refine(found, file)
    return found


async def _refine(found: BlockStatus, file: BlockNode) -> BlockStatus:
    """The file may know of zeroes where its user has data (row B21.9); what it fails to tell does no harm."""
    try:
        below = await block_status(file, found.map, found.length)
    except BlockError:
        return found
    flags, length, _, place = found
    if below.flags & _EOF and (not below.length or below.flags & _ZERO):
        # Formats may read past the end of their file.
        return BlockStatus(flags | _ZERO, length, file, place)
    return BlockStatus(flags | below.flags & _ZERO, min(length, below.length), file, place)


async def status_above(
    node: BlockNode, base: BlockNode | None, offset: int, length: int, precise: bool = True
) -> BlockStatus:
    """What the layers from `node` down to above `base` have: the first that has something decides (row B21.11).

    Args:
        base: excluded; None: the whole chain.

    Raises:
        BlockError: a driver's errno.
    """
    top = status = await block_status(node, offset, length, precise)
    layer = _next_layer(node)
    while status.length and not status.flags & _ALLOCATED and layer not in (base, None):
        assert layer is not None
        below = await block_status(layer, offset, status.length, precise)
        ends_in_zeroes = below.flags & _ZERO and below.flags & _EOF
        if not below.length or (below.flags & _ALLOCATED and ends_in_zeroes):
            # A layer that is shorter: zeroes behind its end, for as long as those above have nothing.
            flags = below.flags | _ZERO | _ALLOCATED
            below = BlockStatus(flags, status.length, layer, below.map)
        status = below
        layer = _next_layer(layer)
    is_end = top.flags & _EOF and status.length == top.length
    flags, length, file, place = status
    return BlockStatus(flags & ~_EOF | (_EOF if is_end else 0), length, file, place)


async def statuses_above(
    node: BlockNode, base: BlockNode | None, offset: int, length: int
) -> list[tuple[int, int]]:
    """`status_above` for ranges one behind the other from `offset` on: flags and bytes of at least one.

    Args:
        base: excluded; None: the whole chain.
        offset, length: inside the node; not 0 bytes.

    Raises:
        BlockError: a driver's errno.
    """

    def below(layer: BlockNode) -> BlockNode | None:
        found = _next_layer(layer)
        return found if found is not base else None

    runs = await layered_runs(node, below, _ALLOCATED, offset, length)
    found = [(flags & ~_EOF, count) for flags, count, _, _ in runs]
    if offset + sum([count for _, count in found]) == node.length:
        flags, count = found[-1]
        found[-1] = flags | _EOF, count
    return found


async def layered_runs(
    node: BlockNode, below: Below, settled: int, offset: int, length: int
) -> list[LayerRun]:
    """What a layer has, and those below it where it has nothing, for ranges one behind the other from `offset` on.

    Args:
        below: which layer is asked for what one has not; None: there is none.
        settled: with any of these flags nobody else is asked.
        offset, length: inside the node; not 0 bytes.

    Raises:
        BlockError: a driver's errno.
    """
    layer = _Layer(node, 0, below, settled)
    await layer.ask(offset, offset + length)
    if layer.shows_alone:
        return layer.all_runs()
    found: list[LayerRun] = []
    await layer.show(offset, layer.known_to, found)
    return found


class _Layer:
    """A layer that is walked once, from the beginning to the end. It is asked for many ranges at once, also where few
    of them show; but only from those on that do, as nobody should hear of what is wrong elsewhere.
    """

    def __init__(self, node: BlockNode, depth: int, below: Below, settled: int) -> None:
        self._node = node
        self._depth = depth
        self._settled = settled
        next_node = below(node)
        self._next = _Layer(next_node, depth + 1, below, settled) if next_node else None
        self._runs: list[StatusRun] = []
        self._where: tuple[int, BlockNode | None] = depth, None
        self._number = self._start = 0  # the run that is looked at, and where it begins
        self._holes_to = 0  # behind the last that somebody else is asked for
        self.known_to = 0

    async def ask(self, offset: int, end: int) -> None:
        """Know about runs from `offset` on."""
        self._runs, file = await block_statuses(self._node, offset, end - offset)
        self._where = self._depth, file
        self._number, self._start, self._holes_to = 0, offset, offset
        for flags, count, _ in self._runs:
            offset += count
            if not flags & self._settled:
                self._holes_to = offset
        self.known_to = offset

    @property
    def shows_alone(self) -> bool:
        """Whether nobody else has to be asked for what is known."""
        return self._next is None or self._holes_to == self._start

    def all_runs(self) -> list[LayerRun]:
        """What is known: most disks have one layer, and perhaps millions of runs."""
        where = self._where
        return [(flags, count, place, where) for flags, count, place in self._runs]

    async def show(self, offset: int, end: int, found: list[LayerRun], until: int = 0) -> None:
        """Add what is in a range.

        Args:
            until: how far somebody will ask, with other ranges.
        """
        end_of_next = self._next.length if self._next else 0
        while offset < end:
            if offset >= self.known_to:
                await self.ask(offset, min(until, self._node.length))
            flags, count, place = self._runs[self._number]
            stop = self._start + count
            if stop > offset:
                place += offset - self._start
                count = min(stop, end) - offset
                if flags & self._settled or self._next is None:
                    found.append((flags, count, place, self._where))
                elif offset >= end_of_next:
                    # It is shorter: zeroes.
                    flags |= _ZERO | self._settled & _ALLOCATED
                    found.append((flags, count, place, self._where))
                else:
                    count = min(count, end_of_next - offset)
                    await self._next.show(offset, offset + count, found, self._holes_to)
                offset += count
            if stop <= offset:
                self._start = stop
                self._number += 1

    @property
    def length(self) -> int:
        """Of the node, in bytes."""
        return self._node.length


async def is_allocated(node: BlockNode, offset: int, length: int) -> tuple[bool, int]:
    """Whether this layer, not one below, has what is at `offset`, and for how many bytes that is so.

    Raises:
        BlockError: the driver's errno.
    """
    status = await block_status(node, offset, length, precise=False)
    return bool(status.flags & _ALLOCATED), status.length


async def is_allocated_above(
    top: BlockNode, base: BlockNode | None, offset: int, length: int
) -> tuple[bool, int]:
    """Whether any layer from `top` down to above `base` has what is at `offset`, and for how many bytes (row B21.14).

    Raises:
        BlockError: a driver's errno.
    """
    layer: BlockNode | None = top
    run = length
    while layer is not None and layer is not base:
        allocated, count = await is_allocated(layer, offset, length)
        if allocated:
            return True, count
        # A layer that is shorter than the range says nothing of what is behind its end.
        if layer is top or offset + count < layer.length:
            run = min(run, count)
        layer = _next_layer(layer)
    return False, run


def has_zero_init(node: BlockNode) -> bool:
    """Whether a new node is guaranteed to read as zeroes (row B21.15)."""
    return node.backing is None and node.has_zero_init()


def can_unmap_to_zero(node: BlockNode) -> bool:
    """Whether a zero-write with MAY_UNMAP deallocates and still reads as zeroes (row B21.16)."""
    return node.backing is None and node.unmap and bool(node.supported_zero_flags & Req.MAY_UNMAP)


def _next_layer(node: BlockNode) -> BlockNode | None:
    edge = chain_child(node)
    return edge.node if edge is not None else None
