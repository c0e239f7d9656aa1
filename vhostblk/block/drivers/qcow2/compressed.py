"""Compressed clusters: raw deflate, or zstd (qcow2 specification, "Compressed Clusters Descriptor").

Decompression stops at the end of the cluster, whatever else the data says: an image cannot make us use memory. Knows
nothing about files; runs in any thread.
"""

from __future__ import annotations

import errno
import zlib
from collections.abc import Callable
from typing import Any

from vhostblk.block.drivers.qcow2.header import Compression
from vhostblk.errors import BlockError, ConfigError

Decompress = Callable[[bytes, int], bytes]

# Windows are of 4 KiB.
_RAW_DEFLATE = -12
# A frame names the memory that it needs; RFC 8878 recommends to support this much. Clusters are of 2 MiB at most.
_MAX_WINDOW = 8 << 20


def decompressor(compression: int) -> Decompress:
    """The function `(data, cluster_size) -> cluster` for a type of compression.

    Raises:
        ConfigError: its library is not installed.
    """
    if compression == Compression.ZLIB:
        return _inflate
    try:
        import zstandard
    except ImportError:
        raise ConfigError(
            "This image has clusters compressed with zstd: the Python package 'zstandard' is needed "
            "(pip install vhostblk[qcow2])"
        ) from None
    return _Zstd(zstandard)


def _inflate(data: bytes, cluster_size: int) -> bytes:
    try:
        cluster = zlib.decompressobj(_RAW_DEFLATE).decompress(data, cluster_size)
    except zlib.error:
        cluster = b""
    return _whole(cluster, cluster_size)


class _Zstd:
    """Frames one after the other, until the cluster is full."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __call__(self, data: bytes, cluster_size: int) -> bytes:
        library = self._library
        cluster = b""
        try:
            decompressor = library.ZstdDecompressor(max_window_size=_MAX_WINDOW)
            with decompressor.stream_reader(data, read_across_frames=True) as reader:
                while len(cluster) < cluster_size:
                    more = reader.read(cluster_size - len(cluster))
                    if not more:
                        break
                    cluster += more
        except library.ZstdError:
            cluster = b""
        return _whole(cluster, cluster_size)


def _whole(cluster: bytes, cluster_size: int) -> bytes:
    if len(cluster) != cluster_size:
        raise BlockError(errno.EIO, "a compressed cluster cannot be decompressed")
    return cluster
