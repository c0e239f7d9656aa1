"""What shows a node as it was at one moment, while the node itself goes on (block layer row B24.2).

A filter that keeps old bytes (`copy-before-write`) provides this; `snapshot-access` makes it a node, and with that
something that can be exported and read by jobs.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from vhostblk.block.iov import IoVec
from vhostblk.block.status import BlockStatus


@runtime_checkable
class SnapshotSource(Protocol):
    """A node that provides a snapshot of itself.

    Attributes:
        snapshot_length: bytes, as long as the node was then.

    Context: the control loop.
    """

    snapshot_length: int

    async def snapshot_preadv(self, offset: int, iov: IoVec) -> None:
        """Fill `iov` with the bytes that were at `offset`.

        Raises:
            BlockError: EACCES: the snapshot has been lost, or the range given up; else a driver's errno.
        """

    async def snapshot_block_status(self, offset: int, length: int) -> BlockStatus:
        """DATA or ZERO, for as many bytes; the range is inside the snapshot.

        Raises:
            BlockError: as `snapshot_preadv`.
        """

    async def snapshot_pdiscard(self, offset: int, length: int) -> None:
        """Nobody will read the range again; whole clusters of it are not kept any more.

        Raises:
            BlockError: as `snapshot_preadv`.
        """
