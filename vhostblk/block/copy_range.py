"""Copying between nodes, without moving the bytes through this process where that can be (block layer row B22).

Theory of operation: the source's side goes down first: every layer tracks a read and passes the request on to its
child, until the node that has the bytes is reached. From there the target's side goes down in the same way, as a write,
and the last node copies if it is of the same kind. A layer that does not pass the request on makes it ENOTSUP, so a
filter that wants to see the bytes does; the caller then reads and writes (`Copier`). So it is where both sides share a
node: the read would be in the write's way.
"""

from __future__ import annotations

import errno

from vhostblk.block import pipeline, submit
from vhostblk.block.edge import Edge
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import MAX_BOUNCE, align_up
from vhostblk.block.node import BlockNode, Req
from vhostblk.block.tracking import RequestType
from vhostblk.errors import BlockError

_FUA = int(Req.FUA)


async def copy_range(
    source: Edge, source_offset: int, target: Edge, offset: int, length: int, flags: int = 0
) -> None:
    """Copy where the storage can do it by itself.

    Args:
        flags: of the write; with FUA it is durable when this returns.

    Raises:
        BlockError: ENOTSUP: it cannot, read and write instead; else the errno of a driver.
    """
    if nodes_below(source.node) & nodes_below(target.node):
        raise BlockError(errno.ENOTSUP)
    target.check_write(offset, 0)
    await copy_range_from(source.node, source_offset, target.node, offset, length, flags & ~_FUA)
    if flags & _FUA:
        # Not by a driver: before all layers have noted the write, a flush would find nothing to do.
        await pipeline.flush(target.node)


def nodes_below(node: BlockNode) -> set[BlockNode]:
    """A node and all that it is made of."""
    return {node}.union(*(nodes_below(edge.node) for edge in node.children.values()))


async def copy_range_from(
    source: BlockNode, source_offset: int, target: BlockNode, offset: int, length: int, flags: int
) -> None:
    """The source's side of one layer; layers below are asked in the same way."""
    pipeline.check_range(source, source_offset, length)
    _check_alignment(source, source_offset, length)
    source.in_flight += 1
    request = source.tracker.begin(RequestType.READ, source_offset, length)
    try:
        await source.tracker.wait(request)
        await source.driver_copy_range_from(source_offset, target, offset, length, flags)
    finally:
        source.tracker.end(request)
        source.leave()


async def copy_range_to(
    source: BlockNode, source_offset: int, target: BlockNode, offset: int, length: int, flags: int
) -> None:
    """The target's side of one layer: a write, with hooks and bookkeeping."""
    pipeline.check_writable(target)
    pipeline.check_range(target, offset, length)
    _check_alignment(target, offset, length)
    target.in_flight += 1
    request = target.tracker.begin(RequestType.WRITE, offset, length)
    try:
        await pipeline.serialise(target, request, flags)
        try:
            if target.before_write:
                await pipeline.run_before_write(target, request)
            await target.driver_copy_range_to(source, source_offset, offset, length, flags)
        finally:
            target.write_log.wrote(offset, offset + length)
        pipeline.written(target, offset + length)
    finally:
        target.tracker.end(request)
        target.leave()


def _check_alignment(node: BlockNode, offset: int, length: int) -> None:
    if (offset | length) & (node.limits.request_alignment - 1) or offset + length > node.length:
        raise BlockError(errno.ENOTSUP)


class Copier:
    """Copies from one node to another, in the cheapest way that works (row B22.4).

    Context: the control loop.
    """

    def __init__(self, source: Edge, target: Edge) -> None:
        self.source = source
        self.target = target
        self.offloads = True
        """Whether the storage is still thought to copy by itself."""

    async def copy(self, offset: int, length: int, flags: int = 0) -> None:
        """Copy a range to the same place of the target; what lies behind the end of the source is zeroes.

        Raises:
            BlockError: the errno of a driver.
        """
        if self.offloads:
            try:
                await copy_range(self.source, offset, self.target, offset, length, flags)
                return
            except BlockError as error:
                if error.errno != errno.ENOTSUP:
                    raise
                self.offloads = False
        end = offset + length
        while offset < end:
            count = min(end - offset, MAX_BOUNCE)
            async with submit.bounce_buffer(self.target.node, align_up(count, 512)) as buffer:
                content = IoVec([buffer[:count]])
                await self.source.preadv(offset, content)
                await self.target.pwritev(offset, content, flags)
            offset += count
