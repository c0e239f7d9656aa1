"""A file that is bytes in memory, for what reads an image's tables; a header that is sound."""

from __future__ import annotations

from typing import cast

from vhostblk.block.drivers.qcow2.header import Header
from vhostblk.block.edge import Edge
from vhostblk.block.iov import IoVec

HEADER = Header(
    version=3,
    cluster_bits=16,
    size=1 << 30,
    l1_entries=2,
    l1_offset=0x30000,
    refcount_table_offset=0x10000,
    refcount_table_clusters=1,
)


class BytesFile:
    """What an `Edge` to a file does; reads as zeroes behind its end."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)

    async def debug_event(self, name: str) -> None:
        """Nobody wants to know."""

    async def preadv(self, offset: int, iov: IoVec) -> None:
        found = bytes(self.data[offset : offset + iov.length])
        iov.copy_from(memoryview(found.ljust(iov.length, b"\0")))

    @property
    def edge(self) -> Edge:
        return cast(Edge, self)
