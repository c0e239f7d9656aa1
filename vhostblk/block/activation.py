"""Handing an image over to another process and taking it back (block layer row B40).

Theory of operation: an *inactive* node stays open, but the image is somebody else's: nobody here writes it, what is
cached of its metadata is not believed, its locks are given back. Users of the nodes keep their edges and lose their
permissions until the nodes are active again. To inactivate is to drain, flush, let drivers store what they have, and
drop all of that at once; to activate is to take permissions and locks again, which may fail, then to look at the image
anew.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vhostblk.block import pipeline
from vhostblk.block.node import BlockNode
from vhostblk.block.permissions import Perm, parents_first
from vhostblk.block.transaction import GraphTransaction
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.edge import Edge
    from vhostblk.block.graph import BlockGraph


async def inactivate(graph: BlockGraph, nodes: Iterable[BlockNode] | None = None) -> None:
    """Give images up. Returns when nothing of them is used here any more, and everything is on the disk.

    Args:
        nodes: these and all below; None: all there are. Those that are inactive already stay so.

    Raises:
        ConfigError: a flush or a driver failed, or somebody above still writes; everything is as it was.
    """
    chosen = _chosen(graph, nodes, inactive=False)
    async with graph.changing(*chosen):
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
    chosen = _chosen(graph, nodes, inactive=True)
    async with graph.changing(*chosen):
        change = GraphTransaction()
        done: list[BlockNode] = []
        try:
            for node in chosen:
                change.assign(node, "inactive", False)
                for edge in _root_edges(node):
                    if edge.suspended is not None:
                        change.ask(edge, *edge.suspended)
                        change.assign(edge, "suspended", None)
                change.refresh(node)
            change.check()
            for node in reversed(chosen):
                await node.driver_activate()
                done.append(node)
        except BaseException:
            for node in reversed(done):
                await node.driver_inactivate()
            change.abort()
            raise
        change.commit(checked=True)
        for node in reversed(chosen):
            await node.refresh_length()


def _chosen(
    graph: BlockGraph, nodes: Iterable[BlockNode] | None, *, inactive: bool
) -> list[BlockNode]:
    """Parents before children."""
    wanted = graph.nodes.values() if nodes is None else nodes
    return [node for node in parents_first(wanted) if node.inactive is inactive]


def _root_edges(node: BlockNode) -> list[Edge]:
    return [edge for edge in node.parents if not isinstance(edge.parent, BlockNode)]


async def _flush(node: BlockNode) -> None:
    try:
        await pipeline.flush(node)
    except BlockError as error:
        raise ConfigError(
            f"Error flushing node '{node.node_name}': {error.strerror}", error.errno or errno.EIO
        ) from None
