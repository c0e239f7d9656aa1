"""Filters, one per file; `FILTERS` lists them (block layer rows B20, B24, B30, B43)."""

from __future__ import annotations

from vhostblk.block.filters.blkdebug import BlkdebugNode
from vhostblk.block.filters.copy_before_write import CopyBeforeWriteNode
from vhostblk.block.filters.copy_on_read import CopyOnReadNode
from vhostblk.block.filters.throttle import ThrottleNode
from vhostblk.block.node import BlockNode

FILTERS: tuple[type[BlockNode], ...] = (
    BlkdebugNode,
    CopyBeforeWriteNode,
    CopyOnReadNode,
    ThrottleNode,
)
