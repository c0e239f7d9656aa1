"""Rebuilding the graph under running requests: append, replace, insert a filter, drop it (block layer row B10).

Every operation drains what is around it, which takes back all extents, changes the edges in one transaction, and lets
requests go on: they wait, and nobody above notices anything else. What is refused has changed nothing.

Knows nothing about drivers, except which of them are filters.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vhostblk.block import opening
from vhostblk.block.backing import check_supports_backing, name_for, record
from vhostblk.block.chain import overlays_of
from vhostblk.block.edge import Edge
from vhostblk.block.keyval import flatten
from vhostblk.block.node import BlockNode
from vhostblk.block.op_blockers import OpType, check_frozen, check_op
from vhostblk.block.permissions import Perm, parents_first
from vhostblk.block.quiesce import drained
from vhostblk.block.roles import Role, filtered_child
from vhostblk.block.transaction import GraphTransaction
from vhostblk.errors import ConfigError

if TYPE_CHECKING:
    from vhostblk.block.graph import BlockGraph


async def append(graph: BlockGraph, new: BlockNode, top: BlockNode) -> None:
    """Make `new` the overlay of `top`: everybody who used `top` uses `new`, which uses `top` (row B10.1).

    Args:
        new: an open node without parents, and without the child that `top` becomes.

    Raises:
        ConfigError: `new` has no backing files, a permission is not to be had, or an edge is frozen.
    """
    if new.is_filter:
        role, name = Role.FILTERED | Role.PRIMARY, new.child_keys[0]
    else:
        check_supports_backing(new)
        role, name = Role.COW, "backing"
    if new.parents or name in new.children:
        raise ConfigError(f"Node '{new.node_name}' is in use already", errno.EBUSY)
    async with graph.changing(top, new):
        edge = Edge(new, top, name, role, Perm.NONE, Perm.ALL)
        with GraphTransaction() as change:
            change.attach(edge)
            change.refresh(new)
            _move_parents(change, top, new)
        new.child_changed(edge)


async def insert_filter(
    graph: BlockGraph, node: BlockNode, options: Mapping[str, Any]
) -> BlockNode:
    """Open a filter on top of `node` and put it between the node and all who use it (row B10.7).

    It stays, also when nobody uses it any more, until it is dropped.

    Args:
        options: of the filter, without its child.

    Raises:
        ConfigError: as for `BlockGraph.add`; or it is no filter, or the outcome is not allowed.
    """
    flat = flatten(options)
    driver = graph.drivers.find(flat.get("driver"))
    if not driver.is_filter:
        raise ConfigError(f"Driver '{driver.driver_name}' is not a filter")
    async with graph.changing(node):
        new = await opening.open_node(graph, {**flat, driver.child_keys[0]: node.node_name})
        try:
            with GraphTransaction() as change:
                _move_parents(change, node, new)
        except BaseException:
            await graph.collect(new)
            raise
        return graph.adopt(new)


async def drop_filter(graph: BlockGraph, node: BlockNode) -> None:
    """Take a filter out: everybody who used it uses what it filters (row B10.8).

    Raises:
        ConfigError: it is no filter, an edge is frozen, or the outcome is not allowed.
    """
    edge = filtered_child(node)
    if not node.is_filter or edge is None:
        raise ConfigError(f"Node '{node.node_name}' is not a filter")
    check_frozen(edge)
    async with graph.changing():
        async with drained(node):
            with GraphTransaction() as change:
                _move_parents(change, node, edge.node)
        await graph.give_up(node)


async def replace_node(graph: BlockGraph, old: BlockNode, new: BlockNode) -> None:
    """Make everybody who uses `old` use `new`, except those whose edge stays, and those below `new` (row B10.5).

    `old` is closed if nobody needs it any more: it was written inline, as a child.

    Raises:
        ConfigError: an edge is frozen, or the outcome is not allowed.
    """
    async with graph.changing(old, new):
        with GraphTransaction() as change:
            _move_parents(change, old, new)
        await graph.collect(old)


async def replace_child(graph: BlockGraph, edge: Edge, new: BlockNode) -> None:
    """Point one edge at another node (row B10.6); what it leaves is closed if nobody else needs it.

    Raises:
        ConfigError: the edge is frozen, or the outcome is not allowed.
    """
    old = edge.node
    async with graph.changing(old, new):
        with GraphTransaction() as change:
            change.move(edge, new)
            if isinstance(edge.parent, BlockNode):
                change.refresh(edge.parent)
        await graph.collect(old)


async def add_child(graph: BlockGraph, parent: BlockNode, child: BlockNode) -> Edge:
    """Give a node one more child, if its driver has a use for it (row B08.11).

    Raises:
        ConfigError: ENOTSUP: it has not; EBUSY: the child has a parent already; or the outcome is not allowed.
    """
    if child.parents:
        user = child.parents[0].describe()
        raise ConfigError(f"Node '{child.node_name}' already has a parent: {user}", errno.EBUSY)
    async with graph.changing(parent, child):
        name, role = parent.driver_add_child(child)
        edge = Edge(parent, child, name, role, Perm.NONE, Perm.ALL)
        with GraphTransaction() as change:
            change.attach(edge)
            change.refresh(parent)
        parent.child_changed(edge)
    return edge


async def del_child(graph: BlockGraph, parent: BlockNode, name: str) -> None:
    """Take a child from a node; it is closed if nobody else needs it (row B08.11).

    Raises:
        ConfigError: there is no such child, the driver cannot do without it (ENOTSUP), or the edge is frozen.
    """
    if name not in parent.children:
        raise ConfigError(f"Node '{parent.node_name}' has no child named '{name}'", errno.ENOENT)
    edge = parent.children[name]
    async with graph.changing(parent, edge.node):
        parent.driver_del_child(edge)
        with GraphTransaction() as change:
            change.detach(edge)
            change.refresh(parent)
        parent.compute_limits()
        await graph.collect(edge.node)


async def record_backing(node: BlockNode) -> None:
    """Have every overlay of a node say in its image that this is what it is backed by (row B08.10).

    To be called when the layer that was in between has left the chain, or is about to.

    Raises:
        BlockError: ENOTSUP where a format has no place for it, or an errno of the driver.
    """
    for overlay in overlays_of(node):
        await record(overlay, name_for(overlay, node))


def check_replaceable(graph: BlockGraph, parent: BlockNode, name: str) -> BlockNode:
    """The node that may be replaced below `parent`: the one that shows the same bytes (row B10.9).

    Raises:
        ConfigError: there is no such node, somebody blocks it, or it is deeper in the chain.
    """
    node = graph.find(name)
    check_op(node, OpType.REPLACE)
    shown = parent
    while shown is not node and shown.is_filter and (edge := filtered_child(shown)) is not None:
        shown = edge.node
    if shown is not node:
        raise ConfigError(
            f"Cannot replace '{name}': it is not the first node below '{parent.node_name}' that is "
            "no filter",
            errno.EPERM,
        )
    return node


def _move_parents(change: GraphTransaction, old: BlockNode, new: BlockNode) -> None:
    below = parents_first([new])
    for edge in tuple(old.parents):
        if not edge.stays and edge.parent not in below:
            change.move(edge, new)
