"""`snapshot-access`: a node as it was at one moment, provided by a filter that keeps old bytes (block layer row B24.2).

To be exported, or copied, while the node itself goes on. A discard gives up what has been copied elsewhere, so that it
need not be kept any longer.
"""

from __future__ import annotations

import errno

from vhostblk.block.driver import OpenContext
from vhostblk.block.edge import Edge
from vhostblk.block.filters.filter import NoOptions
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode
from vhostblk.block.permissions import Perm
from vhostblk.block.roles import Role
from vhostblk.block.snapshot import SnapshotSource
from vhostblk.block.status import BlockStatus
from vhostblk.errors import BlockError, ConfigError


class SnapshotAccessNode(BlockNode):
    """As long as the snapshot, whatever becomes of the disk; writes fail with ENOTSUP."""

    driver_name = "snapshot-access"
    options_type = NoOptions
    child_keys = ("file",)
    _file: Edge

    async def open(self, context: OpenContext) -> None:
        """Open the child.

        Raises:
            ConfigError: it has no snapshot to show.
        """
        self._file = await context.open_child(self, "file", Role.DATA | Role.PRIMARY)
        # Whoever comes between the disk's users and the filter is not between it and us.
        self._file.stays = True
        child = self._file.node
        if not isinstance(child, SnapshotSource):
            raise ConfigError(
                f"Parameter 'file': node '{child.node_name}' ({child.driver_name}) provides no "
                "snapshot; copy-before-write does"
            )
        self.length, self.block_sizes = child.snapshot_length, child.block_sizes

    def child_perm(self, edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """The filter's other users do as they like: that is what it is for."""
        return Perm.NONE, Perm.ALL

    async def refresh_length(self) -> None:
        """It never changes."""

    def can_discard(self) -> bool:
        """What is given up is not copied any more."""
        return True

    def has_zero_init(self) -> bool:
        """It is never new."""
        return False

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        """The old bytes; what is behind their end is zeroes, and not asked for."""
        await self._source().snapshot_preadv(offset, iov)

    async def driver_pdiscard(self, offset: int, length: int) -> None:
        """Give up."""
        await self._source().snapshot_pdiscard(offset, length)

    async def driver_block_status(self, offset: int, length: int, precise: bool) -> BlockStatus:
        """Where the bytes are changes any time, so nobody is told."""
        return await self._source().snapshot_block_status(offset, length)

    def _source(self) -> SnapshotSource:
        """The child, which may have been replaced."""
        child = self._file.node
        if not isinstance(child, SnapshotSource):
            raise BlockError(errno.ENOTSUP, f"{self.node_name}: there is no snapshot any more")
        return child
