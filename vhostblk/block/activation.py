"""Handing an image over to another process and taking it back (block layer row B40).

Theory of operation: an *inactive* node stays open, but the image is somebody else's: nobody here writes it, what is
cached of its metadata is not believed, its locks are given back. Users of the nodes keep their edges and lose their
permissions until the nodes are active again. To inactivate is to drain, flush, let drivers store what they have, and
drop all of that at once; to activate is to take permissions and locks again, which may fail, then to look at the image
anew, which may fail, too: then everything goes back. Meanwhile nobody new comes (`BlockNode.being_activated`), so that
going back cannot fail.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from vhostblk.block import pipeline
from vhostblk.block.node import BlockNode
from vhostblk.block.permissions import Perm, parents_first
from vhostblk.block.quiesce import drained
from vhostblk.block.transaction import GraphTransaction
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.edge import Edge
    from vhostblk.block.graph import BlockGraph


async def inactivate(
    graph: BlockGraph, nodes: Iterable[BlockNode] | None = None, user: Edge | None = None
) -> None:
    """Give images up. Returns when nothing of them is used here any more, and everything is on the disk.

    Args:
        nodes: these and all below; None: all there are. Those that are inactive already stay so.
        user: who gives them up; what others use stays theirs. None: everybody does.

    Raises:
        ConfigError: a flush or a driver failed, or somebody else uses one of `nodes`; everything is as it was.
    """
    wanted = list(graph.nodes.values()) if nodes is None else list(nodes)
    async with _changing(graph, wanted, inactive=False) as chosen:
        if user is not None:
            chosen = _used_by(user, wanted, chosen)
        for node in chosen:
            await _flush(node)
        change = GraphTransaction()
        done: list[BlockNode] = []
        try:
            for node in chosen:
                await node.driver_inactivate()
                done.append(node)
            for node in chosen:
                change.assign(node, "inactive", True)
                for edge in _root_edges(node):
                    change.assign(edge, "suspended", (edge.perm, edge.shared))
                    change.ask(edge, Perm.NONE, Perm.ALL)
                change.refresh(node)
            change.check()
        except BaseException:
            change.abort()
            for node in reversed(done):
                await node.driver_activate()
            raise
        change.commit(checked=True)


async def activate(graph: BlockGraph, nodes: Iterable[BlockNode] | None = None) -> None:
    """Take images back.

    Args:
        nodes: these and all below; None: all there are. Those that are active already stay so.

    Raises:
        ConfigError: somebody else still has an image, or it cannot be read; nothing has become active.
    """
    async with _changing(graph, nodes, inactive=True) as chosen:
        before = [
            (edge, edge.perm, edge.shared, edge.suspended)
            for node in chosen
            for edge in _root_edges(node)
        ]
        with GraphTransaction() as change:
            for node in chosen:
                change.assign(node, "inactive", False)
                change.refresh(node)
            for edge, _, _, suspended in before:
                if suspended is not None:
                    change.ask(edge, *suspended)
                    change.assign(edge, "suspended", None)
        done: list[BlockNode] = []
        try:
            for node in chosen:
                node.being_activated = True
            for node in reversed(chosen):
                await node.driver_activate()
                done.append(node)
        except BaseException:
            try:
                for node in reversed(done):
                    await node.driver_inactivate()
            finally:
                _go_back(chosen, before)
            raise
        finally:
            for node in chosen:
                node.being_activated = False
        for node in reversed(chosen):
            await node.refresh_length()


def _go_back(
    chosen: list[BlockNode], before: list[tuple[Edge, Perm, Perm, tuple[Perm, Perm] | None]]
) -> None:
    """Nobody has come meanwhile; some may have left."""
    with GraphTransaction() as change:
        for node in chosen:
            change.assign(node, "inactive", True)
            change.refresh(node)
        for edge, perm, shared, suspended in before:
            if edge in edge.node.parents:
                change.ask(edge, perm, shared)
                change.assign(edge, "suspended", suspended)


@asynccontextmanager
async def _changing(
    graph: BlockGraph, nodes: Iterable[BlockNode] | None, *, inactive: bool
) -> AsyncIterator[list[BlockNode]]:
    """Those that are (in)active when it is our turn to change the graph, parents before children."""
    async with graph.changing(), AsyncExitStack() as stack:
        wanted = graph.nodes.values() if nodes is None else nodes
        chosen = [node for node in parents_first(wanted) if node.inactive is inactive]
        for node in chosen:
            await stack.enter_async_context(drained(node))
        yield chosen


def _used_by(user: Edge, wanted: list[BlockNode], chosen: list[BlockNode]) -> list[BlockNode]:
    """Those of `chosen` that nobody else uses, directly or from above: a base that several disks share stays."""
    mine: list[BlockNode] = []
    for node in chosen:
        others = [edge for edge in node.parents if edge is not user and edge.parent not in mine]
        if not others:
            mine.append(node)
        elif node in wanted:
            reason = f"Node '{node.node_name}' is used by {others[0].describe()}, too"
            raise ConfigError(reason, errno.EBUSY)
    return mine


def _root_edges(node: BlockNode) -> list[Edge]:
    return [edge for edge in node.parents if not isinstance(edge.parent, BlockNode)]


async def _flush(node: BlockNode) -> None:
    try:
        await pipeline.flush(node)
    except BlockError as error:
        raise ConfigError(
            f"Error flushing node '{node.node_name}': {error.strerror}", error.errno or errno.EIO
        ) from None
