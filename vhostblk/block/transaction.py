"""A change of the graph that is made as a whole or not at all (block layer rows B08 to B10).

Theory of operation: each step changes edges at once, drains included, and notes how to undo that. `commit()` looks at
the outcome: roles, and permissions down to the leaves, file locks included. If all is well it becomes final;
if anything is wrong, every step is undone and nobody has noticed. Nothing here suspends, so nobody sees a graph in
between either.

Whoever changes the graph under running requests drains the nodes around it first (`BlockGraph.changing`): that takes
back all extents.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vhostblk.block.node import BlockNode
from vhostblk.block.op_blockers import OpType, Reason, check_frozen
from vhostblk.block.permissions import Perm, PermissionChange, parents_first
from vhostblk.block.quiesce import join, part
from vhostblk.block.registered_buf import follow
from vhostblk.block.roles import Role, check_children, check_role
from vhostblk.errors import ConfigError

if TYPE_CHECKING:
    from vhostblk.block.edge import Edge

# Row B11.3: a backing file may still be committed into.
_BLOCKED_BY_OVERLAY = tuple(op for op in OpType if op is not OpType.COMMIT_TARGET)


class GraphTransaction:
    """One change. As a context manager it commits at the end, and aborts when an exception passes.

    Context: the control loop; nobody else changes the graph between the first step and the end.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._old_nodes: dict[Edge, BlockNode | None] = {}  # of every edge that was changed
        self._touched: dict[BlockNode, None] = {}
        self._permissions = PermissionChange()

    def __enter__(self) -> GraphTransaction:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()

    # ------------------------------------------------------------------ steps

    def attach(self, edge: Edge) -> None:
        """Link a new edge into both of its ends.

        Raises:
            ConfigError: there would be a cycle; EBUSY: an image below is just being taken back.
        """
        check_role(edge)
        _check_cycle(edge, edge.node)
        _check_settled(edge.node)
        self._old_nodes.setdefault(edge, None)
        if (children := _children(edge)) is not None and children.get(edge.name) is not edge:
            assert edge.name not in children, f"{edge.describe()}: there is one already"
            self._keep_children(children)
            children[edge.name] = edge
        self._link(edge)

    def detach(self, edge: Edge) -> None:
        """Take an edge out of both of its ends.

        Raises:
            ConfigError: it is frozen.
        """
        check_frozen(edge)
        # What was written through extents is this node's, not that of whoever takes its place.
        edge.parent.collect_writes(ranges=True)
        self._old_nodes.setdefault(edge, edge.node)
        if (children := _children(edge)) is not None and children.get(edge.name) is edge:
            self._keep_children(children)
            del children[edge.name]
        self._unlink(edge, edge.node)

    def move(self, edge: Edge, node: BlockNode) -> None:
        """Point an edge at another node.

        Raises:
            ConfigError: it is frozen, or there would be a cycle.
        """
        check_frozen(edge)
        _check_cycle(edge, node)
        edge.parent.collect_writes(ranges=True)
        old = edge.node
        self._old_nodes.setdefault(edge, old)
        self.assign(edge, "node", node)
        # In this order a parent that is drained stays so throughout.
        self._link(edge)
        self._unlink(edge, old)

    def assign(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute that the outcome depends on."""
        old = getattr(target, name)
        setattr(target, name, value)
        self._undo.append(lambda: setattr(target, name, old))

    def step(self, do: Callable[[], None], undo: Callable[[], None]) -> None:
        """Do something else that the outcome depends on."""
        do()
        self._undo.append(undo)

    def ask(self, edge: Edge, perm: Perm, shared: Perm) -> None:
        """Ask for other permissions through a root edge."""
        self.assign(edge, "perm", perm)
        self.assign(edge, "shared", shared)
        self.refresh(edge.node)

    def refresh(self, node: BlockNode) -> None:
        """Compute again what the node needs of its children."""
        self._touched[node] = None

    # ------------------------------------------------------------------ outcome

    def check(self) -> None:
        """Look whether the outcome is legal, and take what it needs; `commit` or `abort` has to follow.

        Raises:
            ConfigError: a permission that is not to be had.
        """
        for edge in self._old_nodes:
            if isinstance(edge.parent, BlockNode):
                check_children(edge.parent)
        self._permissions.check(*self._touched)

    def commit(self, *, checked: bool = False) -> None:
        """Make the change final.

        Args:
            checked: `check` has been called, after the last step.

        Raises:
            ConfigError: as `check`; everything is undone.
        """
        if not checked:
            try:
                self.check()
            except BaseException:
                self.abort()
                raise
        moves = []
        for edge, old in self._old_nodes.items():
            new = edge.node if edge in edge.node.parents else None
            if old is not new:
                _left(edge, old)
                _joined(edge, new)
                moves.append((edge, old, new))
        follow(moves)
        self._permissions.commit()
        for edge, old in self._old_nodes.items():
            if old is not None and edge in edge.node.parents:
                edge.parent.child_changed(edge)

    def abort(self) -> None:
        """Undo every step."""
        self._permissions.abort()
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    # ------------------------------------------------------------------

    def _keep_children(self, children: dict[str, Edge]) -> None:
        before = dict(children)

        def undo() -> None:
            children.clear()
            children.update(before)

        self._undo.append(undo)

    def _link(self, edge: Edge) -> None:
        node = edge.node
        node.parents.append(edge)
        join(edge)

        def undo() -> None:
            node.parents.remove(edge)
            part(edge, node)

        self._undo.append(undo)
        self.refresh(node)

    def _unlink(self, edge: Edge, node: BlockNode) -> None:
        before = list(node.parents)
        node.parents.remove(edge)
        part(edge, node)

        def undo() -> None:
            node.parents[:] = before
            now, edge.node = edge.node, node
            join(edge)
            edge.node = now

        self._undo.append(undo)
        self.refresh(node)


def _check_cycle(edge: Edge, node: BlockNode) -> None:
    if edge.parent in parents_first([node]):
        raise ConfigError(
            f"Making '{node.node_name}' the '{edge.name}' child of {edge.parent!r} would create a cycle"
        )


def _check_settled(node: BlockNode) -> None:
    for below in parents_first([node]):
        if below.being_activated:
            raise ConfigError(f"Node '{below.node_name}' is just being activated", errno.EBUSY)


def _children(edge: Edge) -> dict[str, Edge] | None:
    return edge.parent.children if isinstance(edge.parent, BlockNode) else None


def _joined(edge: Edge, node: BlockNode | None) -> None:
    if node is not None and edge.role & Role.COW:
        if edge.blocker is None:
            edge.blocker = Reason(f"it is used by {edge.describe()}")
        node.op_blockers.block(edge.blocker, _BLOCKED_BY_OVERLAY)


def _left(edge: Edge, node: BlockNode | None) -> None:
    if node is not None:
        if edge.blocker is not None:
            node.op_blockers.unblock(edge.blocker)
        for below in parents_first([node]):
            if below.inherits_from and not _is_above(below.inherits_from, below):
                below.inherits_from = None


def _is_above(ancestor: BlockNode, node: BlockNode) -> bool:
    """Whether there is a way down; looked for upwards, where it is short: most nodes are their parent's heirs."""
    return any(
        edge.parent is ancestor
        or (isinstance(edge.parent, BlockNode) and _is_above(ancestor, edge.parent))
        for edge in node.parents
    )
