"""An image that gives up all it has, at once: new tables where those of a new image are, and a file of that length.

Theory of operation: the header says first that counts are wrong ("dirty"), as it does for lazy reference counts. Then
the L1 table loses its entries, so that the image shows what it is backed by; all after that are tables, over
which a crash may run: whoever opens the image then counts anew (`repair.py`). Each step is on the disk before the
next. Costs the same however large the image was, and needs no table to be read.

Knows nothing about who uses the image meanwhile: nobody.
"""

from __future__ import annotations

import contextlib
from array import array

from vhostblk.block.drivers.qcow2.extensions import ExtensionType
from vhostblk.block.drivers.qcow2.header import Header
from vhostblk.block.drivers.qcow2.metadata import Metadata
from vhostblk.block.drivers.qcow2.tables import Codec
from vhostblk.block.edge import Edge
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError

# They name clusters of their own.
_HAVE_CLUSTERS = (ExtensionType.ENCRYPTION, ExtensionType.BITMAPS)


def can_be_emptied(header: Header) -> bool:
    """Whether nothing but guest data and their tables is in it, and one block counts what is left."""
    per_block = header.cluster_size * 8 >> header.refcount_order
    return (
        header.version >= 3
        and not header.snapshots
        and not header.has_data_file
        and not any(one.type in _HAVE_CLUSTERS for one in header.extensions)
        and 3 + _l1_clusters(header) <= per_block
    )


async def empty(file: Edge, metadata: Metadata) -> None:
    """Empty an image that `can_be_emptied`, which keeps no bitmaps; its tables have to be read anew when this returns.

    Raises:
        BlockError: the child's errno. The image is as it was, or dirty: then nobody may use it before it was repaired.
        ImageError: counts are wrong.
    """
    await metadata.finish()
    header, tell = metadata.header, metadata.debug_event
    size, l1_clusters = header.cluster_size, _l1_clusters(header)
    await metadata.mark_dirty()
    await tell("l1_update")
    await file.pwrite_zeroes(header.l1_offset, l1_clusters * size)
    await file.flush()
    await tell("empty_image_prepare")
    await file.pwrite_zeroes(size, (2 + l1_clusters) * size)
    await file.flush()
    await tell("l1_update")
    await tell("reftable_update")
    await metadata.write_header(
        l1_offset=3 * size, refcount_table_offset=size, refcount_table_clusters=1
    )
    await file.flush()
    await tell("refblock_alloc")
    await file.pwritev(size, IoVec.of((2 * size).to_bytes(8)))
    codec = Codec(header.refcount_order)
    counts = codec.decode(bytes(size))
    used = 3 + l1_clusters
    counts[:used] = array(counts.typecode, [1] * used)
    await file.pwritev(2 * size, IoVec.of(codec.encode(counts)))
    await file.flush()
    await metadata.mark_clean()
    with contextlib.suppress(BlockError):  # it is only longer than it has to be
        await file.truncate(used * size)


def _l1_clusters(header: Header) -> int:
    return -(-header.l1_entries * 8 // header.cluster_size)
