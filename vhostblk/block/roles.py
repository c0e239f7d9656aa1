"""What a child is to its parent: which roles go together (block layer rows B08.2 to B08.5), and which permissions they
imply (rows B09.6 and B09.7).

A driver that breaks these rules has a bug; it is told so before the graph changes.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from vhostblk.block.permissions import Perm
from vhostblk.errors import StateError

if TYPE_CHECKING:
    from vhostblk.block.edge import Edge
    from vhostblk.block.node import BlockNode


class Role(enum.IntFlag):
    """What a child is to its parent (row B08.2)."""

    DATA = 1
    METADATA = 2
    FILTERED = 4
    COW = 8
    PRIMARY = 16
    IMAGE = DATA | METADATA | PRIMARY


_CONTENT = Role.DATA | Role.METADATA
_USES = _CONTENT | Role.FILTERED | Role.COW
_FILTERED = Role.FILTERED | Role.PRIMARY


def check_role(edge: Edge) -> None:
    """Refuse a role that excludes itself.

    Raises:
        StateError: names the edge.
    """
    role = edge.role
    legal = (
        role & _USES
        and not (role & Role.FILTERED and role & (_CONTENT | Role.COW))
        and not (role & Role.COW and role & (_CONTENT | Role.PRIMARY))
    )
    if not legal:
        raise StateError(f"{edge.describe()}: impossible role {role!r}")


def check_children(node: BlockNode, *, complete: bool = False) -> None:
    """Refuse roles that exclude each other.

    Args:
        complete: all children are there.

    Raises:
        StateError: names the node.
    """
    edges = tuple(node.children.values())
    for edge in edges:
        check_role(edge)
    for role in (Role.FILTERED, Role.COW, Role.PRIMARY):
        if sum(bool(edge.role & role) for edge in edges) > 1:
            raise StateError(f"{node!r}: more than one child with {role!r}")
    if node.is_filter:
        for edge in edges:
            if edge.role & (_FILTERED | Role.COW) not in (Role(0), _FILTERED):
                raise StateError(f"{edge.describe()}: a filter has no child with {edge.role!r}")
        if complete and not any(edge.role & Role.FILTERED for edge in edges):
            raise StateError(f"{node!r}: a filter needs a filtered child")


def filtered_child(node: BlockNode) -> Edge | None:
    """The child that shows the same bytes at the same offsets; a filter's, or a format's that adds nothing."""
    return _child_with(node, Role.FILTERED)


def cow_child(node: BlockNode) -> Edge | None:
    """The child that has what this node does not: the backing file."""
    return _child_with(node, Role.COW)


def primary_child(node: BlockNode) -> Edge | None:
    """The child where this node's own bytes are."""
    return _child_with(node, Role.PRIMARY)


def chain_child(node: BlockNode) -> Edge | None:
    """The next one down a backing chain: below a filter what it filters, else the backing file."""
    return filtered_child(node) if node.is_filter else cow_child(node)


def _child_with(node: BlockNode, role: Role) -> Edge | None:
    # As numbers: a test of an enumeration's flags takes a microsecond, and this is asked with every answer.
    wanted = int(role)
    for edge in node.children.values():
        if int(edge.role) & wanted:
            return edge
    return None


def default_child_permissions(
    role: Role, perm: Perm, shared: Perm, *, writable: bool, inactive: bool = False
) -> tuple[Perm, Perm]:
    """What a node needs of a child with this role, and shares, when its parents ask for `perm` and `shared`.

    Rows B09.6 and B09.7: what is filtered is passed on; of a backing file one only reads; what holds a format's own
    bytes is nobody else's to write or resize.

    Args:
        writable: the node may write its own metadata whatever its parents do.
        inactive: the image is somebody else's for now (row B40.1), who will write it.
    """
    if role & Role.FILTERED:
        return perm, shared
    foreign = Perm.WRITE | Perm.RESIZE if inactive else Perm.NONE
    if role & Role.COW:
        changes = Perm.WRITE | Perm.RESIZE if shared & Perm.WRITE else Perm.NONE
        return (
            perm & Perm.CONSISTENT_READ,
            Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED | changes | foreign,
        )
    if role & Role.METADATA:
        if writable:
            perm |= Perm.WRITE | Perm.RESIZE
        return perm | Perm.CONSISTENT_READ, shared & ~(Perm.WRITE | Perm.RESIZE) | foreign
    if perm & Perm.WRITE:
        perm |= Perm.RESIZE  # data is put behind the end
    return perm, shared & ~Perm.RESIZE | foreign
