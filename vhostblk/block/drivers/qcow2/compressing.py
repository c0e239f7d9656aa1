"""Compressed writes (block layer row B16.11): whole clusters, each compressed for itself, several at a time.

Theory of operation: what is written is copied first, because a guest may change its memory meanwhile. Threads compress,
one cluster each; the result goes behind what was compressed before, into the same cluster of the file if there is room.
A cluster that does not get smaller is written plainly. The last cluster of a disk may be shorter than the others:
zeroes are behind it.

Context: the control loop. Knows nothing about where clusters are: `clusters.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator

from vhostblk.block.drivers.qcow2.clusters import Clusters
from vhostblk.block.drivers.qcow2.compressed import ClusterCodec
from vhostblk.block.iov import IoVec

_Pieces = Generator[tuple[int, bytes], None, None]
# Clusters of one request that are compressed at the same time.
_AT_ONCE = 8


class CompressedWrites:
    """Compresses, and has it written."""

    def __init__(self, clusters: Clusters, codec: ClusterCodec, cluster_size: int) -> None:
        self._clusters = clusters
        self._compress = codec.compress
        self._size = cluster_size

    async def write(self, offset: int, iov: IoVec) -> None:
        """Write whole clusters, except for the last one of the disk.

        Raises:
            BlockError: as `Clusters.write`; others of these clusters may have been written.
            ImageError: an entry is wrong.
        """
        pieces = self._pieces(offset, iov)
        lanes = [self._lane(pieces) for _ in range(min(_AT_ONCE, -(-iov.length // self._size)))]
        for outcome in await asyncio.gather(*lanes, return_exceptions=True):
            if outcome is not None:
                raise outcome

    def _pieces(self, offset: int, iov: IoVec) -> _Pieces:
        for done in range(0, iov.length, self._size):
            piece = iov.slice(done, min(self._size, iov.length - done))
            yield offset + done, piece.tobytes()

    async def _lane(self, pieces: _Pieces) -> None:
        """One cluster after the other, until there are no more, or one has failed."""
        for offset, data in pieces:
            try:
                await self._write_one(offset, data)
            except BaseException:
                pieces.close()  # the other lanes need not begin more
                raise

    async def _write_one(self, offset: int, data: bytes) -> None:
        whole = data.ljust(self._size, b"\0")
        compressed = await asyncio.to_thread(self._compress, whole)
        if len(compressed) < self._size:
            await self._clusters.write_compressed(offset, compressed)
        else:
            await self._clusters.write(offset, IoVec.of(data))
