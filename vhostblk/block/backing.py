"""Changing what images are backed by: the link that is live, and what the image says (rows B32.1, B32.2, B32.6, B32.7).

The two are apart: `set_backing` changes what is read now, under requests; `change_backing_file` what the next one who
opens the image finds. `drop_intermediate` does both, for every overlay of the layers that go: what images say first, so
that a crash in between leaves chains that open, with the same bytes in them.

Knows nothing about which bytes those are: whoever drops a layer has seen to it that nobody misses it.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vhostblk.block import opening
from vhostblk.block.chain import contains, full_backing_name, layers, overlays_of, skip_filters
from vhostblk.block.edge import Edge
from vhostblk.block.filename import is_absolute, is_json, protocol_prefix
from vhostblk.block.image_driver import BackingName
from vhostblk.block.introspection import directory, filename, is_overridden
from vhostblk.block.node import BlockNode
from vhostblk.block.op_blockers import backing_chain, check_frozen
from vhostblk.block.permissions import Perm
from vhostblk.block.reopen import reopen
from vhostblk.block.roles import Role, cow_child
from vhostblk.block.transaction import GraphTransaction
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.graph import BlockGraph

log = logging.getLogger(__name__)


# ---------------------------------------------------------------------- the live link


async def open_backing(
    graph: BlockGraph,
    node: BlockNode,
    name: str,
    driver: str,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> BlockNode:
    """Open the image that `node` would call `name`, read-only, as what it could be backed by.

    Args:
        driver: empty: its content says which; whoever records that has to know better.
        more: further options.

    Returns:
        a node that is held: `BlockGraph.release` it when it has a parent, or is of no use.

    Raises:
        ConfigError: it cannot be opened.
    """
    async with graph.changing():
        opened = await opening.open_named_by(graph, node, name, driver, more)
        graph.hold(opened)
        return opened


async def set_backing(graph: BlockGraph, node: BlockNode, backing: BlockNode | None) -> None:
    """Make `node` read from `backing` what it does not have; None: zeroes (row B32.2). The image is not changed.

    What it was backed by is closed if nobody else needs it. Requests wait meanwhile.

    Raises:
        ConfigError: the format has no backing files; EPERM: the link is frozen; or the outcome is not allowed.
    """
    check_supports_backing(node)
    async with graph.changing(node):
        edge = cow_child(node)
        old = edge.node if edge is not None else None
        if old is backing:
            return
        with GraphTransaction() as change:
            if edge is None:
                assert backing is not None
                edge = Edge(node, backing, "backing", Role.COW, Perm.NONE, Perm.ALL)
                change.attach(edge)
            elif backing is None:
                change.detach(edge)
            else:
                change.move(edge, backing)
            change.refresh(node)
        node.child_changed(edge)
        if old is not None:
            await graph.collect(old)


def check_supports_backing(node: BlockNode) -> None:
    """Refuse a driver that has no backing files.

    Raises:
        ConfigError: EINVAL.
    """
    if "backing" not in node.child_keys:
        raise ConfigError(
            f"Driver '{node.driver_name}' of node '{node.node_name}' does not support backing files"
        )


# ---------------------------------------------------------------------- what images say


async def change_backing_file(
    graph: BlockGraph,
    node: BlockNode,
    name: str,
    driver: str = "",
    *,
    needs_driver: bool = True,
) -> None:
    """Have an image say that it is backed by `name`, durably; what is read now stays the same (row B32.6).

    Args:
        name: as it is to be in the image; empty: nothing any more.
        driver: the format of that.
        needs_driver: refuse to leave the format to whoever guesses next, as QEMU does.

    Raises:
        ConfigError: EINVAL: a format without a name, or a name without a format; EACCES: a read-only image cannot be
            opened for writing.
        BlockError: ENOTSUP: the driver has no place for it; ENOSPC: the image has none; else the driver's errno.
    """
    if needs_driver or not name:
        check_says_format(name, driver)
    async with writable(graph, [skip_filters(node)]), graph.changing():
        await record(skip_filters(node), BackingName(name, driver))


def check_says_format(name: str, driver: str) -> None:
    """Refuse a backing file whose format whoever opens it next would have to guess.

    Raises:
        ConfigError: a format without a name, or a name without a format.
    """
    if driver and not name:
        raise ConfigError("A backing format needs a backing file")
    if name and not driver:
        raise ConfigError(
            f"Could not change the backing file to '{name}': backing format must be specified"
        )


def not_recorded(name: str, number: int) -> str:
    """What qemu-img says when an image cannot say what it is backed by.

    Args:
        number: the errno.
    """
    no_room = number == errno.ENOSPC
    why = "No space left in the file header" if no_room else os.strerror(number)
    return f"Could not change the backing file to '{name}': {why}"


async def record(node: BlockNode, backing: BackingName) -> None:
    """The same for a node that may be written, by whoever is changing the graph.

    Raises:
        BlockError: as `change_backing_file`.
    """
    try:
        await node.driver_change_backing(backing.filename, backing.driver)
    except BlockError as error:
        number = error.errno or errno.EIO
        raise BlockError(number, not_recorded(backing.filename, number)) from error
    node.implied.pop("backing", None)
    if not backing.filename:
        return
    try:
        node.implied["backing"] = full_backing_name(node)
    except ConfigError:
        node.implied["backing"] = backing.filename


def name_for(overlay: BlockNode, backing: BlockNode, above: BlockNode | None = None) -> BackingName:
    """What an image can say to be backed by this node: seen from where the image is, not from here.

    Args:
        above: the layer that was directly above it; its relative name is kept, if it is in the same folder.
    """
    shown = skip_filters(backing)
    driver, name = shown.driver_name, filename(shown)
    if is_json(name) or protocol_prefix(name) is not None:
        return BackingName(name, driver)
    try:
        here = directory(overlay)
        if above is not None and not is_overridden(above, "backing") and directory(above) == here:
            said = above.recorded_backing().filename
            if protocol_prefix(said) is None and not is_absolute(said):
                return BackingName(said, driver)
    except ConfigError:
        here = None
    if not is_absolute(name):
        folder, slash, last = name.rpartition("/")
        name = last if folder + slash == here else os.path.abspath(name)
    return BackingName(name, driver)


@asynccontextmanager
async def writable(graph: BlockGraph, nodes: list[BlockNode]) -> AsyncIterator[None]:
    """Read-only nodes may be written inside `async with`; afterwards they are as before, unless that fails.

    Raises:
        ConfigError: EACCES; one of them cannot be opened for writing, or somebody else uses it.
    """
    async with AsyncExitStack() as stack:
        for node in nodes:
            if not node.read_only:
                continue
            given = dict(node.given)
            try:
                await reopen(graph, {node: {"read-only": False, "auto-read-only": False}})
            except ConfigError as error:
                raise ConfigError(str(error), errno.EACCES, qemu_text=error.qemu_text) from None
            stack.push_async_callback(_back_to_read_only, graph, node, given)
        yield


async def _back_to_read_only(graph: BlockGraph, node: BlockNode, given: dict[str, object]) -> None:
    if graph.nodes.get(node.node_name) is not node:
        return
    try:
        await reopen(graph, {node: {"read-only": True}})
        node.given = given
    except ConfigError as error:  # row B32.8
        log.warning("node '%s' stays open for writing: %s", node.node_name, error)


# ---------------------------------------------------------------------- dropping layers


async def drop_intermediate(
    graph: BlockGraph, top: BlockNode, base: BlockNode, name: str | None = None
) -> None:
    """Take the layers from `top` down to above `base` out of all chains (row B32.7).

    Whatever was backed by `top` is backed by `base`, and its image says so. The layers are closed if nobody else needs
    them; their files stay. The caller has seen to it that nothing is missed.

    Args:
        name: what the images are to call `base`; absent: a name that is right where each of them is.

    Raises:
        ConfigError: EIO: `base` is not below `top`, or nothing is above `top`; EPERM: a link is frozen; EACCES: an
            overlay cannot be written; or the outcome is not allowed. Nothing has changed.
        BlockError: an image cannot say what it is backed by; those that could say the old name again.
    """
    if skip_filters(top) is skip_filters(base):
        return
    if not contains(top, base):
        raise ConfigError(
            f"'{base.node_name}' is not in the backing chain of '{top.node_name}'", errno.EIO
        )
    async with writable(graph, _overlays_of(top)):
        overlays = _overlays_of(top)
        async with graph.changing(*overlays, top):
            chain = backing_chain(top, base)  # still there
            for edge in (*top.parents, *chain):
                check_frozen(edge)
            above = [layer for layer in layers(top) if contains(layer, base)]
            lowest = [layer for layer in above if layer is not skip_filters(base)][-1]
            old = [(overlay, overlay.recorded_backing()) for overlay in overlays]
            done: list[tuple[BlockNode, BackingName]] = []
            try:
                for overlay, before in old:
                    new = name_for(overlay, base, lowest)
                    done.append((overlay, before))
                    await record(overlay, replace(new, filename=name) if name else new)
                _relink(top, base)
            except BaseException:
                await _say_again(done)
                raise
            await graph.collect(top)


def _overlays_of(top: BlockNode) -> list[BlockNode]:
    overlays = overlays_of(top)
    if not overlays:
        raise ConfigError(f"Nothing is backed by '{top.node_name}'", errno.EIO)
    return overlays


def _relink(top: BlockNode, base: BlockNode) -> None:
    heir, path = base.inherits_from, set()
    while heir is not None and heir is not top and heir not in path:
        path.add(heir)
        heir = heir.inherits_from
    inherits = (top.inherits_from, top.inherits_as) if heir is top else None
    with GraphTransaction() as change:
        for edge in tuple(top.parents):
            if not edge.stays:
                change.move(edge, base)
                if isinstance(edge.parent, BlockNode):
                    change.refresh(edge.parent)
    if inherits is not None:
        # Who opened `top` has opened `base`, so its modes are still those of a parent.
        base.inherits_from, base.inherits_as = inherits


async def _say_again(done: list[tuple[BlockNode, BackingName]]) -> None:
    for overlay, before in reversed(done):
        if overlay.recorded_backing() == before:
            continue
        try:
            await record(overlay, before)
        except BlockError as error:
            log.error(
                "node '%s': its image says '%s' instead of '%s': %s",
                *(overlay.node_name, overlay.recorded_backing().filename, before.filename, error),
            )
