"""Whether an image has clusters that have a place in the file, and were never written there.

Context: the control loop. Knows nothing about which ones: the file does.
"""

from __future__ import annotations

from vhostblk.block.drivers.qcow2.entries import OFFSET_MASK
from vhostblk.block.drivers.qcow2.header import Header
from vhostblk.block.drivers.qcow2.tables import Codec, read_bytes, read_table
from vhostblk.block.edge import Edge
from vhostblk.errors import BlockError


async def is_sparse(file: Edge, header: Header) -> bool:
    """Whether far more clusters are used than the file has room for: some have a place, and were never written.

    Raises:
        BlockError: the child's errno.
    """
    size = header.cluster_size
    try:
        room = await file.node.driver_allocated_size() // size
    except BlockError:  # nobody knows
        return False
    enough = max(room * 10 // 9, room + 2)
    left, used = -(-file.node.length // size), 0
    if left < enough:
        return False
    codec, per_block = Codec(header.refcount_order), size * 8 >> header.refcount_order
    entries = header.refcount_table_clusters * size // 8
    for block in await read_table(file, header.refcount_table_offset, entries):
        if used >= enough or used + left < enough:
            break
        if block & OFFSET_MASK:
            counts = codec.decode(await read_bytes(file, block & OFFSET_MASK, size))[:left]
            used += len(counts) - counts.count(0)
        left -= per_block
    return used >= enough
