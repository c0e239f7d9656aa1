"""Write threshold: one event when a node is written behind a mark (block layer row B24.3).

Meant for the protocol node under an image that grows, so that whoever provides its storage can provide more in time.
"""

from __future__ import annotations

from collections.abc import Callable

from vhostblk.block.node import BlockNode
from vhostblk.block.tracking import RequestType, TrackedRequest


class WriteThreshold:
    """The mark of one node.

    Args:
        notify: called once with (bytes by which a write ends behind the mark, the mark).

    Context: the control loop.
    """

    def __init__(self, node: BlockNode, notify: Callable[[int, int], None]) -> None:
        self.node = node
        self.offset = 0
        """The mark in bytes; 0: off."""
        self._notify = notify

    async def set(self, offset: int) -> None:
        """Move the mark; 0 takes it away."""
        armed = bool(self.offset)
        self.offset = self.node.write_threshold = offset
        if offset and not armed:
            await self.node.add_before_write(self._check)
        elif armed and not offset:
            self.node.remove_before_write(self._check)

    async def _check(self, request: TrackedRequest) -> None:
        end = request.offset + request.length
        # Another hook may have kept this request waiting while the mark was passed, or taken away.
        if self.offset and request.kind is RequestType.WRITE and end > self.offset:
            offset, self.offset = self.offset, 0
            self.node.write_threshold = 0
            self.node.remove_before_write(self._check)
            self._notify(end - offset, offset)
