"""Compressed writes (block layer row B16.11): whole clusters, each compressed for itself, several at a time.

Theory of operation: what is written is copied first, because a guest may change its memory meanwhile. Threads compress,
one cluster each, ahead of what is written; the results are written in the order of the disk, each behind the one
before, into the same cluster of the file if there is room. A cluster that does not get smaller is written plainly. The
last cluster of a disk may be shorter than the others: zeroes are behind it.

Context: the control loop. Knows nothing about where clusters are: `clusters.py`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator

from vhostblk.block.drivers.qcow2.clusters import Clusters
from vhostblk.block.drivers.qcow2.compressed import ClusterCodec
from vhostblk.block.iov import IoVec

# Clusters of one request that are compressed at the same time, or wait to be written.
_AHEAD = 8


def _begin(function: Callable[[bytes], bytes], data: bytes) -> asyncio.Future[bytes]:
    """Have a thread do it."""
    return asyncio.get_running_loop().run_in_executor(None, function, data)


class CompressedWrites:
    """Compresses, and has it written."""

    def __init__(self, clusters: Clusters, codec: ClusterCodec, cluster_size: int) -> None:
        self._clusters = clusters
        self._compress = codec.compress
        self._size = cluster_size

    async def write(self, offset: int, iov: IoVec) -> None:
        """Write whole clusters, except for the last one of the disk.

        Raises:
            BlockError: as `Clusters.write`; those before have been written.
            ImageError: an entry is wrong.
        """
        pieces = self._pieces(offset, iov)
        ahead: deque[tuple[int, bytes, asyncio.Future[bytes]]] = deque()
        try:
            while True:
                for at, data in pieces:
                    whole = data.ljust(self._size, b"\0")
                    ahead.append((at, data, _begin(self._compress, whole)))
                    if len(ahead) == _AHEAD:
                        break
                if not ahead:
                    return
                at, data, compressed = ahead.popleft()
                await self._write_one(at, data, await compressed)
        finally:
            for _, _, compressed in ahead:
                compressed.cancel()

    def _pieces(self, offset: int, iov: IoVec) -> Iterator[tuple[int, bytes]]:
        for done in range(0, iov.length, self._size):
            piece = iov.slice(done, min(self._size, iov.length - done))
            yield offset + done, piece.tobytes()

    async def _write_one(self, offset: int, data: bytes, compressed: bytes) -> None:
        if len(compressed) < self._size:
            await self._clusters.write_compressed(offset, compressed)
        else:
            await self._clusters.write(offset, IoVec.of(data))
