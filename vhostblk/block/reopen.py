"""Changing the options of open nodes, several at once, all or nothing (block layer row B34).

Theory of operation: a queue holds every node that changes, children before parents: those the caller names, and their
inline children, which inherit modes. All are drained. Each is *prepared*: flushed, its options typed and compared (only
those that are marked `mutable` may differ), and its driver gets what the new options need, a second fd for instance.
Then the new options are put in place within one graph transaction, which looks at permissions and locks as they would
be. Only if all of that went well the drivers *commit*, at once, which cannot fail, and put away what is old when all is
decided; otherwise they *abort*, and nobody notices.

Knows nothing about drivers.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vhostblk.block import pipeline
from vhostblk.block.execution import to_the_end
from vhostblk.block.keyval import flatten
from vhostblk.block.node import BlockNode
from vhostblk.block.opening import Parent, consume_options, split_children
from vhostblk.block.options import (
    NodeOptions,
    immutable_options,
    option_names,
    refuse_changes,
    to_boolean,
)
from vhostblk.block.permissions import parents_first
from vhostblk.block.quiesce import drained
from vhostblk.block.roles import Role
from vhostblk.block.transaction import GraphTransaction
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.graph import BlockGraph


@dataclass(slots=True)
class Reopen:
    """One node's part of a reopen; what its driver is told.

    Attributes:
        common, options: what they are going to be.
        read_only: what the node is going to be; `Driver.reopen_prepare` may set it, if `auto-read-only` lets it.
        children: those that are going to be other nodes, by key.
    """

    node: BlockNode
    given: dict[str, Any]
    common: NodeOptions
    options: Any
    read_only: bool
    children: dict[str, BlockNode] = field(default_factory=dict)


async def reopen(
    graph: BlockGraph,
    changes: Mapping[BlockNode, Mapping[str, Any]],
    *,
    keep_options: bool = True,
) -> None:
    """Change the options of some nodes.

    Args:
        changes: node to options, nested or dotted; `file` names another child, `file.*` changes an inline one.
        keep_options: options that are not given stay as they are; otherwise those that may change go back to their
            defaults (row B34.6).

    Raises:
        ConfigError: an option may not change, a driver or a permission does not allow it, or a flush failed; nothing
            has changed.
    """
    async with graph.changing(), AsyncExitStack() as stack:
        queue: dict[BlockNode, Reopen] = {}
        for node, options in changes.items():
            _enqueue(graph, queue, node, flatten(options), keep_options, None)
        for node in queue:
            await stack.enter_async_context(drained(node))
        left = [edge.node for entry in queue.values() for edge in _moved(entry)]
        await _perform(list(queue.values()))
        await to_the_end(_clean_up(graph, list(queue.values()), left))


async def acquire_write(graph: BlockGraph, node: BlockNode) -> None:
    """Somebody wants to write: open for writing what `auto-read-only` has left read-only (row B06.11), if it may be.

    What still cannot is left as it is, and whoever asks for the permission to write is refused.

    Raises:
        ConfigError: as `reopen`.
    """
    wanted = [
        below
        for below in reversed(parents_first([node]))
        if below.read_only and below.common.auto_read_only and not below.common.read_only
    ]
    # Inline children come with their parents.
    changes: dict[BlockNode, dict[str, Any]] = {
        below: {} for below in wanted if below.inherits_from not in wanted
    }
    if node in wanted:
        await reopen(graph, changes)


def _enqueue(
    graph: BlockGraph,
    queue: dict[BlockNode, Reopen],
    node: BlockNode,
    flat: dict[str, Any],
    keep_options: bool,
    parent: Parent | None,
) -> None:
    own, for_children = split_children(type(node), flat)
    _check_names(node, own)
    kept = node.given if keep_options else immutable_options(type(node).options_type, node.given)
    given = type(node).join_options(own, kept)
    if parent is None and node.inherits_from is not None:
        parent = (node.inherits_from.common, node.inherits_as)
    common, options = consume_options(type(node), given, "", parent)
    refuse_changes(node.common, common)
    refuse_changes(node.options, options)
    entry = Reopen(node, given, common, options, common.read_only)
    for key, edge in node.children.items():
        prefix = f"{key}."
        inner = {
            name.removeprefix(prefix): value
            for name, value in for_children.items()
            if name.startswith(prefix)
        }
        if key in for_children and inner:
            # Another child, or other options for the one there is: not both (row B05.2).
            raise ConfigError(f"Cannot change the option '{prefix}{next(iter(inner))}'")
        if key in for_children:
            entry.children[key] = _find(graph, for_children[key], key)
        elif edge.node.inherits_from is node:
            _enqueue(graph, queue, edge.node, inner, keep_options, (common, edge.role))
        elif inner:
            raise ConfigError(
                f"Cannot change the option '{next(iter(inner))}' of '{edge.node.node_name}' through "
                f"'{node.node_name}': it is no inline child"
            )
    for key, reference in for_children.items():
        child, dot, _ = key.partition(".")
        if child not in node.children:
            if not dot:
                _find(graph, reference, key)
            raise ConfigError(f"Cannot change the option '{key}'")
    if node in queue:
        raise ConfigError(f"Node '{node.node_name}' is to be reopened twice")
    queue[node] = entry


def _check_names(node: BlockNode, own: dict[str, Any]) -> None:
    """Driver and name cannot change; saying what they are is allowed. Nor can what is no option."""
    known = option_names(NodeOptions) | option_names(type(node).options_type) | {"driver"}
    for name in own:
        if name not in known and name.partition(".")[0] not in known:
            raise ConfigError(f"Cannot change the option '{name}'")
    for name, value in (("driver", node.driver_name), ("node-name", node.node_name)):
        if own.pop(name, value) != value:
            raise ConfigError(f"Cannot change the option '{name}'")
    if "force-share" in own and to_boolean("force-share", own["force-share"]) != node.force_share:
        raise ConfigError("Cannot change the option 'force-share'")


def _find(graph: BlockGraph, reference: Any, key: str) -> BlockNode:
    if not isinstance(reference, str):
        raise ConfigError(f"Parameter '{key}' expects a node name, not '{reference}'")
    try:
        return graph.find(reference)
    except ConfigError as error:
        text = f"Cannot find device='' nor node-name='{reference}'"
        raise ConfigError(str(error), error.errno, qemu_text=text) from None


def _moved(entry: Reopen) -> list[Any]:
    edges = entry.node.children
    return [edges[key] for key, node in entry.children.items() if edges[key].node is not node]


async def _perform(queue: list[Reopen]) -> None:
    prepared: list[Reopen] = []
    change = GraphTransaction()
    try:
        for entry in queue:
            await _flush(entry.node)
            await entry.node.reopen_prepare(entry)
            prepared.append(entry)
        for entry in queue:
            _put_in_place(change, entry)
        _check_permissions(change, queue)
    except BaseException:
        change.abort()
        for entry in prepared:
            await entry.node.reopen_abort(entry)
        raise
    # Nothing suspends from the check to here: nobody comes whose permissions would be lost.
    for entry in queue:
        entry.node.reopen_commit(entry)
    change.commit(checked=True)


def _check_permissions(change: GraphTransaction, queue: list[Reopen]) -> None:
    try:
        change.check()
    except ConfigError as error:
        for entry in queue:
            if entry.read_only and error.errno == errno.EACCES:
                text = (
                    f"Read-only block node '{entry.node.node_name}' cannot support read-write users"
                )
                raise ConfigError(str(error), error.errno, qemu_text=text) from None
        raise


async def _clean_up(graph: BlockGraph, queue: Iterable[Reopen], left: Iterable[BlockNode]) -> None:
    """What has to be done when all is decided."""
    for entry in queue:
        await entry.node.reopen_done(entry)
    for entry in queue:
        await entry.node.refresh_length()
    for node in left:
        await graph.collect(node)
    for entry in queue:
        entry.node.compute_limits()


async def _flush(node: BlockNode) -> None:
    """Nothing that the old options promised may be left to the new ones (row B34.3)."""
    try:
        await pipeline.flush(node)
    except BlockError as error:
        raise ConfigError(
            f"Error flushing node '{node.node_name}': {error.strerror}", error.errno or errno.EIO
        ) from None


def _put_in_place(change: GraphTransaction, entry: Reopen) -> None:
    node = entry.node
    common, options = node.common, node.options
    for edge in _moved(entry):
        change.move(edge, entry.children[edge.name])
    for edge in node.children.values():
        if edge.node.read_only and entry.common.auto_read_only and not edge.role & Role.COW:
            entry.read_only = True
    change.assign(node, "given", entry.given)
    change.assign(node, "read_only", entry.read_only)
    change.step(lambda: node.set_modes(entry.common), lambda: node.set_modes(common))
    change.step(lambda: node.set_options(entry.options), lambda: node.set_options(options))
    change.refresh(node)
