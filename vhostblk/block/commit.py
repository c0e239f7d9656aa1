"""Moving what an overlay has into what it is backed by (rows B32.8 to B32.12).

Theory of operation: the overlay's users wait, so that nothing is written that would be missed. The base is opened for
writing, is made as long, and gets what the overlay has, run by run; that becomes durable; only then the overlay gives
it up, and shows the base. So both show the same whenever the work stops, by an error, a cancellation or a crash: the
overlay still has what it had, or the base has it.

While it runs the link between the two is frozen, the overlay tolerates that its base is written, and both refuse other
operations. Other overlays of the base do not tolerate it: then there is no commit.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from vhostblk.block import pipeline
from vhostblk.block.backing import writable
from vhostblk.block.chain import next_layer, skip_filters
from vhostblk.block.edge import Edge
from vhostblk.block.flags import StatusFlag
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import MAX_BOUNCE
from vhostblk.block.no_medium import NoMediumNode
from vhostblk.block.node import BlockNode
from vhostblk.block.op_blockers import OpType, Reason, check_frozen, check_op
from vhostblk.block.operation import Operation
from vhostblk.block.permissions import Perm
from vhostblk.block.roles import cow_child
from vhostblk.block.status import block_status
from vhostblk.block.tracking import RequestType
from vhostblk.block.transaction import GraphTransaction
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.graph import BlockGraph

_READERS = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
# Of a status query; what is copied at once is less.
_STEP = 64 << 20


async def commit(graph: BlockGraph, node: BlockNode, *, empty: bool = True) -> None:
    """Write into its backing file all that an image has. Requests of the image's users wait meanwhile.

    Args:
        node: the image, or a filter on top of it.
        empty: the image gives up what it had, if its format can.

    Raises:
        ConfigError: ENOMEDIUM: there is no image; ENOTSUP: it has no backing file; EBUSY: somebody blocks it; EACCES: a
            file cannot be opened for writing; EPERM: others use the backing file, or the link is frozen.
        BlockError: the errno of a driver, also if the backing file is shorter and cannot grow. Then, and for whoever is
            cancelled, the image shows what it did.
    """
    if isinstance(node, NoMediumNode):
        raise ConfigError("There is no medium to commit", errno.ENOMEDIUM)
    top = skip_filters(node)
    edge = cow_child(top)
    if edge is None:
        raise ConfigError(f"Node '{top.node_name}' has no backing file", errno.ENOTSUP)
    base = edge.node
    check_op(top, OpType.COMMIT_SOURCE)
    check_op(base, OpType.COMMIT_TARGET)
    async with AsyncExitStack() as stack:
        if empty:
            await stack.enter_async_context(writable(graph, [top]))
        await stack.enter_async_context(writable(graph, [base]))
        await stack.enter_async_context(committing(graph, edge))
        perm = Perm.CONSISTENT_READ | (Perm.WRITE_UNCHANGED if empty else Perm.NONE)
        what = f"commit of '{top.node_name}'"
        source = Operation(top, what, perm, Perm.ALL)
        stack.push_async_callback(source.finish)
        target = Operation(base, what, Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE, _READERS)
        stack.push_async_callback(target.finish)
        await stack.enter_async_context(source.alone())
        if source.length > target.length:
            await target.truncate(source.length)
        offset = 0
        while offset < source.length:
            offset += await copy_run(source, target, offset, source.length)
        await target.flush()  # row B32.12
        if empty:
            await _empty(source)


async def commit_all(graph: BlockGraph) -> None:
    """Commit every image that somebody uses and that has a backing file; the first failure ends it (row B32.10).

    Raises:
        ConfigError, BlockError: as `commit`.
    """
    tops = {
        skip_filters(node): None
        for node in graph.nodes.values()
        if any(not isinstance(edge.parent, BlockNode) for edge in node.parents)
    }
    for top in tops:
        if next_layer(top) is not None:
            await commit(graph, top)


@asynccontextmanager
async def committing(graph: BlockGraph, edge: Edge) -> AsyncIterator[None]:
    """The base of a link may be written, and nobody changes the link or begins another operation at either end.

    Raises:
        ConfigError: EPERM: the link is frozen; EBUSY: it has changed.
    """
    top, base = edge.parent, edge.node
    assert isinstance(top, BlockNode)
    reason = Reason(f"it is being committed to '{base.node_name}'")
    async with graph.changing():
        if cow_child(top) is not edge or edge.node is not base:
            raise ConfigError(f"Node '{top.node_name}' is backed by another by now", errno.EBUSY)
        check_frozen(edge)
        _tolerate(top, edge, tolerant=True)
        edge.frozen = True
        top.op_blockers.block(reason)
        base.op_blockers.block(reason)
    try:
        yield
    finally:
        edge.frozen = False
        top.op_blockers.unblock(reason)
        base.op_blockers.unblock(reason)
        _tolerate(top, edge, tolerant=False)


def _tolerate(top: BlockNode, edge: Edge, *, tolerant: bool) -> None:
    with GraphTransaction() as change:
        change.assign(edge, "tolerant", tolerant)
        change.refresh(top)


async def copy_run(source: Operation, target: Operation, offset: int, end: int) -> int:
    """Copy what the source's own layer has at `offset`; returns how many bytes are done.

    Raises:
        BlockError: the errno of either.
    """
    status = await block_status(source.node, offset, min(end - offset, _STEP))
    count = status.length
    if not status.flags & StatusFlag.ALLOCATED:
        return count
    if status.flags & StatusFlag.ZERO:
        await target.pwrite_zeroes(offset, count, may_unmap=True)
        return count
    count = min(count, MAX_BOUNCE)
    pool = target.node.bounce
    buffer = pool.acquire(count, target.limits.opt_mem_alignment)
    try:
        content = IoVec([buffer[:count]])
        await source.preadv(offset, content)
        await target.pwritev(offset, content)
    finally:
        pool.release(buffer)
    return count


async def make_empty(node: BlockNode) -> None:
    """Have a layer give up all it has, so that it shows what it is backed by; durable when this returns (row B32.11).

    Raises:
        BlockError: ENOTSUP: the format cannot; EPERM: it is read-only; else the driver's errno.
    """
    pipeline.check_writable(node)
    node.in_flight += 1
    request = node.tracker.begin(RequestType.DISCARD, 0, node.length)
    try:
        await pipeline.serialise(node, request, 0)
        try:
            await node.driver_make_empty()
        finally:
            node.write_log.generation += 1
        await pipeline.flush(node)
    finally:
        node.tracker.end(request)
        node.leave()


async def _empty(source: Operation) -> None:
    try:
        await make_empty(source.node)
    except BlockError as error:
        if error.errno != errno.ENOTSUP:
            raise
