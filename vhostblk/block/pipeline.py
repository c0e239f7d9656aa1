"""One request on one node: check, track, serialise, pad, hooks, hand over, bookkeeping, emulate.

Block layer rows B14 to B16, B20 and B31.4; zero-writes and discards are in `clear.py`, flushes in `flush.py`, and how a
driver gets what it can take in `submit.py`.

Theory of operation of a write: validated (B14.1), counted in flight, tracked. If it is not aligned
it is marked serialising, extents over its widened range are revoked so that the engine cannot write
there either, overlapping requests are waited for, the first and the last block are read, and the
padded whole is written. Hooks see it and may veto it; zeroes are detected. The write generation grows, and only *after*
that FUA which the driver cannot do becomes a flush, so that the flush cannot believe there is nothing to do.

Requests suspend only where a driver does, or behind another request. A read or write that finds nothing to do but to
hand itself over is counted and tracked when its driver first waits: nobody could have looked before. Most never wait,
and no coroutine is made for them: see `eager.py` about what that asks of callers.

Knows nothing about files, virtio or the engine.
"""

from __future__ import annotations

import asyncio
import errno

from vhostblk.block import submit
from vhostblk.block.admission import (
    User,
    check_range,
    check_writable,
    run_before_write,
    serialise,
)
from vhostblk.block.dirty_bitmap import check_resizable
from vhostblk.block.eager import DONE, Request, begin, rest, to_the_end
from vhostblk.block.flags import Preallocation
from vhostblk.block.flush import flush, flush_target
from vhostblk.block.host_extent import host_extent, host_extents, prepare_writes
from vhostblk.block.iov import IoVec, concat
from vhostblk.block.lane import Lane
from vhostblk.block.limits import (
    MAX_BOUNCE,
    MAX_LENGTH,
    MAX_REQUEST,
    SECTOR_SIZE,
    align_down,
    align_up,
)
from vhostblk.block.node import BlockNode, Req
from vhostblk.block.status import is_allocated
from vhostblk.block.tracking import RequestType, TrackedRequest
from vhostblk.errors import BlockError

__all__ = [
    "check_range",
    "check_writable",
    "flush",
    "flush_target",
    "host_extent",
    "host_extents",
    "padded_write",
    "prefetch",
    "preadv",
    "prepare_writes",
    "pwritev",
    "run_before_write",
    "serialise",
    "truncate",
    "written",
]

_COPY_ON_READ = int(Req.COPY_ON_READ)
_REGISTERED_BUF = int(Req.REGISTERED_BUF)
_SERIALISING = int(Req.SERIALISING)
_NO_WAIT = int(Req.NO_WAIT)
_WRITE_COMPRESSED = int(Req.WRITE_COMPRESSED)
_MAY_UNMAP = int(Req.MAY_UNMAP)
_WRITE_UNCHANGED = int(Req.WRITE_UNCHANGED)
_MASK = int(Req.MASK)


# ---------------------------------------------------------------------- reads (row B15)


def preadv(
    lane: Lane, offset: int, iov: IoVec, flags: int = 0, user: User | None = None
) -> Request:
    """Read `iov` full; what lies behind the end of the node reads as zeroes. Await at once what this gives.

    Args:
        lane: the node's.
        flags: of `Req`: COPY_ON_READ, REGISTERED_BUF.
        user: is asked about requests that are not simply inside the node.

    Raises:
        BlockError: with the driver's errno; the content of `iov` is then undefined.
    """
    length = iov.piece
    if not (
        0 < length <= lane.limits.as_is
        and 0 <= offset <= lane.length - length
        and not flags
        and not lane.tracker.serialising
    ):
        length = iov.length
        if user is not None:
            user.check_read(offset, length)
        if (
            flags
            or lane.tracker.serialising
            or not 0 <= offset <= lane.length - length
            or not submit.takes(lane.limits, offset, iov)
        ):
            return _read(lane.node, offset, iov, flags)
    # Nothing to do but to hand it over, as with most requests.
    request = lane.node.driver_preadv(offset, length, iov)
    if request is DONE:
        return request
    return _handed_over(lane.node, RequestType.READ, offset, length, request)


async def _handed_over(
    node: BlockNode, kind: RequestType, offset: int, length: int, driver: Request
) -> None:
    """Let a driver finish; if it waits, in sight of drains and of serialising requests."""
    waits_for = begin(driver)
    if waits_for is DONE:
        return
    node.in_flight += 1
    request = node.tracker.begin(kind, offset, length)
    try:
        await rest(driver, waits_for)
    finally:
        node.tracker.end(request)
        node.leave()


async def _read(node: BlockNode, offset: int, iov: IoVec, flags: int) -> None:
    length = iov.length
    check_range(node, offset, length, MAX_REQUEST)
    node.in_flight += 1
    request = node.tracker.begin(RequestType.READ, offset, length)
    try:
        if (offset | length) & (node.limits.request_alignment - 1):
            await _padded_read(node, request, offset, iov, flags)
        else:
            if node.tracker.serialising:
                await node.tracker.wait(request)
            if flags & _COPY_ON_READ and await _copy_on_read(node, request, iov):
                return
            if length:
                await submit.read(node, offset, iov)
    finally:
        node.tracker.end(request)
        node.leave()


async def _padded_read(
    node: BlockNode, request: TrackedRequest, offset: int, iov: IoVec, flags: int
) -> None:
    align = node.limits.request_alignment
    end = offset + iov.length
    head, tail = offset % align, -end % align
    request.widen(align)
    await node.tracker.wait(request)
    if flags & _COPY_ON_READ and await _copy_on_read(node, request, iov):
        return
    if iov.length:
        scratch = node.bounce.acquire(head + tail)
        try:
            padded = concat((IoVec([scratch[:head]]), iov, IoVec([scratch[head : head + tail]])))
            await submit.read(node, offset - head, padded)
        finally:
            node.bounce.release(scratch)


# ---------------------------------------------------------------------- copy on read (row B20)


async def prefetch(node: BlockNode, offset: int, length: int) -> None:
    """Copy on read without a reader (row B20.8): what is not in this layer yet is, when this returns.

    Raises:
        BlockError: as `preadv`.
    """
    check_range(node, offset, length)
    node.in_flight += 1
    request = node.tracker.begin(RequestType.READ, offset, length)
    try:
        await _copy_on_read(node, request, None)
    finally:
        node.tracker.end(request)
        node.leave()


async def _copy_on_read(node: BlockNode, request: TrackedRequest, iov: IoVec | None) -> bool:
    """Serve a read from buffers of our own, and write what this layer lacks of its clusters to it.

    Never from the reader's memory, which the guest may change meanwhile (row B13.5). Marked serialising over whole
    clusters, so that a write and the population of its cluster exclude each other.

    Returns:
        False: this layer has all that is asked for already, and it is still to be read (row B20.2); or the image is
            somebody else's for now, and nothing may be written to it.
    """
    if node.inactive:
        return False
    check_writable(node)
    info, align = node.info(), node.limits.request_alignment
    await serialise(node, request, 0, max(info.cluster_size if info else 0, align))
    offset, end = request.offset, request.offset + request.length
    first, last = align_down(offset, align), align_up(end, align)
    if await is_allocated(node, first, last - first) == (True, last - first):
        return False
    at = request.start
    stop = min(request.end, align_up(max(node.length, end), node.limits.request_alignment))
    step = max(MAX_BOUNCE, node.limits.request_alignment)
    while at < stop:
        allocated, count = await is_allocated(node, at, min(stop - at, step))
        count = count or stop - at  # behind the end: zeroes
        async with submit.bounce_buffer(node, count) as buffer:
            low, high = max(at, offset), min(at + count, end)
            wanted = iov is not None and low < high
            if not allocated or wanted:
                await submit.read(node, at, IoVec([buffer]))
            if not allocated and at < node.length:
                await _populate(node, at, buffer)
            if iov is not None and low < high:
                part = iov.slice(low - offset, high - low)
                part.copy_from(buffer[low - at : high - at])
        at += count
    return True


async def _populate(node: BlockNode, offset: int, buffer: memoryview) -> None:
    content = IoVec([buffer])
    if node.has_debug_events:
        await node.driver_debug_event("cor_write")
    try:
        if content.is_zero():
            await submit.write_zeroes(node, offset, offset + content.length, _WRITE_UNCHANGED)
        else:
            await submit.write(node, offset, content, _WRITE_UNCHANGED)
    finally:
        node.write_log.generation += (
            1  # what is visible is the same, but a flush has something to do
        )


# ---------------------------------------------------------------------- writes (row B16)


def pwritev(
    lane: Lane, offset: int, iov: IoVec, flags: int = 0, user: User | None = None
) -> Request:
    """Write `iov`. Await at once what this gives.

    Args:
        lane: the node's.
        flags: of `Req`: FUA, SERIALISING, NO_WAIT, WRITE_UNCHANGED, WRITE_COMPRESSED, REGISTERED_BUF.
        user: is asked about requests that are not simply inside the node.

    Raises: BlockError: EPERM, EBUSY for NO_WAIT, ENOTSUP for WRITE_COMPRESSED, else the driver's errno; a part may have
        been written.
    """
    length = iov.piece
    if not (
        0 < length <= lane.limits.as_is
        and 0 <= offset <= lane.length - length
        and lane.may_write
        and not flags
        and not lane.tracker.serialising
    ):
        length = iov.length
        if user is not None:
            user.check_write(offset, length)
        if (
            flags & ~lane.node.supported_write_flags
            or not lane.may_write
            or lane.tracker.serialising
            or not 0 <= offset <= lane.length - length
            or not submit.takes(lane.limits, offset, iov)
        ):
            return _write(lane.node, offset, iov, flags)
    try:
        request = lane.node.driver_pwritev(offset, length, iov, flags)
    except BaseException:
        lane.log.wrote(offset, offset + length)
        raise
    if request is not DONE:
        return _handed_over_write(lane.node, offset, length, request)
    log = lane.log
    if offset + length > log.highest or log.dirty_maps:
        log.wrote(offset, offset + length)
    else:
        log.generation += 1  # that is all that it does then
    return request


async def _handed_over_write(node: BlockNode, offset: int, length: int, driver: Request) -> None:
    try:
        await _handed_over(node, RequestType.WRITE, offset, length, driver)
    finally:
        node.write_log.wrote(offset, offset + length)


async def _write(node: BlockNode, offset: int, iov: IoVec, flags: int) -> None:
    check_writable(node)
    length, tracker = iov.length, node.tracker
    check_range(node, offset, length, MAX_REQUEST)
    assert not flags & ~_MASK, f"unknown request flags {flags:#x}"
    node.in_flight += 1
    request = tracker.begin(RequestType.WRITE, offset, length)
    try:
        if length and (offset | length) & (node.limits.request_alignment - 1):
            await serialise(node, request, flags)
            must_flush = await padded_write(node, request, offset, iov, flags)
        else:
            if flags & _SERIALISING:
                await serialise(node, request, flags)
            elif tracker.serialising:
                await tracker.wait(request)
            must_flush = await _aligned_write(node, request, offset, iov, flags)
        if offset + length > node.length:
            written(node, offset + length)
        if must_flush:
            await flush(node)
    finally:
        tracker.end(request)
        node.leave()


async def padded_write(
    node: BlockNode, request: TrackedRequest, offset: int, iov: IoVec, flags: int
) -> bool:
    """Read-modify-write of the blocks at both ends (rows B16.2 to B16.5)."""
    limits = node.limits
    align = limits.request_alignment
    start, end = align_down(offset, align), align_up(offset + iov.length, align)
    head, tail = offset - start, end - offset - iov.length
    scratch = node.bounce.acquire(2 * align, limits.opt_mem_alignment)
    try:
        size = end - start
        if size == align or (size == 2 * align and head and tail):
            # All of it in one read.
            which = [name for name, part in (("head", head), ("tail", tail)) if part]
            await _read_blocks(node, start, scratch[:size], *which)
            first, last = scratch[:align], scratch[size - align : size]
        else:
            first, last = scratch[:align], scratch[align : 2 * align]
            if head:
                await _read_blocks(node, start, first, "head")
            if tail:
                await _read_blocks(node, end - align, last, "tail")
        padded = concat((IoVec([first[:head]]), iov, IoVec([last[align - tail :]])))
        must_flush = await _aligned_write(node, request, start, padded, flags & ~_REGISTERED_BUF)
    finally:
        node.bounce.release(scratch)
    real_end = max(node.length, offset + iov.length)
    if end > real_end:
        await node.driver_cut_padding(real_end)
    return must_flush


async def _read_blocks(node: BlockNode, offset: int, blocks: memoryview, *which: str) -> None:
    if node.has_debug_events:
        for name in which:
            await node.driver_debug_event(f"pwritev_rmw_{name}")
    await submit.read(node, offset, IoVec([blocks]))
    if node.has_debug_events:
        for name in which:
            await node.driver_debug_event(f"pwritev_rmw_after_{name}")


async def _aligned_write(
    node: BlockNode, request: TrackedRequest, offset: int, iov: IoVec, flags: int
) -> bool:
    """Hooks, zero detection, the write, bookkeeping; returns whether a flush has to follow."""
    end = offset + iov.length
    try:
        if node.before_write:
            await run_before_write(node, request)
        zeroes = bool(node.detect_zeroes and iov.length) and iov.is_zero()
        if node.has_debug_events:
            await node.driver_debug_event("pwritev_zero" if zeroes else "pwritev")
        if zeroes:
            if node.detect_zeroes == "unmap":
                flags |= _MAY_UNMAP
            flags &= ~(_REGISTERED_BUF | _WRITE_COMPRESSED)
            return await submit.write_zeroes(node, offset, end, flags)
        if flags & _WRITE_COMPRESSED:
            return await submit.write_compressed(node, offset, iov, flags)
        return await submit.write(node, offset, iov, flags)
    finally:
        node.write_log.wrote(offset, end)
        if node.has_debug_events:
            await node.driver_debug_event("pwritev_done")


def written(node: BlockNode, end: int) -> None:
    """A write up to `end` has succeeded: the node is at least as long (row B16.12)."""
    if end > node.length:
        node.set_length(align_up(end, SECTOR_SIZE))


# ---------------------------------------------------------------------- length (row B31.4)


async def truncate(
    node: BlockNode, length: int, preallocation: Preallocation = Preallocation.OFF
) -> None:
    """Change the node's length; a larger node reads zeroes where it has grown.

    Args:
        preallocation: what to do about the new part.

    Raises: BlockError: EACCES on a read-only node, EINVAL and EFBIG for impossible lengths, ENOTSUP
        for a preallocation it cannot do, else the driver's errno; the length is then what it really is.
    """
    if node.read_only:
        raise BlockError(errno.EACCES, f"{node.node_name}: node is read-only")
    if length < 0:
        raise BlockError(errno.EINVAL, f"{node.node_name}: negative length")
    if length > MAX_LENGTH:
        raise BlockError(errno.EFBIG, f"offset({length}) exceeds maximum({MAX_LENGTH})")
    if preallocation is not Preallocation.OFF and length < node.length:
        raise BlockError(errno.ENOTSUP, "Cannot use preallocation for shrinking files")
    check_resizable(node)
    low, high = sorted((node.length, length))
    node.in_flight += 1
    request = node.tracker.begin(RequestType.TRUNCATE, low, high - low)
    try:
        await serialise(node, request, 0)
        try:
            await node.driver_truncate(length, preallocation)
        finally:
            # Also if whoever asked is cancelled, once more even: the length is what it really is.
            refresh = node.refresh_length()
            if (waits_for := begin(refresh)) is not DONE:
                await to_the_end(asyncio.ensure_future(rest(refresh, waits_for)))
            node.write_log.generation += 1
    finally:
        node.tracker.end(request)
        node.leave()
