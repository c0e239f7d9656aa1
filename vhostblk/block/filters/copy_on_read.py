"""`copy-on-read`: what was read from a backing node once is in the layer above it from then on (row B20)."""

from __future__ import annotations

from vhostblk.block.edge import Edge
from vhostblk.block.filters.filter import FilterNode
from vhostblk.block.iov import IoVec
from vhostblk.block.node import Req
from vhostblk.block.permissions import Perm

_COPY_ON_READ = int(Req.COPY_ON_READ)


class CopyOnReadNode(FilterNode):
    """Reads with COPY_ON_READ; the pipeline of the child does the copying. Writes need nothing."""

    driver_name = "copy-on-read"

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        """Read, and copy."""
        await self.file.preadv(offset, iov, _COPY_ON_READ)

    def child_perm(self, edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """What is visible does not change (row C9); a read-only child does not even allow that (row B20.1)."""
        return perm | Perm.WRITE_UNCHANGED, shared | Perm.WRITE_UNCHANGED
