"""Moving what an overlay has into what it is backed by (rows B32.8 to B32.12).

Theory of operation: the overlay's users wait, so that nothing is written that would be missed. The base is opened for
writing, is made as long, and gets what the overlay has, run by run; that becomes durable; only then the overlay gives
it up, and shows the base. So both show the same whenever the work stops, by an error, a cancellation or a crash: the
overlay still has what it had, or the base has it.

The base may be several layers below: it gets what any of those above has, and the overlay keeps what it has, because
the layers in between would hide the base. Those show something else from then on.

While it runs the links between the two are frozen, whoever is directly above the base tolerates that it is written, and
all refuse other operations. Other overlays, of the base and of layers in between, do not tolerate it: then there is no
commit.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from vhostblk.block import pipeline
from vhostblk.block.backing import writable
from vhostblk.block.chain import contains, find_overlay, next_layer, skip_filters
from vhostblk.block.edge import Edge
from vhostblk.block.flags import StatusFlag
from vhostblk.block.introspection import filename
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import MAX_BOUNCE
from vhostblk.block.no_medium import NoMediumNode
from vhostblk.block.node import BlockNode
from vhostblk.block.op_blockers import OpType, Reason, backing_chain, check_frozen, check_op
from vhostblk.block.operation import Operation, Pace, Report
from vhostblk.block.permissions import Perm
from vhostblk.block.roles import cow_child
from vhostblk.block.status import status_above
from vhostblk.block.tracking import RequestType
from vhostblk.block.transaction import GraphTransaction
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.graph import BlockGraph

_READERS = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
# Of a status query; what is copied at once is less.
_STEP = 64 << 20


class EmptyingError(BlockError):
    """All was committed, but the image has not given up what it had."""


async def commit(
    graph: BlockGraph,
    node: BlockNode,
    base: BlockNode | None = None,
    *,
    empty: bool = True,
    speed: int = 0,
    report: Report | None = None,
) -> None:
    """Write into a layer below all that those above it have. Requests of the image's users wait meanwhile.

    Args:
        node: the image, or a filter on top of it.
        base: the layer; None: what the image is backed by.
        empty: the image gives up what it had, if its format can; only if it is the one directly above.
        speed: most bytes a second; 0: any number.
        report: called with the bytes that are done and all.

    Raises:
        ConfigError: ENOMEDIUM: there is no image; ENOTSUP: it has no backing file; EBUSY: somebody blocks it; EACCES: a
            file cannot be opened for writing; EPERM: others use the backing file, or the link is frozen; EINVAL: the
            base is not below the image.
        BlockError: the errno of a driver, also if the backing file is shorter and cannot grow. Then, and for whoever is
            cancelled, the image shows what it did.
        EmptyingError: a driver's errno, when all is in the backing file; the image shows the same, before or after.
    """
    if isinstance(node, NoMediumNode):
        raise ConfigError("There is no medium to commit", errno.ENOMEDIUM)
    top = skip_filters(node)
    above = top if base is None else find_overlay(top, base)
    if above is None:
        assert base is not None
        raise ConfigError(f"'{base.node_name}' is not below '{top.node_name}'")
    edge = cow_child(above)
    if edge is None:
        raise ConfigError(f"Node '{top.node_name}' has no backing file", errno.ENOTSUP)
    base = edge.node
    empty = empty and above is top
    check_op(top, OpType.COMMIT_SOURCE)
    check_op(base, OpType.COMMIT_TARGET)
    async with AsyncExitStack() as stack:
        if empty:
            await stack.enter_async_context(writable(graph, [top]))
        await stack.enter_async_context(writable(graph, [base]))
        await stack.enter_async_context(committing(graph, top, edge))
        perm = Perm.CONSISTENT_READ | (Perm.WRITE_UNCHANGED if empty else Perm.NONE)
        what = f"commit of '{top.node_name}'"
        source = Operation(top, what, perm, Perm.ALL)
        stack.push_async_callback(source.finish)
        target = Operation(base, what, Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE, _READERS)
        stack.push_async_callback(target.finish)
        await stack.enter_async_context(source.alone())
        if source.length > target.length:
            await target.truncate(source.length)
        pace = Pace(speed)
        offset = 0
        while offset < source.length:
            done, copied = await copy_run(source, target, offset, source.length)
            offset += done
            if report is not None:
                report(offset, source.length)
            await pace.spent(copied)
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
async def committing(graph: BlockGraph, top: BlockNode, edge: Edge) -> AsyncIterator[None]:
    """The node below a link may be written, and nobody changes the links from `top` down to it, or begins another
    operation at either of their ends.

    Raises:
        ConfigError: EPERM: a link is frozen, or a layer in between has other users; EBUSY: the chain has changed.
    """
    above, base = edge.parent, edge.node
    assert isinstance(above, BlockNode)
    reason = Reason(f"it is being committed to '{base.node_name}'")
    async with graph.changing():
        if cow_child(above) is not edge or edge.node is not base or not contains(top, above):
            raise ConfigError(f"Node '{top.node_name}' is backed by another by now", errno.EBUSY)
        chain = backing_chain(top, base)
        nodes = [top, *(link.node for link in chain)]
        for node in nodes[1:-1]:
            _check_unused(node, chain)
        for link in chain:
            check_frozen(link)
        _tolerate(above, edge, tolerant=True)
        for link in chain:
            link.frozen = True
        for node in nodes:
            node.op_blockers.block(reason)
    try:
        yield
    finally:
        for link in chain:
            link.frozen = False
        for node in nodes:
            node.op_blockers.unblock(reason)
        _tolerate(above, edge, tolerant=False)


def _check_unused(node: BlockNode, chain: list[Edge]) -> None:
    """Refuse a layer in between that others look at: what it shows is going to change.

    Raises:
        ConfigError: EPERM.
    """
    for edge in node.parents:
        if edge not in chain and edge.perm & Perm.CONSISTENT_READ:
            raise ConfigError(
                f"{edge.describe()} uses '{node.node_name}', which would change", errno.EPERM
            )


def _tolerate(top: BlockNode, edge: Edge, *, tolerant: bool) -> None:
    with GraphTransaction() as change:
        change.assign(edge, "tolerant", tolerant)
        change.refresh(top)


async def copy_run(source: Operation, target: Operation, offset: int, end: int) -> tuple[int, int]:
    """Copy what the layers above the target have at `offset`; returns how many bytes are done, and how many of them
    were copied.

    Raises:
        BlockError: the errno of either.
    """
    status = await status_above(source.node, target.node, offset, min(end - offset, _STEP))
    count = status.length
    if not status.flags & StatusFlag.ALLOCATED:
        return count, 0
    if status.flags & StatusFlag.ZERO:
        await target.pwrite_zeroes(offset, count, may_unmap=True)
        return count, count
    count = min(count, MAX_BOUNCE)
    pool = target.node.bounce
    buffer = pool.acquire(count, target.limits.opt_mem_alignment)
    try:
        content = IoVec([buffer[:count]])
        await source.preadv(offset, content)
        await target.pwritev(offset, content)
    finally:
        pool.release(buffer)
    return count, count


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
            what = f"Failed to empty {filename(source.node)}"
            raise EmptyingError(
                error.errno or errno.EIO, f"{what}: {os.strerror(error.errno or 0)}"
            ) from None
