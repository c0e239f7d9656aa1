"""What a driver is handed: requests cut to its limits, in memory that it can take, and emulated where it has less.

Block layer rows B12.7, B13, B15.7, B16.8 and B17.6 to B17.12. Requests that come here are checked, tracked and aligned;
the pipeline does the bookkeeping. What a driver cannot zero cheaply is written as data, from a bounded buffer; whether
a flush has to follow, because the driver cannot do FUA, is what the functions that write return.

Knows nothing about other requests.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from vhostblk.block.bounce import zeroes
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import (
    MAX_BOUNCE,
    MAX_REQUEST,
    MAX_ZEROES_BOUNCE,
    BlockLimits,
    align_down,
    align_up,
)
from vhostblk.block.node import BlockNode, Req
from vhostblk.errors import BlockError

_FUA = int(Req.FUA)
_MAY_UNMAP = int(Req.MAY_UNMAP)
_NO_FALLBACK = int(Req.NO_FALLBACK)
_REGISTERED_BUF = int(Req.REGISTERED_BUF)
_WRITE_COMPRESSED = int(Req.WRITE_COMPRESSED)


async def read(node: BlockNode, offset: int, iov: IoVec) -> None:
    """Fill an aligned vector; what lies behind the end of the node is zeroes."""
    limits = node.limits
    length = iov.length
    readable = align_up(max(0, node.length - offset), limits.request_alignment)
    if length <= readable and takes(limits, offset, iov):
        await node.driver_preadv(offset, length, iov)
        return
    done = 0
    for part in _parts(limits, iov.slice(0, min(length, readable))):
        if _must_bounce(limits, part):
            async with bounce_buffer(node, part.length) as whole:
                await node.driver_preadv(offset + done, part.length, IoVec([whole]))
                part.copy_from(whole)
        else:
            await node.driver_preadv(offset + done, part.length, part)
        done += part.length
    iov.zero(done, length - done)


async def write(node: BlockNode, offset: int, iov: IoVec, flags: int) -> bool:
    """Write an aligned vector; returns whether a flush has to follow."""
    limits = node.limits
    length = iov.length
    driver_flags = flags & node.supported_write_flags
    if takes(limits, offset, iov):
        await node.driver_pwritev(offset, length, iov, driver_flags)
    elif length:
        for part in _parts(limits, iov):
            if _must_bounce(limits, part):
                async with bounce_buffer(node, part.length) as whole:
                    part.copy_to(whole)
                    copied = IoVec([whole])
                    await node.driver_pwritev(
                        offset, part.length, copied, driver_flags & ~_REGISTERED_BUF
                    )
            else:
                await node.driver_pwritev(offset, part.length, part, driver_flags)
            offset += part.length
    return bool(flags & ~driver_flags & _FUA)


async def write_compressed(node: BlockNode, offset: int, iov: IoVec, flags: int) -> bool:
    """The same, for data to be stored compressed: not cut, because only whole clusters can be (row B16.11).

    Raises:
        BlockError: ENOTSUP: the driver cannot; it is not written plainly instead.
    """
    if not node.supported_write_flags & _WRITE_COMPRESSED:
        raise BlockError(errno.ENOTSUP, f"{node.node_name}: cannot compress")
    driver_flags = flags & node.supported_write_flags
    # Also of nothing: so a driver learns that nothing more comes.
    await node.driver_pwritev(offset, iov.length, iov, driver_flags)
    return bool(flags & ~driver_flags & _FUA)


def takes(limits: BlockLimits, offset: int, iov: IoVec) -> bool:
    """Whether a driver can be handed this request as it is."""
    length = iov.length
    return (
        0 < length <= (limits.max_transfer or MAX_REQUEST)
        and not (offset | length) & (limits.request_alignment - 1)
        and len(iov.views) <= limits.max_iov
        and (limits.min_mem_alignment == 1 or iov.is_aligned(limits.min_mem_alignment))
    )


def _must_bounce(limits: BlockLimits, iov: IoVec) -> bool:
    """Whether the driver cannot take this memory (rows B13.2 and B15.10)."""
    return len(iov.views) > limits.max_iov or (
        limits.min_mem_alignment > 1 and not iov.is_aligned(limits.min_mem_alignment)
    )


@asynccontextmanager
async def bounce_buffer(node: BlockNode, length: int) -> AsyncIterator[memoryview]:
    """Memory the driver can take, when it is this request's turn (row B13.1).

    Whoever holds one waits for the driver only, and what is below finds it aligned, so nobody waits in a circle.

    Raises:
        BlockError: ENOMEM.
    """
    async with node.bouncing:
        try:
            buffer = node.bounce.acquire(length, node.limits.opt_mem_alignment)
        except (OSError, MemoryError):
            raise BlockError(errno.ENOMEM, f"{node.node_name}: no bounce buffer") from None
        try:
            yield buffer[:length]
        finally:
            node.bounce.release(buffer)


def _parts(limits: BlockLimits, iov: IoVec) -> Iterator[IoVec]:
    """Cut an aligned vector into what the driver takes at once; bounced parts are smaller, to bound the buffer."""
    align = limits.request_alignment
    done = 0
    while done < iov.length:
        part = iov.slice(done, min(limits.transfer, iov.length - done))
        bounce_step = max(align_down(MAX_BOUNCE, align), align)
        if part.length > bounce_step and _must_bounce(limits, part):
            part = part.slice(0, bounce_step)
        yield part
        done += part.length


# ---------------------------------------------------------------------- zeroes (row B17)


async def write_zeroes(node: BlockNode, offset: int, end: int, flags: int) -> bool:
    """The driver's own zero-write, in units it likes; data where it has none. Returns whether a flush has to follow."""
    limits = node.limits
    unit, largest = limits.zeroes_unit, limits.zeroes_transfer
    driver_flags = flags & node.supported_zero_flags
    if flags & ~driver_flags & _NO_FALLBACK:
        raise BlockError(errno.ENOTSUP, f"{node.node_name}: no zero-write but by writing data")
    must_flush = False
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
    return must_flush


async def _write_zero_data(node: BlockNode, offset: int, length: int, flags: int) -> bool:
    """Write zeroes as data from a bounded buffer (row B17.11)."""
    step = min(length, node.limits.transfer, MAX_ZEROES_BOUNCE)
    step = max(align_down(step, node.limits.request_alignment), node.limits.request_alignment)
    try:
        buffer = zeroes(step)
    except (OSError, MemoryError):
        raise BlockError(errno.ENOMEM, f"{node.node_name}: no memory for zeroes") from None
    flags &= ~(_MAY_UNMAP | _REGISTERED_BUF)
    for done in range(0, length, step):
        part = IoVec([buffer[: min(step, length - done)]])
        await write(node, offset + done, part, flags)
    return bool(flags & ~node.supported_write_flags & _FUA)  # one flush at the end (row B17.12)


# ---------------------------------------------------------------------- discard (row B18)


async def discard(node: BlockNode, offset: int, length: int) -> None:
    """Discard piece by piece; a piece that the driver cannot discard is left as it is (row B18.2)."""
    for start, count in discard_pieces(node.limits, offset, length):
        try:
            await node.driver_pdiscard(start, count)
        except BlockError as error:
            if error.errno != errno.ENOTSUP:
                raise


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
