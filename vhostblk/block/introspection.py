"""What a node is, for those who ask: names that open it again, and the dictionaries of QMP (block layer row B41).

A node's *full options* are all it takes to see the same bytes again: driver, the options that decide about content
(`strong`), and the children's. Its *exact filename* is a name that does the same, if there is one; its *filename* is
that, or `json:` and the full options. Modes (cache, read-only) and node names are no part of either.

The dictionaries have the members that QEMU's QMP reference documents: `BlockStats`, `XDbgBlockGraph`; `BlockDeviceInfo`
and `ImageInfo` are in `node_info.py` and `image_info.py`. Knows nothing about sockets.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from vhostblk.block.filename import format_json
from vhostblk.block.node import BlockNode
from vhostblk.block.permissions import PERM_WORDS, Perm
from vhostblk.block.roles import Role, primary_child
from vhostblk.errors import ConfigError

if TYPE_CHECKING:
    from vhostblk.block.edge import Edge
    from vhostblk.block.graph import BlockGraph


_COUNTED_ELSEWHERE = (
    *(f"{op}_bytes" for op in ("rd", "wr", "unmap")),
    *(f"{op}_merged" for op in ("rd", "wr", "unmap")),
    *(f"{op}_operations" for op in ("rd", "wr", "flush", "unmap")),
    *(f"{op}_total_time_ns" for op in ("rd", "wr", "flush", "unmap")),
    *(f"failed_{op}_operations" for op in ("rd", "wr", "flush", "unmap")),
    *(f"invalid_{op}_operations" for op in ("rd", "wr", "flush", "unmap")),
)

# ---------------------------------------------------------------------- names


def full_options(node: BlockNode) -> dict[str, Any]:
    """All it takes to open the same again, nested as in JSON (row B41.2), less what the image says is below."""
    return _identity(node)[1]


def exact_filename(node: BlockNode) -> str:
    """A plain name that opens the same again, or nothing (row B41.4)."""
    return _identity(node)[0]


def filename(node: BlockNode) -> str:
    """A name that opens the same again."""
    exact, options = _identity(node)
    return exact or format_json(options)


def is_overridden(node: BlockNode, key: str) -> bool:
    """Whether a child is another one than the image says; any is where an image does not say it (row B41.4)."""
    edge = node.children.get(key)
    return node.implied.get(key) != (filename(edge.node) if edge is not None else None)


def _identity(node: BlockNode) -> tuple[str, dict[str, Any]]:
    """The exact filename and the full options; in one go, because each layer needs both of the one below."""
    strong = node.naming_options()
    options: dict[str, Any] = {"driver": node.driver_name, **strong}
    if not node.children and not node.implied:
        return node.exact_filename(), options
    primary = primary_child(node)
    exact = ""
    is_plain = not node.is_filter and not strong
    for name, edge in node.children.items():
        child_exact, child_options = _identity(edge.node)
        if edge is primary:
            # A format by itself is not found out again above another format; a filter says what it is.
            is_seen = node.is_filter or edge.node.is_protocol or edge.node.is_filter
            exact = child_exact if is_seen else ""
        elif node.implied.get(name) == (child_exact or format_json(child_options)):
            if edge.role & Role.COW:
                continue
        else:
            is_plain = False
        options[name] = child_options
    for name in node.implied:
        if name not in node.children:
            is_plain = False
            options[name] = None
    if node.is_filter and exact:
        return node.filename_over(exact), options
    return exact if is_plain else "", options


def directory(node: BlockNode) -> str:
    """Where names are relative to that an image has in it; ends with a slash, or is empty (row B41.5).

    Raises:
        ConfigError: no plain file is behind it.
    """
    edge = primary_child(node)
    if edge is not None:
        return directory(edge.node)
    if not node.has_directory:
        kind = node.driver_name.upper()
        raise ConfigError(f"Cannot generate a base directory for {kind} nodes", errno.ENOTSUP)
    name = exact_filename(node)
    if not node.is_protocol or not name:
        raise ConfigError(
            f"Cannot generate a base directory for node '{node.node_name}'", errno.ENOTSUP
        )
    return name[: name.rfind("/") + 1]


# ---------------------------------------------------------------------- QMP


def block_stats(node: BlockNode) -> dict[str, Any]:
    """A node as `BlockStats`, with what carries its data as `parent`, as `query-blockstats` of nodes returns it.

    Requests are counted where they come from, not at nodes: `docs/statistics.md`. So all is 0 but how far was written
    (row B24.4), by whoever. What only some drivers count (`driver-specific`) is not there.
    """
    counts: dict[str, Any] = dict.fromkeys(_COUNTED_ELSEWHERE, 0)
    answer: dict[str, Any] = {
        "node-name": node.node_name,
        "stats": {
            **counts,
            "wr_highest_offset": node.highest_offset(),
            "account_failed": False,
            "account_invalid": False,
            "timed_stats": [],
        },
    }
    edge = primary_child(node)
    if edge is not None and edge.role & (Role.DATA | Role.FILTERED):
        answer["parent"] = block_stats(edge.node)
    return answer


def block_graph(graph: BlockGraph) -> dict[str, Any]:
    """Nodes, whoever uses them, and all edges with their permissions, as `x-debug-query-block-graph` returns it."""
    ids: dict[object, int] = {}
    nodes: list[dict[str, Any]] = []
    edges: list[dict[str, Any]] = []

    def number(owner: object, name: str, kind: str) -> int:
        if owner not in ids:
            ids[owner] = len(ids) + 1
            nodes.append({"id": ids[owner], "type": kind, "name": name})
        return ids[owner]

    for node in graph.nodes.values():
        number(node, node.node_name, "block-driver")
    for node in graph.nodes.values():
        for edge in node.parents:
            parent = number(edge.parent, edge.parent.describe_use(edge), "block-backend")
            edges.append(_edge(edge, parent, ids[node]))
    return {"nodes": nodes, "edges": edges}


def _edge(edge: Edge, parent: int, child: int) -> dict[str, Any]:
    return {
        "parent": parent,
        "child": child,
        "name": edge.name,
        "perm": _words(edge.perm),
        "shared-perm": _words(edge.shared),
    }


def _words(perm: Perm) -> list[str]:
    return [word for word, bit in PERM_WORDS.items() if perm & bit]
