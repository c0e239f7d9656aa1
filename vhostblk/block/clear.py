"""Zero-writes and discards on one node: the pipeline for requests without payload (block layer rows B17 and B18)."""

from __future__ import annotations

import errno

from vhostblk.block import submit
from vhostblk.block.bounce import zeroes
from vhostblk.block.flags import StatusFlag
from vhostblk.block.flush import flush
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import MAX_REQUEST, align_down, align_up
from vhostblk.block.node import BlockNode, Req
from vhostblk.block.pipeline import (
    check_range,
    check_writable,
    padded_write,
    run_before_write,
    serialise,
    written,
)
from vhostblk.block.status import block_status
from vhostblk.block.tracking import RequestType, TrackedRequest
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
            must_flush |= await _zero_in_block(node, request, offset, min(end, first), flags)
        if first < last:
            must_flush |= await _aligned_zeroes(node, request, first, last, flags)
        if last < end and last >= first:
            must_flush |= await _zero_in_block(node, request, last, end, flags)
        written(node, end)
        if must_flush:
            await flush(node)
    finally:
        tracker.end(request)
        node.leave()


async def _zero_in_block(
    node: BlockNode, request: TrackedRequest, start: int, end: int, flags: int
) -> bool:
    """Zero part of one block by writing data (rows B17.2 and B17.4)."""
    flags &= ~(_MAY_UNMAP | _NO_FALLBACK)
    return await padded_write(node, request, start, IoVec([zeroes(end - start)]), flags)


async def _aligned_zeroes(
    node: BlockNode, request: TrackedRequest, offset: int, end: int, flags: int
) -> bool:
    try:
        if node.before_write:
            await run_before_write(node, request)
        if node.has_debug_events:
            await node.driver_debug_event("pwritev_zero")
        return await submit.write_zeroes(node, offset, end, flags)
    finally:
        node.write_log.wrote(offset, end)
        if node.has_debug_events:
            await node.driver_debug_event("pwritev_done")


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
        if node.before_write:
            await run_before_write(node, request)
        await submit.discard(node, offset, length)
    finally:
        node.write_log.discarded(offset, length)
        tracker.end(request)
        node.leave()


async def make_zero(node: BlockNode, flags: int = 0) -> None:
    """Make the whole node read as zeroes; what does so already is left alone (row B17.21).

    Args:
        flags: of `Req`, as `pwrite_zeroes`.

    Raises:
        BlockError: as `pwrite_zeroes`, with the place.
    """
    offset = 0
    while offset < node.length:
        try:
            status = await block_status(node, offset, min(node.length - offset, MAX_REQUEST))
            if not status.flags & StatusFlag.ZERO:
                await pwrite_zeroes(node, offset, status.length, flags)
        except BlockError as error:
            raise BlockError(
                error.errno or errno.EIO, f"{node.node_name}: at {offset}: {error}"
            ) from None
        offset += status.length
