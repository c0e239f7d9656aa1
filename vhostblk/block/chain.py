"""Backing chains: which layer is above or below which, and what they call each other (rows B32.3 and B32.4).

A chain goes from an image to what it is backed by, and so on; filters in between are no layers of their own. Looks
only; what changes a chain is in `backing.py`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

from vhostblk.block.filename import is_absolute, is_json, protocol_prefix
from vhostblk.block.introspection import directory, filename, is_overridden
from vhostblk.block.node import BlockNode
from vhostblk.block.roles import Role, chain_child, cow_child, filtered_child
from vhostblk.errors import ConfigError


def skip_filters(node: BlockNode) -> BlockNode:
    """The node that filters on top of it show."""
    while node.is_filter and (edge := filtered_child(node)) is not None:
        node = edge.node
    return node


def next_layer(node: BlockNode) -> BlockNode | None:
    """What a layer is backed by; filters, above and below, are skipped."""
    edge = cow_child(skip_filters(node))
    return skip_filters(edge.node) if edge is not None else None


def layers(node: BlockNode) -> Iterator[BlockNode]:
    """The layer that `node` shows, and all below, without filters."""
    layer: BlockNode | None = skip_filters(node)
    while layer is not None:
        yield layer
        layer = next_layer(layer)


def find_overlay(active: BlockNode, node: BlockNode | None) -> BlockNode | None:
    """The layer directly above `node` in the chain of `active`; none if `node` is not below it.

    Args:
        node: None: the bottom layer is what is looked for.
    """
    below = skip_filters(node) if node is not None else None
    for layer in layers(active):
        if next_layer(layer) is below:
            return layer
    return None


def find_base(node: BlockNode) -> BlockNode:
    """The bottom layer of the chain."""
    *_, base = layers(node)
    return base


def contains(top: BlockNode | None, base: BlockNode | None) -> bool:
    """Whether `base` is `top` or below it in its chain; filters count here. False if either is not there."""
    if base is None:
        return False
    while top is not None and top is not base:
        edge = chain_child(top)
        top = edge.node if edge is not None else None
    return top is base


def depth(node: BlockNode) -> int:
    """How many layers are below; filters do not count."""
    return sum(1 for _ in layers(node)) - 1


def overlays_of(node: BlockNode) -> list[BlockNode]:
    """The layers, in any chain, that are directly backed by what `node` shows, if need be through filters."""
    found = []
    for edge in node.parents:
        if isinstance(edge.parent, BlockNode):
            if edge.role & Role.COW:
                found.append(edge.parent)
            elif edge.parent.is_filter and filtered_child(edge.parent) is edge:
                found += overlays_of(edge.parent)
    return found


def full_backing_name(node: BlockNode) -> str:
    """The name in the image of a layer, as seen from here; empty: it names none (row B04.4).

    Raises:
        ConfigError: it is relative, and there is no plain file it could be relative to.
    """
    name = node.recorded_backing().filename
    if not name or protocol_prefix(name) is not None or is_absolute(name):
        return name
    return directory(node) + name


async def find_backing_image(node: BlockNode, name: str) -> BlockNode | None:
    """The layer below `node` that an image in its chain calls `name` (row B32.4).

    Names of files are compared as paths, each relative to the image that says it; never to the working directory.
    """
    for layer in layers(node):
        below = next_layer(layer)
        if below is None:
            break
        recorded = layer.recorded_backing().filename
        if is_overridden(layer, "backing"):
            same = filename(below) == name
        elif protocol_prefix(name) is not None or protocol_prefix(recorded) is not None:
            same = name == recorded
        else:
            same = await asyncio.to_thread(_is_same_path, layer, name, recorded)
        if same:
            return below
    return None


def _is_same_path(layer: BlockNode, *names: str) -> bool:
    """Whether names that this layer might say are the same file; a file that is not there is none."""
    found = set()
    for name in names:
        if is_json(name):
            return False
        try:
            path = name if is_absolute(name) else directory(layer) + name
            found.add(os.path.realpath(path, strict=True))
        except (ConfigError, OSError, ValueError):
            return False
    return len(found) == 1
