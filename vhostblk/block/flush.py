"""Flush: what has completed before is durable when it returns (block layer row B19).

Theory of operation: a flush samples the write generation before it queues up; a node is flushed once at a time, in
order. The disk step is skipped where the generation that was flushed last is not older than the sample. The file child
is flushed in any case; a driver that is responsible for all beneath it says so (`driver_flush_all`).

Knows nothing about requests.
"""

from __future__ import annotations

import asyncio

from vhostblk.block.extent import FlushTarget
from vhostblk.block.node import BlockNode, Role
from vhostblk.errors import BlockError


async def flush(node: BlockNode) -> None:
    """Make every write that has completed before this call durable, down to the leaves.

    Raises:
        BlockError: the driver's errno; the next flush tries again.
    """
    if node.read_only:
        return
    node.in_flight += 1
    # Sampled before queueing: writes that complete later are the next flush's (rows B19.2 and
    # B19.8).
    generation = node.write_generation()
    try:
        while node.flush_active:
            turn = asyncio.get_running_loop().create_future()
            node.flush_queue.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not node.flush_active:
                    _next_flush(node)  # the turn may have been ours
                raise
        node.flush_active = True
        try:
            await _flush_layer(node, generation)
            node.flushed_gen = max(node.flushed_gen, generation)
        finally:
            node.flush_active = False
            _next_flush(node)
    finally:
        node.leave()


async def _flush_layer(node: BlockNode, generation: int) -> None:
    if await node.driver_flush_all():
        return
    await _debug_event_below(node, "flush_to_os")
    await node.driver_flush_to_os()
    if not node.no_flush and node.flushed_gen < generation:
        await _debug_event_below(node, "flush_to_disk")
        await node.driver_flush_to_disk()
    # Also when this layer had nothing to do (row B19.5). What is below a COW layer is not ours to flush.
    for edge in tuple(node.children.values()):
        if not edge.role & Role.COW:
            await flush(edge.node)


async def _debug_event_below(node: BlockNode, name: str) -> None:
    for edge in node.children.values():
        if edge.role & Role.PRIMARY and edge.node.has_debug_events:
            await edge.node.driver_debug_event(name)


def _next_flush(node: BlockNode) -> None:
    while node.flush_queue:
        turn = node.flush_queue.pop(0)
        if not turn.done():
            turn.set_result(None)
            break


async def flush_all(nodes: list[BlockNode]) -> None:
    """Flush every node, also after an error.

    Raises:
        BlockError: the first error (row B19.10).
    """
    first: BlockError | None = None
    for node in nodes:
        try:
            await flush(node)
        except BlockError as error:
            first = first or error
    if first is not None:
        raise first


def flush_target(node: BlockNode) -> int | FlushTarget:
    """The one file whose fdatasync is a complete flush of this node, or why there is none.

    A node with several users has none: the kernel tells of a lost write once, to whoever asks first, and all of them
    have to know. So their flushes come through here.
    """
    target = node.flush_target()
    return FlushTarget.ASK if isinstance(target, int) and len(node.parents) > 1 else target
