"""One request on one node: check, track, serialise, pad, bounce, split, driver, emulate.

Block layer rows B14 to B16 and B19; zero-writes and discards are in `clear.py`.

Theory of operation of a write: validated (B14.1), counted in flight, tracked. If it is not aligned
it is marked serialising, extents over its widened range are revoked so that the engine cannot write
there either, overlapping requests are waited for, the first and the last block are read, and the
padded whole is written. Then it is cut to the driver's limits, bounced where the driver cannot take
the caller's memory, and written. The write generation grows, and only *after* that FUA which the
driver cannot do becomes a flush, so that the flush cannot believe there is nothing to do.

Coroutines here suspend only where a driver does, or behind another request. Knows nothing about
files, virtio or the engine.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from vhostblk.block.iov import IoVec, concat
from vhostblk.block.limits import (
    MAX_BOUNCE,
    MAX_LENGTH,
    MAX_REQUEST,
    SECTOR_SIZE,
    BlockLimits,
    align_down,
    align_up,
)
from vhostblk.block.node import BlockNode, ExtentFlag, FlushTarget, HostExtent, Req
from vhostblk.block.tracking import RequestType, TrackedRequest
from vhostblk.errors import BlockError

_FUA = int(Req.FUA)
_REGISTERED_BUF = int(Req.REGISTERED_BUF)
_SERIALISING = int(Req.SERIALISING)
_NO_WAIT = int(Req.NO_WAIT)
_MASK = int(Req.MASK)


def check_range(node: BlockNode, offset: int, length: int, largest: int = MAX_LENGTH) -> None:
    """Refuse what no request may be (row B14.1). The end of the node is not looked at: users check that.

    Raises:
        BlockError: EIO.
    """
    if length > largest:
        raise BlockError(errno.EIO, f"{node.node_name}: request of {length} bytes is too large")
    if offset < 0 or length < 0 or offset > MAX_LENGTH - length:
        raise BlockError(errno.EIO, f"{node.node_name}: no such range: {length} bytes at {offset}")


def check_writable(node: BlockNode) -> None:
    """Refuse to change a read-only node.

    Raises:
        BlockError: EPERM.
    """
    if node.read_only:
        raise BlockError(errno.EPERM, f"{node.node_name}: node is read-only")  # row C2


# ---------------------------------------------------------------------- reads (row B15)


async def preadv(node: BlockNode, offset: int, iov: IoVec) -> None:
    """Read `iov` full; what lies behind the end of the node reads as zeroes.

    Raises:
        BlockError: with the driver's errno; the content of `iov` is then undefined.
    """
    length = iov.length
    check_range(node, offset, length, MAX_REQUEST)
    align = node.limits.request_alignment
    head = offset % align
    tail = -(offset + length) % align
    tracker = node.tracker
    node.in_flight += 1
    request = tracker.begin(RequestType.READ, offset - head, head + length + tail)
    try:
        if tracker.serialising:
            await tracker.wait(request)
        if not length:
            return
        if head or tail:
            await _padded_read(node, offset, iov, head, tail)
        else:
            await _aligned_read(node, offset, iov)
    finally:
        tracker.end(request)
        node.leave()


async def _padded_read(node: BlockNode, offset: int, iov: IoVec, head: int, tail: int) -> None:
    scratch = node.bounce.acquire(head + tail)
    try:
        padded = concat((IoVec([scratch[:head]]), iov, IoVec([scratch[head : head + tail]])))
        await _aligned_read(node, offset - head, padded)
    finally:
        node.bounce.release(scratch)


async def _aligned_read(node: BlockNode, offset: int, iov: IoVec) -> None:
    limits = node.limits
    length = iov.length
    readable = align_up(max(0, node.length - offset), limits.request_alignment)
    if (
        length <= readable
        and (not limits.max_transfer or length <= limits.max_transfer)
        and not _must_bounce(limits, iov)
    ):
        await node.driver_preadv(offset, length, iov)
        return
    done = 0
    for part in _parts(limits, iov.slice(0, min(length, readable))):
        if _must_bounce(limits, part):
            async with _bounce_buffer(node, part.length) as whole:
                await node.driver_preadv(offset + done, part.length, IoVec([whole]))
                part.copy_from(whole)
        else:
            await node.driver_preadv(offset + done, part.length, part)
        done += part.length
    iov.zero(done, length - done)


def _must_bounce(limits: BlockLimits, iov: IoVec) -> bool:
    """Whether the driver cannot take this memory (rows B13.2 and B15.10)."""
    return len(iov.views) > limits.max_iov or (
        limits.min_mem_alignment > 1 and not iov.is_aligned(limits.min_mem_alignment)
    )


@asynccontextmanager
async def _bounce_buffer(node: BlockNode, length: int) -> AsyncIterator[memoryview]:
    """Memory the driver can take, when it is this request's turn (row B13.1).

    Whoever holds one waits for the driver only, and what is below finds it aligned, so nobody waits in a circle.
    """
    async with node.bouncing:
        buffer = node.bounce.acquire(length, node.limits.opt_mem_alignment)
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


# ---------------------------------------------------------------------- writes (row B16)


async def pwritev(node: BlockNode, offset: int, iov: IoVec, flags: int = 0) -> None:
    """Write `iov`.

    Args:
        flags: of `Req`: FUA, SERIALISING, NO_WAIT, WRITE_UNCHANGED, REGISTERED_BUF.

    Raises: BlockError: EPERM on a read-only node, EBUSY for NO_WAIT, else the driver's errno; part
        of the range may have been written then.
    """
    check_writable(node)
    length = iov.length
    check_range(node, offset, length, MAX_REQUEST)
    assert not flags & ~_MASK, f"unknown request flags {flags:#x}"
    align = node.limits.request_alignment
    tracker = node.tracker
    node.in_flight += 1
    request = tracker.begin(RequestType.WRITE, offset, length)
    try:
        if length and (offset | length) & (align - 1):
            await serialise(node, request, flags)
            must_flush = await padded_write(node, offset, iov, flags)
        else:
            if flags & _SERIALISING:
                await serialise(node, request, flags)
            elif tracker.serialising:
                await tracker.wait(request)
            must_flush = await aligned_write(node, offset, iov, flags)
        if offset + length > node.length:
            node.set_length(align_up(offset + length, SECTOR_SIZE))  # row B16.12
        if must_flush:
            await flush(node)
    finally:
        tracker.end(request)
        node.leave()


async def serialise(node: BlockNode, request: TrackedRequest, flags: int) -> None:
    """Make the request's widened range its own, towards the engine as towards other requests."""
    tracker = node.tracker
    tracker.mark_serialising(request, node.limits.request_alignment)
    if flags & _NO_WAIT and tracker.blocker(request):
        raise BlockError(errno.EBUSY, f"{node.node_name}: another request is in the way")
    # Marked before revoked: from here on nobody is given a new extent, and whoever comes waits for
    # us.
    await node.revoke(request.start, request.end - request.start)
    await tracker.wait(request)


async def padded_write(node: BlockNode, offset: int, iov: IoVec, flags: int) -> bool:
    """Read-modify-write of the blocks at both ends (rows B16.2 to B16.5)."""
    limits = node.limits
    align = limits.request_alignment
    start, end = align_down(offset, align), align_up(offset + iov.length, align)
    head, tail = offset - start, end - offset - iov.length
    scratch = node.bounce.acquire(2 * align, limits.opt_mem_alignment)
    try:
        first, last = scratch[:align], scratch[align : 2 * align]
        if end - start == align:
            last = first
        if head or last is first:
            await _aligned_read(node, start, IoVec([first]))
        if tail and last is not first:
            await _aligned_read(node, end - align, IoVec([last]))
        padded = concat((IoVec([first[:head]]), iov, IoVec([last[align - tail :]])))
        must_flush = await aligned_write(node, start, padded, flags & ~_REGISTERED_BUF)
    finally:
        node.bounce.release(scratch)
    real_end = max(node.length, offset + iov.length)
    if end > real_end:
        await node.driver_cut_padding(real_end)
    return must_flush


async def aligned_write(node: BlockNode, offset: int, iov: IoVec, flags: int) -> bool:
    """Write an aligned vector; returns whether a flush has to follow, because the driver cannot do FUA."""
    limits = node.limits
    length = iov.length
    driver_flags = flags & node.supported_write_flags
    try:
        if not length:
            pass
        elif (not limits.max_transfer or length <= limits.max_transfer) and not _must_bounce(
            limits, iov
        ):
            await node.driver_pwritev(offset, length, iov, driver_flags)
        else:
            await _fragmented_write(node, offset, iov, driver_flags)
    finally:
        # Even after a failure: part of it may have been written (rows B16.12 and B16.13).
        node.write_gen += 1
    return bool(flags & ~driver_flags & _FUA)


async def _fragmented_write(node: BlockNode, offset: int, iov: IoVec, flags: int) -> None:
    limits = node.limits
    for part in _parts(limits, iov):
        if _must_bounce(limits, part):
            async with _bounce_buffer(node, part.length) as whole:
                part.copy_to(whole)
                await node.driver_pwritev(
                    offset, part.length, IoVec([whole]), flags & ~_REGISTERED_BUF
                )
        else:
            await node.driver_pwritev(offset, part.length, part, flags)
        offset += part.length


# ---------------------------------------------------------------------- flush (row B19)


async def flush(node: BlockNode) -> None:
    """Make every write that has completed before this call durable, down to the leaves.

    Raises:
        BlockError: the driver's errno; the next flush tries again.
    """
    if node.read_only:
        return
    node.in_flight += 1
    # Sampled before queueing: writes that complete later are the next flush's (rows B19.2 and
    # B19.8).
    generation = node.write_generation()
    try:
        while node.flush_active:
            turn = asyncio.get_running_loop().create_future()
            node.flush_queue.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not node.flush_active:
                    _next_flush(node)  # the turn may have been ours
                raise
        node.flush_active = True
        try:
            await node.driver_flush_to_os()
            if not node.no_flush and node.flushed_gen < generation:
                await node.driver_flush_to_disk()
            for edge in tuple(node.children.values()):
                await flush(edge.node)
            node.flushed_gen = max(node.flushed_gen, generation)
        finally:
            node.flush_active = False
            _next_flush(node)
    finally:
        node.leave()


def _next_flush(node: BlockNode) -> None:
    while node.flush_queue:
        turn = node.flush_queue.pop(0)
        if not turn.done():
            turn.set_result(None)
            break


def flush_target(node: BlockNode) -> int | FlushTarget:
    """The one file whose fdatasync is a complete flush of this node, or why there is none.

    A node with several users has none: the kernel tells of a lost write once, to whoever asks first, and all of them
    have to know. So their flushes come through here.
    """
    target = node.flush_target()
    return FlushTarget.ASK if isinstance(target, int) and len(node.parents) > 1 else target


# ---------------------------------------------------------------------- length (row B31.4)


async def truncate(node: BlockNode, length: int) -> None:
    """Change the node's length; a larger node reads zeroes where it has grown.

    Raises: BlockError: EACCES on a read-only node, EINVAL and EFBIG for impossible lengths, else
        the driver's errno.
    """
    if node.read_only:
        raise BlockError(errno.EACCES, f"{node.node_name}: node is read-only")
    if length < 0:
        raise BlockError(errno.EINVAL, f"{node.node_name}: negative length")
    if length > MAX_LENGTH:
        raise BlockError(errno.EFBIG, f"{node.node_name}: length {length} is too large")
    low, high = sorted((node.length, length))
    node.in_flight += 1
    request = node.tracker.begin(RequestType.TRUNCATE, low, high - low)
    try:
        await serialise(node, request, 0)
        try:
            await node.driver_truncate(length)
        finally:
            await node.refresh_length()
            node.write_gen += 1
    finally:
        node.tracker.end(request)
        node.leave()


# ---------------------------------------------------------------------- extents (design: the extent
# map)


async def host_extent(node: BlockNode, offset: int, length: int) -> HostExtent | None:
    """The largest run around `offset` that somebody above may use without asking, or None for now.

    The answer holds until it is revoked, which may happen at the caller's next suspension.

    Args:
        length: how much of it somebody wants; none of that may be in a serialising request's way.
    """
    if not node.mappable(offset, length):
        return None
    extent = await node.host_extent(offset, length)
    # Asking the driver may have taken time: look again.
    if extent is None or not extent.offset <= offset < extent.end or node.quiesced:
        return None
    end = min(offset + length, extent.end)
    run = node.tracker.clear_run(offset, end, extent.offset, extent.end)
    if run is None:
        return None
    if node.read_only and extent.flags & ExtentFlag.WRITE:
        extent = extent.without(ExtentFlag.WRITE)
    return extent.cut(*run)
