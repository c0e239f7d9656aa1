"""What a root stands on while it has no disk (block layer row B38).

A node of length 0 that fails everything with ENOMEDIUM, in no graph's list of nodes: so whoever has a `BlockBackend`
has a node, whatever happens to the disk. Knows nothing about who ejects it.
"""

from __future__ import annotations

import errno
from typing import NoReturn

from vhostblk.block.iov import IoVec
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.node import BlockNode, Req
from vhostblk.block.options import NodeOptions
from vhostblk.errors import BlockError


@lean_dataclass(frozen=True, slots=True)
class _NoOptions:
    """There is nothing to say about it."""


class NoMediumNode(BlockNode):
    """There is no disk."""

    driver_name = "no-medium"
    options_type = _NoOptions
    supported_write_flags = int(Req.WRITE_COMPRESSED)  # row B16.11: what is missing is the medium

    def __init__(self) -> None:
        super().__init__("", NodeOptions(), _NoOptions())

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        """Fails."""
        _fail()

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        """Fails."""
        _fail()

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        """Fails."""
        _fail()

    async def driver_flush_to_os(self) -> None:
        """Fails."""
        _fail()


def _fail() -> NoReturn:
    raise BlockError(errno.ENOMEDIUM)
