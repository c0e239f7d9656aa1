"""What filters have in common: one child, `file`, whose bytes they show, and whatever it can do.

A filter derives from `FilterNode` and states only what it does: what it leaves out passes through. It sees every
request, because it maps nothing (`host_extent`). docs/block-filters.md has an example of one's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vhostblk.block.driver import OpenContext
from vhostblk.block.eager import Request
from vhostblk.block.edge import Edge
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode, Req
from vhostblk.block.roles import Role


@dataclass(frozen=True, slots=True)
class NoOptions:
    """Besides `file`."""


class FilterNode(BlockNode):
    """A layer as long as its child."""

    options_type: ClassVar[type[Any]] = NoOptions
    is_filter = True
    child_key: ClassVar[str] = "file"
    child_keys: ClassVar[tuple[str, ...]] = ("file",)
    # As far as the child does: see `hands_on_to`.
    supported_write_flags = int(Req.FUA | Req.WRITE_UNCHANGED | Req.WRITE_COMPRESSED)
    supported_zero_flags = int(Req.FUA | Req.MAY_UNMAP | Req.WRITE_UNCHANGED | Req.NO_FALLBACK)
    file: Edge

    def _filtered(self) -> Edge:
        return self.file

    def driver_preadv(self, offset: int, length: int, iov: IoVec) -> Request:
        """Passes through."""
        return self.file.preadv(offset, iov)

    def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> Request:
        """Passes through."""
        return self.file.pwritev(offset, iov, flags)

    async def open(self, context: OpenContext) -> None:
        """Open the child."""
        self.file = await context.open_child(self, self.child_key, Role.FILTERED | Role.PRIMARY)
        child = self.file.node
        if child.read_only and self.common.auto_read_only:
            self.read_only = True
        self.length, self.block_sizes = child.length, child.block_sizes
