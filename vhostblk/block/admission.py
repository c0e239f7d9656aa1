"""Before a request runs: whether it may, and who must be out of its way.

Block layer rows B14.1, B14.6 to B14.9, B16.6 and B24.1. Knows nothing about what the request does then.
"""

from __future__ import annotations

import errno
from typing import Protocol

from vhostblk.block.limits import MAX_LENGTH
from vhostblk.block.node import BlockNode, Req
from vhostblk.block.tracking import TrackedRequest
from vhostblk.errors import BlockError

_NO_WAIT = int(Req.NO_WAIT)


class User(Protocol):
    """Who uses a node, and holds permissions for that."""

    def check_read(self, offset: int, length: int) -> None:
        """BlockError if it must not read there."""

    def check_write(self, offset: int, length: int) -> None:
        """BlockError if it must not write there."""


def check_range(node: BlockNode, offset: int, length: int, largest: int = MAX_LENGTH) -> None:
    """Refuse what no request may be (row B14.1). The end of the node is not looked at: users check that.

    Raises:
        BlockError: EIO.
    """
    if length > largest:
        raise BlockError(errno.EIO, f"{node.node_name}: request of {length} bytes is too large")
    if offset < 0 or length < 0 or offset > MAX_LENGTH - length:
        raise BlockError(errno.EIO, f"{node.node_name}: no such range: {length} bytes at {offset}")


def check_writable(node: BlockNode) -> None:
    """Refuse to change a node that is read-only, or whose image is somebody else's for now.

    Raises:
        BlockError: EPERM.
    """
    if node.read_only:
        raise BlockError(errno.EPERM, f"{node.node_name}: node is read-only")  # row C2
    if node.inactive:
        raise BlockError(errno.EPERM, f"{node.node_name}: node is inactive")  # row B40.1


async def serialise(
    node: BlockNode, request: TrackedRequest, flags: int, alignment: int = 0
) -> None:
    """Make the request's widened range its own, towards the engine as towards other requests."""
    tracker = node.tracker
    tracker.mark_serialising(request, alignment or node.limits.request_alignment)
    if flags & _NO_WAIT and tracker.blocker(request):
        raise BlockError(errno.EBUSY, f"{node.node_name}: another request is in the way")
    # Marked before revoked: from here on nobody is given a new extent, and whoever comes waits.
    await node.revoke(request.start, request.end - request.start)
    await tracker.wait(request)


async def run_before_write(node: BlockNode, request: TrackedRequest) -> None:
    """Row B24.1: whoever wants to see writes and discards before they happen; BlockError vetoes."""
    for hook in tuple(node.before_write):
        await hook(request)
