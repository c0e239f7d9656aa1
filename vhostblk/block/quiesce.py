"""Drain: a moment, or a while, in which nothing is in flight (block layer row B26).

Theory of operation: *quiesce* is immediate: whoever is above a node is told to send nothing new, up to the roots, which
keep requests waiting, and to give extents back. *Settle* waits until what was in flight is over. Every begin has an end
and all are counted, so drains nest and overlap; a node that is attached to a quiesced one is quiesced as often.

A drain does not flush. It must not be awaited by a request that is itself in flight there.

Knows nothing about requests: who has some in flight counts them in `in_flight`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vhostblk.block.edge import Edge
    from vhostblk.block.graph import BlockGraph
    from vhostblk.block.node import BlockNode


class Quiescent:
    """What has requests in flight and can be told to stop: a node, or a root.

    Attributes:
        in_flight: requests that are past validation (row B14.2).
        quiesced: how many drains ask for silence.
        subtree_quiesced: how many of them are for everything below, too.

    Context: the control loop.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self.quiesced = 0
        self.subtree_quiesced = 0
        self._idle_waiters: list[asyncio.Future[None]] = []

    def leave(self) -> None:
        """One request less in flight."""
        self.in_flight -= 1
        if not self.in_flight and self._idle_waiters:
            waiters, self._idle_waiters = self._idle_waiters, []
            wake(waiters)

    async def idle(self) -> None:
        """Return when nothing is in flight."""
        while self.in_flight:
            waiter = asyncio.get_running_loop().create_future()
            self._idle_waiters.append(waiter)
            await waiter


def wake(waiters: Iterable[asyncio.Future[None]]) -> None:
    """Let them all go on; those that were cancelled meanwhile have gone."""
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)


def join(edge: Edge) -> None:
    """An edge was attached: its parent stops as often as the node was told to, and the other way round (row B26.7)."""
    for _ in range(edge.node.quiesced):
        edge.parent.child_drained_begin(edge)
    quiesce_subtree(edge.node, edge.parent.subtree_quiesced)


def part(edge: Edge, node: BlockNode) -> None:
    """An edge was taken out of the parents of `node`: undo what `join`, and drains since then, did through it."""
    for _ in range(node.quiesced):
        edge.parent.child_drained_end(edge)
    unquiesce_subtree(node, edge.parent.subtree_quiesced)


@asynccontextmanager
async def drained(node: BlockNode) -> AsyncIterator[None]:
    """Nothing is in flight in the node, nor above, inside `async with`."""
    node.quiesce()
    try:
        await node.settle()
        await node.settle_below()
        yield
    finally:
        node.unquiesce()


@asynccontextmanager
async def subtree_drained(node: BlockNode) -> AsyncIterator[None]:
    """The same for the node and all below it, whoever else uses those (row B26.7)."""
    quiesce_subtree(node)
    try:
        await _settle_subtree(node)
        yield
    finally:
        unquiesce_subtree(node)


@asynccontextmanager
async def all_drained(graph: BlockGraph) -> AsyncIterator[None]:
    """The same for all nodes of a graph; those that are opened meanwhile are born quiesced (row B26.8)."""
    graph.quiesced += 1
    for node in tuple(graph.nodes.values()):
        node.quiesce()
    try:
        # One request's end may begin another: until one pass has seen nobody busy.
        busy = True
        while busy:
            nodes = tuple(graph.nodes.values())
            for node in nodes:
                await node.settle()
            busy = any(node.in_flight for node in nodes)
        yield
    finally:
        graph.quiesced -= 1
        for node in tuple(graph.nodes.values()):
            node.unquiesce()


def quiesce_subtree(node: BlockNode, times: int = 1) -> None:
    """Quiesce a node and what is below, now and while it stays there; parents before children."""
    for _ in range(times):
        node.subtree_quiesced += 1
        node.quiesce()
    if times:
        for edge in node.children.values():
            quiesce_subtree(edge.node, times)


def unquiesce_subtree(node: BlockNode, times: int = 1) -> None:
    """Undo `quiesce_subtree`; children before parents."""
    if times:
        for edge in node.children.values():
            unquiesce_subtree(edge.node, times)
    for _ in range(times):
        node.subtree_quiesced -= 1
        node.unquiesce()


async def _settle_subtree(node: BlockNode) -> None:
    await node.settle()
    for edge in tuple(node.children.values()):
        await _settle_subtree(edge.node)
