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
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.errors import BlockError, ConfigError

# Windows are of 4 KiB: whoever reads the cluster has no larger one.
_RAW_DEFLATE = -12
_MOST_MEMORY = 9
# A frame names the memory that it needs; RFC 8878 recommends to support this much. Clusters are of 2 MiB at most.
_MAX_WINDOW = 8 << 20


@lean_dataclass(frozen=True, slots=True)
class ClusterCodec:
    """One type of compression.

    Attributes:
        compress: a cluster; gives what may be as long as that, or longer.
        decompress: data, and the size of a cluster; raises BlockError (EIO) if they do not give one.
    """

    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes, int], bytes]


def codec(compression: int) -> ClusterCodec:
    """How clusters of an image are compressed.

    Raises:
        ConfigError: its library is not installed.
    """
    if compression == Compression.ZLIB:
        return ClusterCodec(_deflate, _inflate)
    try:
        import zstandard
    except ImportError:
        raise ConfigError(
            "This image has clusters compressed with zstd: the Python package 'zstandard' is needed "
            "(pip install vhostblk[qcow2])"
        ) from None
    zstd = _Zstd(zstandard)
    return ClusterCodec(zstd.compress, zstd.decompress)


def _deflate(cluster: bytes) -> bytes:
    compressor = zlib.compressobj(
        zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, _RAW_DEFLATE, _MOST_MEMORY
    )
    return compressor.compress(cluster) + compressor.flush()


def _inflate(data: bytes, cluster_size: int) -> bytes:
    try:
        cluster = zlib.decompressobj(_RAW_DEFLATE).decompress(data, cluster_size)
    except zlib.error:
        cluster = b""
    return _whole(cluster, cluster_size)


class _Zstd:
    """Frames one after the other, until the cluster is full; we write one."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def compress(self, cluster: bytes) -> bytes:
        # Its objects are of one thread each.
        data: bytes = self._library.ZstdCompressor().compress(cluster)
        return data

    def decompress(self, data: bytes, cluster_size: int) -> bytes:
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
