"""What users of a node may do, and what they let others do (block layer row B09).

Every edge says what it uses (`perm`) and what it tolerates from the node's other users (`shared`).
A graph is legal when no user does what another does not share. A change is checked through the
whole subgraph first, including file locks against other processes, and then either made everywhere
or nowhere (row B09.4).

Knows nothing about requests.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from vhostblk.errors import ConfigError

if TYPE_CHECKING:
    from vhostblk.block.edge import Edge
    from vhostblk.block.node import BlockNode


class Perm(enum.IntFlag):
    """Permission bits (row B02). 0x10 is retired: other programs still lock its byte."""

    CONSISTENT_READ = 0x01
    WRITE = 0x02
    WRITE_UNCHANGED = 0x04
    RESIZE = 0x08
    ALL = 0x0F
    NONE = 0


PERM_NAMES: tuple[tuple[Perm, str], ...] = (
    (Perm.CONSISTENT_READ, "consistent read"),
    (Perm.WRITE, "write"),
    (Perm.WRITE_UNCHANGED, "write unchanged"),
    (Perm.RESIZE, "resize"),
)

_CHANGES = Perm.WRITE | Perm.WRITE_UNCHANGED | Perm.RESIZE


# What options and QMP call them.
PERM_WORDS: Mapping[str, Perm] = MappingProxyType(
    {name.replace(" ", "-"): bit for bit, name in PERM_NAMES}
)


def perm_names(perm: Perm) -> str:
    """A readable list, as messages show it (row B09.11)."""
    return ", ".join(name for bit, name in PERM_NAMES if perm & bit)


class PermissionChange:
    """One two-phase change of the permissions at and below some nodes.

    Call `check` with all nodes whose parent edges changed, then `commit()`, or `abort()` after an error.
    """

    def __init__(self) -> None:
        self._nodes: list[tuple[BlockNode, Perm, Perm]] = []
        self._edges: list[tuple[Edge, Perm, Perm]] = []

    def check(self, *nodes: BlockNode) -> None:
        """Validate what the parents of `nodes` now ask for, and take what is needed for it, down to the leaves.

        A node that is reached on several ways is looked at once, when all that is above is known; those below of whom
        nothing else is asked than before are as they were.

        Raises: ConfigError: two users exclude each other, a node is read-only, or another process has the image.
        """
        concerned = set(nodes)
        for node in parents_first(nodes):
            if node not in concerned:
                continue
            # First, because whatever else is wrong, this is what the user wants to know.
            if node.read_only and any(edge.perm & _CHANGES for edge in node.parents):
                raise ConfigError(
                    f"Block node '{node.node_name}' is read-only",
                    errno.EACCES,
                    qemu_text="Block node is read-only",
                )
            perm, shared = cumulative_permissions(node)
            if node.inactive and perm & _CHANGES:
                raise ConfigError(
                    f"Node '{node.node_name}' is inactive: its image may be written elsewhere",
                    errno.EPERM,
                )
            self._nodes.append((node, perm, shared))
            node.check_perm(perm, shared)
            for edge in node.children.values():
                before = edge.perm, edge.shared
                self._edges.append((edge, *before))
                edge.perm, edge.shared = node.child_perm(edge, perm, shared)
                if edge.tolerant:
                    edge.shared = Perm.ALL
                if (edge.perm, edge.shared) != before:
                    concerned.add(edge.node)

    def commit(self) -> None:
        """Make the change final."""
        for node, perm, shared in self._nodes:
            node.set_perm(perm, shared)

    def abort(self) -> None:
        """Go back to how it was."""
        for edge, perm, shared in reversed(self._edges):
            edge.perm, edge.shared = perm, shared
        for node, _, _ in reversed(self._nodes):
            node.abort_perm()


def cumulative_permissions(node: BlockNode) -> tuple[Perm, Perm]:
    """What all parents of a node use, and what all of them share (row B09.3).

    Raises:
        ConfigError: one parent uses what another does not share (row B09.1).
    """
    perm, shared = Perm.NONE, Perm.ALL
    for edge in node.parents:
        for other in node.parents:
            conflict = edge.perm & ~other.shared
            if other is not edge and conflict:
                raise ConfigError(
                    f"{edge.describe()} cannot have permission '{perm_names(conflict)}' on node "
                    f"'{node.node_name}': {other.describe()} does not share it",
                    errno.EPERM,
                )
        perm |= edge.perm
        shared &= edge.shared
    if node.force_share:
        shared = Perm.ALL
    return perm, shared


def of_user(writable: bool, resize: bool) -> Perm:
    """What whoever uses a disk asks for."""
    perm = Perm.CONSISTENT_READ | (Perm.WRITE | Perm.WRITE_UNCHANGED if writable else Perm.NONE)
    return perm | Perm.RESIZE if resize else perm


def parents_first(nodes: Iterable[BlockNode]) -> list[BlockNode]:
    """These nodes and all below, every node behind all of its parents that are among them."""
    found: dict[BlockNode, None] = {}

    def visit(node: BlockNode) -> None:
        if node not in found:
            for edge in node.children.values():
                visit(edge.node)
            found[node] = None

    for node in nodes:
        visit(node)
    return list(found)[::-1]
