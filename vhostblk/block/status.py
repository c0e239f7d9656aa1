"""Block status: what a layer has where, and where that is in a file (block layer row B21).

A driver answers for its own layer only (`driver_block_status`); here the answer is completed: what is unallocated
without a backing node reads as zeroes, a `RAW` answer is asked again of the child it points to, a long answer is cut.

| DATA | ZERO | OFFSET_VALID | |
|---|---|---|---|
| x | x | x | zeroes, at that offset of the file |
| x | | x | data, at that offset of the file |
| | x | x | preallocated: reads as zeroes, what the file has there is nobody's business |
| | | x | preallocated, the content comes from the backing node |
| x | x | | preallocated, reads as zeroes, place unknown |
| x | | | data, place unknown (compressed, encrypted) |
| | x | | reads as zeroes |
| | | | not in this layer: ask the backing node |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vhostblk.block.flags import Req, StatusFlag
from vhostblk.block.limits import align_down, align_up
from vhostblk.block.roles import chain_child
from vhostblk.errors import BlockError

if TYPE_CHECKING:
    from vhostblk.block.node import BlockNode


@dataclass(frozen=True, slots=True)
class BlockStatus:
    """What is so for `length` bytes from the offset that was asked.

    Attributes:
        length: bytes; 0 only at the end of the node.
        file, map: the node, and the offset in it, where the data is; valid with OFFSET_VALID. A driver that names no
            node means its own.
    """

    flags: StatusFlag
    length: int
    file: BlockNode | None = None
    map: int = 0


_NOTHING = StatusFlag(0)
_RECURSE = StatusFlag.RECURSE | StatusFlag.DATA | StatusFlag.OFFSET_VALID


async def block_status(
    node: BlockNode, offset: int, length: int, precise: bool = True
) -> BlockStatus:
    """The status of one layer.

    Args:
        precise: False: only what is allocated matters, zeroes may be called data (row B21.10).

    Raises:
        BlockError: the driver's errno.
    """
    if offset >= node.length:
        return BlockStatus(StatusFlag.EOF, 0)
    if not length:
        return BlockStatus(_NOTHING, 0)
    length = min(length, node.length - offset)
    node.in_flight += 1
    try:
        found = await _own_status(node, offset, length, precise)
    finally:
        node.leave()
    flags = found.flags & ~StatusFlag.EOF
    if offset + found.length == node.length:
        flags |= StatusFlag.EOF
    return replace(found, flags=flags)


async def _own_status(node: BlockNode, offset: int, length: int, precise: bool) -> BlockStatus:
    """Ask the driver for whole blocks, cut what it says, follow it to its file."""
    align = node.limits.request_alignment
    start, end = align_down(offset, align), align_up(offset + length, align)
    found = await node.driver_block_status(start, end - start, precise)
    assert found.length > 0, f"{node.node_name}: no progress at {offset}"
    assert not found.length % align, f"{node.node_name}: {found.length} bytes at {offset}"
    if found.flags & StatusFlag.OFFSET_VALID and found.file is None:
        found = replace(found, file=node)
    skip = offset - start
    found = replace(found, length=min(found.length - skip, length), map=found.map + skip)
    if found.flags & StatusFlag.RAW:
        assert found.flags & StatusFlag.OFFSET_VALID
        assert found.file is not None
        below = await block_status(found.file, found.map, found.length, precise)
        # Behind the end of the file are zeroes.
        return below if below.length else BlockStatus(StatusFlag.ZERO, found.length)
    flags = found.flags
    if flags & (StatusFlag.DATA | StatusFlag.ZERO):
        flags |= StatusFlag.ALLOCATED
    elif node.backing is None or offset >= node.backing.length:
        flags |= StatusFlag.ZERO
    found = replace(found, flags=flags & ~StatusFlag.RECURSE)
    recurse = flags & _RECURSE == _RECURSE and not flags & StatusFlag.ZERO
    if precise and recurse and found.file is not None and found.file is not node:
        return await _refine(found, found.file)
    return found


async def _refine(found: BlockStatus, file: BlockNode) -> BlockStatus:
    """The file may know of zeroes where its user has data (row B21.9); what it fails to tell does no harm."""
    try:
        below = await block_status(file, found.map, found.length)
    except BlockError:
        return found
    if below.flags & StatusFlag.EOF and (not below.length or below.flags & StatusFlag.ZERO):
        # Formats may read past the end of their file.
        return replace(found, flags=found.flags | StatusFlag.ZERO)
    zero = below.flags & StatusFlag.ZERO
    return replace(found, flags=found.flags | zero, length=min(found.length, below.length))


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
    while status.length and not status.flags & StatusFlag.ALLOCATED and layer not in (base, None):
        assert layer is not None
        below = await block_status(layer, offset, status.length, precise)
        ends_in_zeroes = below.flags & StatusFlag.ZERO and below.flags & StatusFlag.EOF
        if not below.length or (below.flags & StatusFlag.ALLOCATED and ends_in_zeroes):
            # A layer that is shorter: zeroes behind its end, for as long as those above have nothing.
            zero = StatusFlag.ZERO | StatusFlag.ALLOCATED
            below = BlockStatus(below.flags | zero, status.length, layer, below.map)
        status = below
        layer = _next_layer(layer)
    is_end = top.flags & StatusFlag.EOF and status.length == top.length
    return replace(
        status, flags=status.flags & ~StatusFlag.EOF | (StatusFlag.EOF if is_end else _NOTHING)
    )


async def is_allocated(node: BlockNode, offset: int, length: int) -> tuple[bool, int]:
    """Whether this layer, not one below, has what is at `offset`, and for how many bytes that is so.

    Raises:
        BlockError: the driver's errno.
    """
    status = await block_status(node, offset, length, precise=False)
    return bool(status.flags & StatusFlag.ALLOCATED), status.length


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
