"""Who forbids which operations on a node, and why (block layer row B11).

A job or an overlay blocks operations with a reason; the last reason is what users are told. A frozen edge is one that
nobody may move or remove (row B11.5).

Knows nothing about what the operations do.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vhostblk.block.roles import chain_child
from vhostblk.errors import ConfigError

if TYPE_CHECKING:
    from vhostblk.block.edge import Edge
    from vhostblk.block.node import BlockNode


class OpType(enum.IntEnum):
    """What can be blocked (row B02); the numbers are the order in QEMU's documentation."""

    BACKUP_SOURCE = 0
    BACKUP_TARGET = 1
    CHANGE = 2
    COMMIT_SOURCE = 3
    COMMIT_TARGET = 4
    DATAPLANE = 5
    DRIVE_DEL = 6
    EJECT = 7
    EXTERNAL_SNAPSHOT = 8
    INTERNAL_SNAPSHOT = 9
    INTERNAL_SNAPSHOT_DELETE = 10
    MIRROR_SOURCE = 11
    MIRROR_TARGET = 12
    RESIZE = 13
    STREAM = 14
    REPLACE = 15


@dataclass(frozen=True, eq=False, slots=True)
class Reason:
    """Why something is blocked; two reasons are the same only if they are one object."""

    text: str


class OpBlockers:
    """What is blocked on one node.

    Context: the control loop.
    """

    def __init__(self) -> None:
        self._reasons: dict[OpType, list[Reason]] = {}

    def __bool__(self) -> bool:
        return bool(self._reasons)

    def block(self, reason: Reason, operations: Iterable[OpType] = OpType) -> None:
        """Forbid the operations; all of them by default."""
        for operation in operations:
            self._reasons.setdefault(operation, []).append(reason)

    def unblock(self, reason: Reason, operations: Iterable[OpType] = OpType) -> None:
        """Forget this reason; others stay."""
        for operation in operations:
            left = [other for other in self._reasons.get(operation, ()) if other is not reason]
            if left:
                self._reasons[operation] = left
            else:
                self._reasons.pop(operation, None)

    def reason(self, operation: OpType) -> Reason | None:
        """The latest reason not to, or None."""
        reasons = self._reasons.get(operation)
        return reasons[-1] if reasons else None


def check_op(node: BlockNode, operation: OpType) -> None:
    """Refuse an operation that somebody blocks.

    Raises:
        ConfigError: EBUSY; gives the reason.
    """
    reason = node.op_blockers.reason(operation)
    if reason is not None:
        raise ConfigError(f"Node '{node.node_name}' is busy: {reason.text}", errno.EBUSY)


def backing_chain(node: BlockNode, base: BlockNode | None) -> list[Edge]:
    """The edges from `node` down to `base`, or to the end.

    Raises:
        ConfigError: `base` is not below `node`.
    """
    edges = []
    while node is not base:
        edge = chain_child(node)
        if edge is None:
            if base is None:
                break
            raise ConfigError(f"Node '{base.node_name}' is not in the backing chain")
        edges.append(edge)
        node = edge.node
    return edges


def check_frozen(edge: Edge) -> None:
    """Refuse to change a frozen edge.

    Raises:
        ConfigError: EPERM.
    """
    if edge.frozen:
        raise ConfigError(
            f"Cannot change frozen '{edge.name}' link: {edge.describe()} uses "
            f"'{edge.node.node_name}'",
            errno.EPERM,
        )


def freeze_backing_chain(node: BlockNode, base: BlockNode | None) -> None:
    """Make every edge from `node` down to `base` stay as it is, until `unfreeze_backing_chain`.

    Raises:
        ConfigError: EPERM; an edge is frozen already, and nothing has changed.
    """
    edges = backing_chain(node, base)
    for edge in edges:
        check_frozen(edge)
    for edge in edges:
        edge.frozen = True


def unfreeze_backing_chain(node: BlockNode, base: BlockNode | None) -> None:
    """Undo `freeze_backing_chain` with the same nodes."""
    for edge in backing_chain(node, base):
        assert edge.frozen
        edge.frozen = False
