"""Memory that requests will come from, announced down the graph ahead of use (block layer row B13.3).

Theory of operation: a root announces an address range to its node, and every node to its children. A node that is
reached on several ways is told of a range once and remembers how often. When edges move, whoever is at their new end is
told what the parent knows, then whoever was at the old end is told to forget it: a node that stays below hears nothing.

Knows nothing about what drivers do with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vhostblk.block.edge import Edge
    from vhostblk.block.node import BlockNode


class RegisteredBuffers:
    """What one node or root has been told of.

    Attributes:
        sizes: address in this process to bytes.
    """

    __slots__ = ("_times", "sizes")

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self._times: dict[int, int] = {}

    def add(self, host: int, size: int) -> bool:
        """Whether it is new."""
        times = self._times.get(host, 0)
        self._times[host] = times + 1
        self.sizes[host] = size
        return not times

    def remove(self, host: int) -> bool:
        """Whether nobody above has it any more."""
        self._times[host] -= 1
        if self._times[host]:
            return False
        del self._times[host], self.sizes[host]
        return True


def register(node: BlockNode, host: int, size: int) -> None:
    """Tell a node, and all below."""
    if node.buffers.add(host, size):
        node.driver_register_buf(host, size)
        for edge in node.children.values():
            register(edge.node, host, size)


def unregister(node: BlockNode, host: int) -> None:
    """Undo one `register`."""
    if node.buffers.remove(host):
        for edge in node.children.values():
            unregister(edge.node, host)
        node.driver_unregister_buf(host)


def follow(moves: Sequence[tuple[Edge, BlockNode | None, BlockNode | None]]) -> None:
    """Edges have moved.

    Args:
        moves: edge, where it led and where it leads; None: nowhere.
    """
    moves = [move for move in moves if move[0].announces]
    # What parents had before: those among them that are told now pass it on by themselves.
    known = [dict(edge.parent.buffers.sizes) for edge, _, _ in moves]
    for (_, _, new), sizes in zip(moves, known, strict=True):
        if new is not None:
            for host, size in sizes.items():
                register(new, host, size)
    for (_, old, _), sizes in zip(moves, known, strict=True):
        if old is not None:
            for host in sizes:
                unregister(old, host)
