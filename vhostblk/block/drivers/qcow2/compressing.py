"""Compressed writes (block layer row B16.11): whole clusters, each compressed for itself, several at a time.

Theory of operation: what is written is copied first, because a guest may change its memory meanwhile. Threads compress,
some neighbours each, ahead of what is written; the results are written in the order of the disk, each behind the one
before, into the same cluster of the file if there is room. A cluster that does not get smaller is written plainly. The
last cluster of a disk may be shorter than the others: zeroes are behind it.

Context: the control loop. Knows nothing about where clusters are: `clusters.py`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from itertools import groupby

from vhostblk.block.drivers.qcow2.clusters import Clusters
from vhostblk.block.drivers.qcow2.compressed import ClusterCodec
from vhostblk.block.iov import IoVec

# Bytes that one thread compresses before it comes back; at least a cluster.
_AT_ONCE = 128 << 10
# Such pieces of one request that are compressed at the same time, or wait to be written.
_AHEAD = 8


def _compress(codec: ClusterCodec, data: bytes, size: int) -> list[bytes | None]:
    """Each cluster of the data; None: it does not get smaller. In a thread."""
    found: list[bytes | None] = []
    for at in range(0, len(data), size):
        compressed = codec.compress(data[at : at + size].ljust(size, b"\0"))
        found.append(compressed if len(compressed) < size else None)
    return found


class CompressedWrites:
    """Compresses, and has it written."""

    def __init__(self, clusters: Clusters, codec: ClusterCodec, cluster_size: int) -> None:
        self._clusters = clusters
        self._codec = codec
        self._size = cluster_size

    async def write(self, offset: int, iov: IoVec) -> None:
        """Write whole clusters, except for the last one of the disk.

        Raises:
            BlockError: as `Clusters.write`; those before may have been written.
            ImageError: an entry is wrong.
        """
        loop = asyncio.get_running_loop()
        pieces = self._pieces(offset, iov)
        ahead: deque[tuple[int, bytes, asyncio.Future[list[bytes | None]]]] = deque()
        try:
            while True:
                while len(ahead) < _AHEAD and (piece := next(pieces, None)) is not None:
                    at, data = piece
                    work = loop.run_in_executor(None, _compress, self._codec, data, self._size)
                    ahead.append((at, data, work))
                if not ahead:
                    return
                at, data, compressed = ahead.popleft()
                await self._write_piece(at, data, await compressed)
        finally:
            for _, _, compressed in ahead:
                compressed.cancel()

    def _pieces(self, offset: int, iov: IoVec) -> Iterator[tuple[int, bytes]]:
        step = max(_AT_ONCE // self._size, 1) * self._size
        for done in range(0, iov.length, step):
            piece = iov.slice(done, min(step, iov.length - done))
            yield offset + done, piece.tobytes()

    async def _write_piece(self, offset: int, data: bytes, clusters: list[bytes | None]) -> None:
        """In order; those next to each other that are of the same kind together."""
        start = 0
        for is_plain, group in groupby(clusters, lambda one: one is None):
            some = list(group)
            end = start + len(some) * self._size
            if is_plain:
                await self._clusters.write(offset + start, IoVec.of(data[start:end]))
            else:
                smaller = [one for one in some if one is not None]
                await self._clusters.write_compressed(offset + start, smaller)
            start = end
