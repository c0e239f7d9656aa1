"""Zero-writes and discards on one node: the pipeline for requests without payload.

Block layer rows B17 and B18. What a driver cannot clear cheaply is written as data, from a bounded
buffer.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from vhostblk.block.bounce import zeroes
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import (
    MAX_ZEROES_BOUNCE,
    SECTOR_SIZE,
    BlockLimits,
    align_down,
    align_up,
)
from vhostblk.block.node import BlockNode, Req
from vhostblk.block.pipeline import (
    aligned_write,
    check_range,
    check_writable,
    flush,
    padded_write,
    serialise,
)
from vhostblk.block.tracking import RequestType
from vhostblk.errors import BlockError

_FUA = int(Req.FUA)
_MAY_UNMAP = int(Req.MAY_UNMAP)
_NO_FALLBACK = int(Req.NO_FALLBACK)
_SERIALISING = int(Req.SERIALISING)
_MASK = int(Req.MASK)


async def pwrite_zeroes(node: BlockNode, offset: int, length: int, flags: int = 0) -> None:
    """Make the range read as zeroes.

    Args: flags: of `Req`: FUA, MAY_UNMAP (the range may lose its allocation), NO_FALLBACK (fail
        rather than write data).

    Raises:
        BlockError: as `pwritev`; ENOTSUP for NO_FALLBACK.
    """
    check_writable(node)
    check_range(node, offset, length)
    assert not flags & ~_MASK, f"unknown request flags {flags:#x}"
    if not node.unmap:
        flags &= ~_MAY_UNMAP
    align = node.limits.request_alignment
    tracker = node.tracker
    node.in_flight += 1
    request = tracker.begin(RequestType.WRITE, offset, length)
    try:
        if not length:
            return
        end = offset + length
        first, last = align_up(offset, align), align_down(end, align)
        if offset != first or end != last:
            if flags & _NO_FALLBACK:
                raise BlockError(errno.ENOTSUP, f"{node.node_name}: zero-write is not aligned")
            await serialise(node, request, flags)
        elif flags & _SERIALISING:
            await serialise(node, request, flags)
        elif tracker.serialising:
            await tracker.wait(request)
        must_flush = False
        if offset < first:
            must_flush |= await _zero_in_block(node, offset, min(end, first), flags)
        if first < last:
            must_flush |= await _aligned_zeroes(node, first, last, flags)
        if last < end and last >= first:
            must_flush |= await _zero_in_block(node, last, end, flags)
        if end > node.length:
            node.set_length(align_up(end, SECTOR_SIZE))
        if must_flush:
            await flush(node)
    finally:
        tracker.end(request)
        node.leave()


async def _zero_in_block(node: BlockNode, start: int, end: int, flags: int) -> bool:
    """Zero part of one block by writing data (rows B17.2 and B17.4)."""
    flags &= ~(_MAY_UNMAP | _NO_FALLBACK)
    return await padded_write(node, start, IoVec([zeroes(end - start)]), flags)


async def _aligned_zeroes(node: BlockNode, offset: int, end: int, flags: int) -> bool:
    """The driver's own zero-write, in units it likes; data where it has none. Returns whether to flush."""
    limits = node.limits
    unit, largest = limits.zeroes_unit, limits.zeroes_transfer
    driver_flags = flags & node.supported_zero_flags
    must_flush = False
    try:
        while offset < end:
            count = end - offset
            if offset % unit:
                # Rows B17.7 to B17.9: never cross a unit, then whole units, then what is left.
                count = min(count, unit - offset % unit, limits.transfer)
            else:
                if count > unit:
                    count = align_down(count, unit)
                count = min(count, largest)
            try:
                await node.driver_pwrite_zeroes(offset, count, driver_flags)
                must_flush |= bool(flags & ~driver_flags & _FUA)
            except BlockError as error:
                if error.errno != errno.ENOTSUP or flags & _NO_FALLBACK:
                    raise
                must_flush |= await _write_zero_data(node, offset, count, flags)
            offset += count
    finally:
        node.write_gen += 1
    return must_flush


async def _write_zero_data(node: BlockNode, offset: int, length: int, flags: int) -> bool:
    """Write zeroes as data from a bounded buffer (row B17.11)."""
    step = min(length, node.limits.transfer, MAX_ZEROES_BOUNCE)
    step = max(align_down(step, node.limits.request_alignment), node.limits.request_alignment)
    try:
        buffer = zeroes(step)
    except (OSError, MemoryError):
        raise BlockError(errno.ENOMEM, f"{node.node_name}: no memory for zeroes") from None
    must_flush = False
    for done in range(0, length, step):
        part = IoVec([buffer[: min(step, length - done)]])
        must_flush |= await aligned_write(node, offset + done, part, flags & ~_MAY_UNMAP)
    return must_flush


# ---------------------------------------------------------------------- discard (row B18)


async def pdiscard(node: BlockNode, offset: int, length: int) -> None:
    """The content of the range is not needed any more; a hint, and no promise about later reads.

    Raises:
        BlockError: EPERM on a read-only node, else the driver's errno, except ENOTSUP.
    """
    check_range(node, offset, length)
    check_writable(node)
    if not node.unmap or not length:
        return
    node.in_flight += 1
    tracker = node.tracker
    request = tracker.begin(RequestType.DISCARD, offset, length)
    try:
        await tracker.wait(request)  # row C12
        for start, count in discard_pieces(node.limits, offset, length):
            try:
                await node.driver_pdiscard(start, count)
            except BlockError as error:
                if error.errno != errno.ENOTSUP:
                    raise
    finally:
        node.write_gen += 1
        tracker.end(request)
        node.leave()


def discard_pieces(limits: BlockLimits, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut a discard so that what is not aligned does not spoil the bulk (rows B18.3 to B18.5)."""
    align, unit = limits.request_alignment, limits.discard_unit
    end = offset + length
    while offset < end:
        count = end - offset
        if offset % unit:
            count = min(count, unit - offset % unit)
            if count % align:
                count %= align
        elif count > unit:
            count = align_down(count, unit)
        elif count > align:
            count = align_down(count, align)
        count = min(count, limits.discard_transfer)
        yield offset, count
        offset += count
