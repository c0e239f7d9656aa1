"""Internal snapshots: where their tables are (qcow2 specification, "Snapshots").

Knows nothing about what they show.
"""

from __future__ import annotations

import struct

from vhostblk.block.drivers.qcow2.header import Header
from vhostblk.block.drivers.qcow2.tables import read_bytes
from vhostblk.block.edge import Edge
from vhostblk.errors import ImageError

# L1 table: offset, entries; lengths of ID and name; date, clock, size of the guest's state; length of what follows.
_ENTRY = struct.Struct(">QIHHIIQII")
_MAX_TABLE = 64 << 20
_MAX_L1_BYTES = 32 << 20
# Offsets in tables have 56 bits.
_MAX_OFFSET = 1 << 56


async def snapshot_tables(file: Edge, header: Header) -> list[tuple[int, int]]:
    """Offset and length of the table of all snapshots, if there are any, and of each one's L1 table.

    Raises:
        BlockError: the child's errno.
        ImageError: one of them makes no sense.
    """
    found = []
    at = header.snapshots_offset
    for _ in range(header.snapshots):
        entry = _ENTRY.unpack(await read_bytes(file, at, _ENTRY.size))
        offset, entries, id_length, name_length, extra = (*entry[:4], entry[8])
        at += _ENTRY.size + extra + id_length + name_length
        at += -at % 8
        if at - header.snapshots_offset > _MAX_TABLE:
            raise ImageError("Snapshot table is too large")
        length = entries * 8
        if offset % header.cluster_size or offset > _MAX_OFFSET or length > _MAX_L1_BYTES:
            raise ImageError("L1 table of a snapshot is wrong")
        if length:
            found.append((offset, length))
    if header.snapshots:
        found.append((header.snapshots_offset, at - header.snapshots_offset))
    return found
