"""Where the tables of an image are, but for L2 tables, as the image says when it is opened.

Knows nothing about what becomes of them later: `overlaps.py` is told by whoever changes that.
"""

from __future__ import annotations

from vhostblk.block.drivers.qcow2.bitmaps import add_bitmap_places
from vhostblk.block.drivers.qcow2.header import Header
from vhostblk.block.drivers.qcow2.overlaps import TablePlaces
from vhostblk.block.drivers.qcow2.refcount_table import may_be_block
from vhostblk.block.drivers.qcow2.snapshots import load_snapshots
from vhostblk.block.drivers.qcow2.tables import Table
from vhostblk.block.edge import Edge
from vhostblk.errors import ImageError


async def load_places(file: Edge, header: Header, table: Table) -> TablePlaces:
    """All of them.

    Args:
        table: of reference counts.

    Raises:
        BlockError: the child's errno.
        ImageError: two are at the same place.
    """
    places = TablePlaces(header.cluster_bits)
    places.add_alone("Header", 0)
    places.add_alone("Active L1 table", header.l1_offset, header.l1_entries * 8)
    length = header.refcount_table_clusters * header.cluster_size
    places.add_alone("Reference count table", header.refcount_table_offset, length)
    places.add_alone("Encryption header", *header.crypt_area)
    # Those that make no sense are found by who needs them.
    blocks = [entry for entry in table if entry and may_be_block(entry, header.cluster_size)]
    for entry in blocks:
        places.check("Reference count block", entry)
    if len(set(blocks)) < len(blocks):
        raise ImageError("Two reference count blocks are at the same place")
    places.add_all(blocks)
    snapshots = await load_snapshots(file, header)
    for offset, size in snapshots.places(header.cluster_size):
        places.check("Table of a snapshot", offset, size)
        places.add_all(range(offset, offset + size, header.cluster_size))
    await add_bitmap_places(file, header, places)
    return places
