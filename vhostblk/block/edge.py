"""An edge of the graph: who uses which node, with which permissions (block layer rows B08 and B09).

All requests of a parent go through its edge, which checks that the parent holds the permission; the
pipeline of the child does the rest.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vhostblk.block import clear, pipeline
from vhostblk.block.eager import Request
from vhostblk.block.flags import Preallocation
from vhostblk.block.permissions import Perm
from vhostblk.block.pipeline import preadv, pwritev
from vhostblk.block.transaction import GraphTransaction
from vhostblk.errors import BlockError

if TYPE_CHECKING:
    from vhostblk.block.iov import IoVec
    from vhostblk.block.node import BlockNode, EdgeParent, Role
    from vhostblk.block.op_blockers import Reason

_WRITES = Perm.WRITE | Perm.WRITE_UNCHANGED


class Edge:
    """A parent's use of a node. Linked into both ends by `attach()`, taken out by `detach()`.

    Context: the control loop.
    """

    __slots__ = (
        "_node", "_perm", "announces", "blocker", "frozen", "lane", "may_write", "name", "parent", "role", "shared",
        "stays", "suspended", "tolerant",
    )  # fmt: skip

    def __init__(
        self, parent: EdgeParent, node: BlockNode, name: str, role: Role, perm: Perm, shared: Perm
    ) -> None:
        self.parent = parent
        self.node = node
        self.name = name
        self.role = role
        self.perm = perm
        self.shared = shared
        self.stays = False  # at its node, when everybody else moves to a new one (row B08.6)
        self.frozen = False  # nobody may move or remove it (row B11.5)
        # What it asked for before its node became inactive (row B40.3).
        self.suspended: tuple[Perm, Perm] | None = None
        # Its parent is being committed: it bears what others do to the node meanwhile.
        self.tolerant = False
        # Whether its node is told of memory that its parent's requests come from (row B13.3).
        self.announces = True
        self.blocker: Reason | None = None  # what it blocks on its node (row B11.3)

    @property
    def node(self) -> BlockNode:
        """What is used."""
        return self._node

    @node.setter
    def node(self, node: BlockNode) -> None:
        self._node = node
        self.lane = node.lane

    @property
    def perm(self) -> Perm:
        """What the parent may do to the node."""
        return self._perm

    @perm.setter
    def perm(self, perm: Perm) -> None:
        self._perm = perm
        self.may_write = bool(perm & _WRITES)

    def describe(self) -> str:
        """Who uses the node and as what, for messages."""
        return self.parent.describe_use(self)

    def attach(self) -> None:
        """Link into both ends, if the permissions allow it.

        Raises:
            ConfigError: they do not; nothing has changed.
        """
        with GraphTransaction() as change:
            change.attach(self)

    def detach(self) -> None:
        """Unlink; the node keeps counting the writes that went past its pipeline.

        Asking for less cannot fail, except where it must be possible to leave anyway.
        """
        with GraphTransaction() as change:
            change.detach(self)

    async def debug_event(self, name: str) -> None:
        """Tell a node that wants to know what its parent is about to do (row B43)."""
        if self.node.has_debug_events:
            await self.node.driver_debug_event(name)

    def preadv(self, offset: int, iov: IoVec, flags: int = 0) -> Request:
        """Read `iov` full; see `pipeline.preadv`."""
        return preadv(self.lane, offset, iov, flags)

    def pwritev(self, offset: int, iov: IoVec, flags: int = 0) -> Request:
        """Write `iov`; see `pipeline.pwritev`."""
        if not self.may_write:
            self.check_write(offset, iov.length)
        return pwritev(self.lane, offset, iov, flags, self)

    def pwrite_zeroes(self, offset: int, length: int, flags: int = 0) -> Request:
        """Make a range read as zeroes; see `clear.pwrite_zeroes`."""
        self.check_write(offset, length)
        return clear.pwrite_zeroes(self.node, offset, length, flags)

    def pdiscard(self, offset: int, length: int) -> Request:
        """Give a range up; see `clear.pdiscard`."""
        self.check_write(offset, 0)
        return clear.pdiscard(self.node, offset, length)

    def flush(self) -> Request:
        """Make completed writes durable; see `pipeline.flush`."""
        return pipeline.flush(self.node)

    def truncate(self, length: int, preallocation: Preallocation = Preallocation.OFF) -> Request:
        """Change the node's length; see `pipeline.truncate`."""
        assert self.perm & Perm.RESIZE or self.node.read_only, f"{self.describe()}: no resize"
        return pipeline.truncate(self.node, length, preallocation)

    def check_read(self, offset: int, length: int) -> None:
        """Whoever has an edge may read."""

    def check_write(self, offset: int, length: int) -> None:
        """Whether the parent may write there.

        Raises:
            BlockError: EIO: behind the end of the node, and the parent may not make it longer.
        """
        # Rows B09.9 and B16.6: whoever breaks this has a bug. A read-only node answers EPERM
        # itself.
        node = self.node
        assert self.may_write or node.read_only, f"{self.describe()}: no write permission"
        if offset + length > node.length and not self.perm & Perm.RESIZE and not node.read_only:
            # No bug: somebody may have cut the file short under us.
            raise BlockError(errno.EIO, f"{self.describe()}: behind the end of the node")
