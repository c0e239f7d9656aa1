"""All reference counts of an image, written anew to clusters that nobody uses.

The old ones are whole meanwhile: nobody finds the new ones before the header names them.

Context: the control loop; nobody uses the image meanwhile.
"""

from __future__ import annotations

from array import array

from vhostblk.block.drivers.qcow2.header import MAX_OFFSET, MAX_REFCOUNT_TABLE_BYTES, Header
from vhostblk.block.drivers.qcow2.survey import Survey
from vhostblk.block.drivers.qcow2.tables import OFFSETS, Table
from vhostblk.block.drivers.qcow2.tally import PIECE
from vhostblk.block.edge import Edge
from vhostblk.block.iov import IoVec
from vhostblk.errors import ImageError


async def write_new_counts(file: Edge, header: Header, survey: Survey) -> tuple[int, int]:
    """Write what was counted, and the counts of what that takes; flush.

    Returns: for the header: the offset of the table, and its clusters.

    Raises:
        BlockError: the child's errno.
        ImageError: there is no room.
    """
    blocks, (offset, clusters) = _place_all(header, survey)
    table = array("Q", [0]) * (clusters * header.cluster_size // 8)
    for index, cluster in blocks.items():
        table[index] = cluster << header.cluster_bits
        await file.pwritev(table[index], IoVec.of(_new_block(survey, index)))
    await file.pwritev(offset, IoVec.of(OFFSETS.encode(table)))
    await file.flush()
    return offset, clusters


def _place_all(header: Header, survey: Survey) -> tuple[dict[int, int], tuple[int, int]]:
    """Clusters for the new blocks, by index, and offset and clusters of the table."""
    used = survey.used
    entries = header.cluster_size // 8
    blocks: dict[int, int] = {}
    hint, clusters, table, end = 1, 0, 0, survey.clusters
    while True:
        missing = [index for index in _needed_blocks(survey) if index not in blocks]
        for index in missing:
            hint = used.find_free(hint, 1, end)
            end = max(end, hint + 1)
            used.add(hint, 1)
            blocks[index] = hint
        if missing:
            continue
        needed = -(-(max(blocks) + 1) // entries)
        if needed <= clusters:
            break
        for cluster in range(table, table + clusters):
            used.set(cluster, 0)
        clusters = needed
        table = used.find_free(1, clusters, end)
        end = max(end, table + clusters)
        used.add(table, clusters)
    size = clusters * header.cluster_size
    if size > MAX_REFCOUNT_TABLE_BYTES or used.end() << header.cluster_bits > MAX_OFFSET:
        raise ImageError("There is no room for new reference counts")
    return blocks, (table << header.cluster_bits, clusters)


def _needed_blocks(survey: Survey) -> list[int]:
    """Those that count anything."""
    needed: dict[int, None] = {}
    step = min(survey.recorded.per_block, PIECE)
    for number in survey.used.pieces():
        piece = survey.used.piece(number)
        for at in range(0, PIECE, step):
            if any(piece[at : at + step]):
                needed[(number * PIECE + at) // survey.recorded.per_block] = None
    return list(needed)


def _new_block(survey: Survey, index: int) -> bytes:
    counts: Table = survey.used.empty()[:0]
    first, end = index * survey.recorded.per_block, (index + 1) * survey.recorded.per_block
    for start in range(first, end, PIECE):
        at = start % PIECE
        counts.extend(survey.used.piece(start // PIECE)[at : at + min(PIECE, end - start)])
    return survey.recorded.codec.encode(counts)
