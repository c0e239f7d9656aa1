"""The graph: opening, naming, finding and closing nodes (block layer rows B05 and B07).

Theory of operation of opening: driver, then the options every node has, then the driver's own, then
whatever is left is an error; only then is anything opened. Children are references to nodes or
inline options; an inline child inherits its parent's modes as defaults (row B06) and is closed with
its last parent, while nodes from `add()` live until `remove()`.

Knows nothing about requests.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from vhostblk.block import pipeline
from vhostblk.block.bounce import BouncePool
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.edge import Edge
from vhostblk.block.host_io import HostIO, create_host_io
from vhostblk.block.limits import MAX_LENGTH, SECTOR_SIZE, BlockLimits
from vhostblk.block.node import BlockNode, Role
from vhostblk.block.options import NodeOptions, consume, flatten, leftover, parse_options
from vhostblk.block.permissions import Perm
from vhostblk.errors import BlockError, ConfigError, StateError

__all__ = ["BlockGraph", "Edge"]

log = logging.getLogger(__name__)

# Row B07.1.
_NODE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9\-._]{0,30}\Z")


class BlockGraph:
    """All nodes of one daemon.

    Args:
        drivers: name to node class.

    Context: the control loop; nothing here may be called before it runs.
    Owns: the nodes, the file I/O they use, their scratch buffers.
    """

    def __init__(self, drivers: Mapping[str, type[BlockNode]] = DRIVERS) -> None:
        self.drivers = drivers
        self.nodes: dict[str, BlockNode] = {}
        self.bounce = BouncePool()
        self._opening: set[str] = set()  # names of nodes that are not ready to be anybody's child
        self._kept: set[BlockNode] = set()  # from add(); the others live as long as their parents
        self._host_io: dict[str | None, HostIO] = {}
        self._next_name = 100
        self.quiesced = (
            0  # drains of everything (`quiesce.all_drained`): new nodes begin with so many
        )
        self._flush_failed = False  # of a node at its end

    async def add(self, options: Mapping[str, Any] | str) -> BlockNode:
        """Open a node.

        Args:
            options: nested or dotted; or the text of a `--blockdev` option.

        Raises: ConfigError: one line that names the option, the value and what is allowed, or the
            file and the reason.
        """
        if isinstance(options, str):
            options = parse_options(options, "driver")
        node = await self._open(flatten(options), "")
        self._kept.add(node)
        return node

    def find(self, name: str) -> BlockNode:
        """The node of this name.

        Raises:
            ConfigError: there is none.
        """
        if name not in self.nodes or name in self._opening:
            raise ConfigError(f"Cannot find node '{name}'")
        return self.nodes[name]

    async def remove(self, name: str) -> None:
        """Close a node that nobody uses; inline children that nobody else uses go with it.

        Raises:
            ConfigError: there is no such node, or it is in use; names the user.
        """
        node = self.find(name)
        if node.parents:
            raise ConfigError(f"Node '{name}' is in use: {node.parents[0].describe()}")
        await self._close(node)

    async def close_all(self) -> bool:
        """Close every node, parents first, and all file I/O.

        Returns:
            False if a node's last flush failed, now or when it was removed; that is in the log.

        Raises:
            StateError: somebody outside the graph still uses a node; the others are closed.
        """
        while roots := [node for node in self.nodes.values() if not node.parents]:
            for node in roots:
                if node.node_name in self.nodes:
                    await self._close(node)
        if self.nodes:
            left = next(node for node in self.nodes.values() if node.parents)
            raise StateError(f"Node '{left.node_name}' is in use: {left.parents[0].describe()}")
        for host_io in self._host_io.values():
            await host_io.close()
        self._host_io.clear()
        self.bounce.close()
        return not self._flush_failed

    def host_io(self, aio: str | None) -> HostIO:
        """The file I/O of this kind, shared by all nodes.

        Raises:
            ConfigError: it is not available here.
        """
        if aio not in self._host_io:
            self._host_io[aio] = create_host_io(aio)
        return self._host_io[aio]

    async def _open(self, flat: dict[str, Any], where: str) -> BlockNode:
        driver = flat.pop("driver", None)
        if driver is None:
            raise ConfigError(f"Parameter '{where}driver' is missing")
        if not isinstance(driver, str) or driver not in self.drivers:
            known = ", ".join(sorted(self.drivers))
            raise ConfigError(f"Unknown driver '{driver}' for '{where}driver' (known: {known})")
        node_type = self.drivers[driver]
        common = consume(NodeOptions, flat, where)
        children = {
            name: flat.pop(name)
            for name in tuple(flat)
            if name.partition(".")[0] in node_type.child_keys
        }
        leftover(flat, driver, common.node_name or "", where, node_type.options_type)
        options = consume(node_type.options_type, flat, where)
        node = node_type(self._name(common.node_name), common, options)
        node.bounce = self.bounce
        node.quiesced = self.quiesced
        # Taken from here on: opening may wait.
        self.nodes[node.node_name] = node
        self._opening.add(node.node_name)
        try:
            await node.open(_Opening(self, children, where))
            refresh_limits(node)
            if node.length > MAX_LENGTH:
                raise ConfigError(f"Node '{node.node_name}' is too large: {node.length} bytes")
            assert node.length % SECTOR_SIZE == 0
        except BaseException:
            await self._dissolve(node)
            raise
        finally:
            self._opening.discard(node.node_name)
        return node

    def _name(self, name: str | None) -> str:
        if name is None:
            self._next_name += 1
            return f"#block{self._next_name}"  # no user can choose such a name
        if not _NODE_NAME.match(name):
            raise ConfigError(
                f"Invalid node-name: '{name}' (a letter, then letters, digits, '-', '.' or '_', "
                "31 characters at most)"
            )
        if name in self.nodes:
            raise ConfigError(f"Duplicate nodes with node-name='{name}'")
        return name

    async def _close(self, node: BlockNode) -> None:
        """Row B07.9; also B07.10 with row C19: what the last flush says is logged."""
        await node.drained_begin()
        try:
            await pipeline.flush(node)
        except BlockError as error:
            log.error("node '%s': flush at close failed: %s", node.node_name, error)
            self._flush_failed = True
        finally:
            node.drained_end()
        await self._dissolve(node)

    async def _dissolve(self, node: BlockNode) -> None:
        children = [edge.node for edge in node.children.values()]
        for edge in tuple(node.children.values()):
            edge.detach()
        node.children.clear()
        self.nodes.pop(node.node_name, None)
        self._kept.discard(node)
        try:
            await node.close()
        except OSError as error:
            log.error("node '%s': close failed: %s", node.node_name, error)
        for child in children:
            if not child.parents and child not in self._kept and child.node_name in self.nodes:
                await self._close(child)


def refresh_limits(node: BlockNode) -> None:
    """Compute a node's limits from its children's and the driver's own (row B12.2)."""
    limits = BlockLimits()
    if node.children:
        limits.min_mem_alignment = limits.opt_mem_alignment = 1
        for edge in node.children.values():
            limits.merge(edge.node.limits)
    node.limits = limits
    node.refresh_limits()
    limits.check()


class _Opening:
    """What a node sees of the graph while it opens (`node.OpenContext`)."""

    def __init__(self, graph: BlockGraph, children: dict[str, Any], where: str) -> None:
        self.bounce = graph.bounce
        self.host_io = graph.host_io
        self._graph = graph
        self._children = children
        self._where = where

    async def open_child(self, parent: BlockNode, key: str, role: Role) -> Edge:
        """Open or find the child that the options give under `key` (row B05.11)."""
        name = f"{self._where}{key}"
        if key in self._children:
            reference = self._children[key]
            if not isinstance(reference, str):
                raise ConfigError(f"Parameter '{name}' expects a node name, not '{reference}'")
            node = self._graph.find(reference)
        else:
            prefix = f"{key}."
            flat = {
                option.removeprefix(prefix): value
                for option, value in self._children.items()
                if option.startswith(prefix)
            }
            if not flat:
                raise ConfigError(
                    f"Parameter '{name}' is missing: a node name or '{prefix}' options"
                )
            node = await self._graph._open(self._inherit(parent, flat), f"{name}.")
        edge = Edge(parent, node, key, role, Perm.NONE, Perm.ALL)
        try:
            edge.attach()
        except BaseException:
            if not node.parents and node not in self._graph._kept:
                await self._graph._dissolve(node)
            raise
        parent.children[key] = edge
        return edge

    def _inherit(self, parent: BlockNode, flat: dict[str, Any]) -> dict[str, Any]:
        common = parent.common
        modes: dict[str, Any] = {
            "read-only": common.read_only,
            "auto-read-only": common.auto_read_only,
            "force-share": common.force_share,
            "cache.direct": common.cache_direct,
            "cache.no-flush": common.cache_no_flush,
            # The parent decides what to discard; the file then obeys (row B06.5).
            "discard": "unmap",
        }
        if flat.get("read-only", common.read_only) not in (True, "on", "yes", "true", "y"):
            del modes["force-share"]
        return {**modes, **flat}
