"""Putting an image on another backing file without changing what it shows (row B32.6 with QEMU's `rebase`).

Theory of operation: where the image has nothing and the old and the new backing file differ, it gets what it shows now,
cluster by cluster, in the way of copy-on-read, so its users may write meanwhile. When all of that is durable, for one
moment in which nobody writes, the image says the new name, and the live link follows. Whenever it is interrupted, the
image shows what it did, by the old backing file or by the new.

The unsafe way only says another name: for whoever has moved or converted the backing file, and knows that it is the
same.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from vhostblk.block import pipeline
from vhostblk.block.backend import BlockBackend
from vhostblk.block.backing import (
    change_backing_file,
    check_says_format,
    not_recorded,
    open_backing,
    record,
    set_backing,
    writable,
)
from vhostblk.block.chain import find_backing_image, layers, skip_filters
from vhostblk.block.filename import is_absolute, is_json, protocol_prefix
from vhostblk.block.flags import StatusFlag
from vhostblk.block.image_driver import BackingName
from vhostblk.block.introspection import directory, exact_filename
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import MAX_BOUNCE, align_down, align_up
from vhostblk.block.node import BlockNode
from vhostblk.block.op_blockers import OpType, Reason, check_frozen, check_op
from vhostblk.block.operation import Operation, Pace, Report
from vhostblk.block.permissions import Perm
from vhostblk.block.roles import Role, cow_child
from vhostblk.block.status import is_allocated, is_allocated_above, status_above
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.graph import BlockGraph

# Of a status query; what is compared at once is less.
_STEP = 64 << 20


async def rebase(
    graph: BlockGraph,
    node: BlockNode,
    name: str,
    driver: str = "",
    *,
    unsafe: bool = False,
    more: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> None:
    """Have an image be backed by another one.

    Args:
        name: of the new backing file, as it is to be in the image; empty: none.
        driver: its format; has to be said.
        unsafe: write the name only. Neither backing file is looked at, and what is read now stays the same.
        more: further options to open the new one with.
        report: called with the bytes that are done and all.

    Raises:
        ConfigError: as `change_backing_file`; the new one cannot be opened; EBUSY: somebody blocks the image; EPERM:
            the link is frozen.
        BlockError: the errno of a driver. Then, and for whoever is cancelled, the image shows what it did.
    """
    top = skip_filters(node)
    if unsafe:
        await change_backing_file(graph, top, name, driver)
        return
    check_op(top, OpType.COMMIT_SOURCE)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(writable(graph, [top]))
        new = await _find_or_open(graph, top, name, driver, more or {}) if name else None
        if new is not None:
            stack.push_async_callback(graph.release, new)
        if "backing" not in top.child_keys:
            raise ConfigError(not_recorded(name, errno.ENOTSUP), errno.ENOTSUP)
        check_says_format(name, driver)
        work = Operation(
            *(top, f"rebase of '{top.node_name}'"),
            *(Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED, Perm.ALL),
        )
        stack.push_async_callback(work.finish)
        reason = Reason("it is being rebased")
        top.op_blockers.block(reason)
        stack.callback(top.op_blockers.unblock, reason)
        if top.backing is None and new is not None:
            await _begin_with_zeroes(graph, top, stack)
        edge = cow_child(top)
        if edge is not None:
            check_frozen(edge)
            edge.frozen = True
        try:
            async with AsyncExitStack() as readers:
                old_user = _reader(edge.node if edge is not None else None, readers)
                new_user = _reader(new, readers)
                comparison = _Comparison(work, old_user, new_user, report)
                done = await comparison.keep(0)
                await stack.enter_async_context(work.alone())
                await comparison.keep(done)  # it may have grown
            await pipeline.flush(top)
        finally:
            if edge is not None:
                edge.frozen = False
        async with graph.changing():
            await record(top, BackingName(name, driver))
        await set_backing(graph, top, new)
        if new is not None and new.inherits_from is None and not graph.is_owned(new):
            new.inherits_from, new.inherits_as = top, Role.COW


async def _find_or_open(
    graph: BlockGraph, top: BlockNode, name: str, driver: str, more: Mapping[str, Any]
) -> BlockNode:
    """The layer of the chain that has this name, or else another node for it; held."""
    full = name
    if protocol_prefix(name) is None and not is_absolute(name) and not is_json(name):
        full = directory(top) + name
    found = await find_backing_image(top, full)
    if found is not None and found.driver_name == driver:
        graph.hold(found)
        return found
    try:
        opened = await open_backing(graph, top, name, driver, more)
    except ConfigError as error:
        raise error.within(f"Could not open new backing file '{name}'") from None
    own = exact_filename(top)
    if own and any(exact_filename(layer) == own for layer in layers(opened)):
        await graph.release(opened)
        raise ConfigError(f"'{name}' is backed by '{own}' itself", errno.ELOOP)
    return opened


async def _begin_with_zeroes(graph: BlockGraph, top: BlockNode, stack: AsyncExitStack) -> None:
    """Something below that reads as zeroes, so that an image without a backing file has to say where it is zero."""
    zeroes = await graph.add({"driver": "null-co", "size": top.length, "read-zeroes": True})
    await set_backing(graph, top, zeroes)
    await graph.give_up(zeroes)

    async def undo() -> None:
        if top.backing is zeroes:
            await set_backing(graph, top, None)

    stack.push_async_callback(undo)


def _reader(node: BlockNode | None, stack: AsyncExitStack) -> BlockBackend | None:
    if node is None:
        return None
    reader = Operation(
        node, "rebase", Perm.CONSISTENT_READ, Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED
    )
    stack.push_async_callback(reader.finish)
    return reader


class _Comparison:
    """What shows through an image, by the old and by the new backing file."""

    def __init__(
        self,
        work: Operation,
        old: BlockBackend | None,
        new: BlockBackend | None,
        report: Report | None,
    ) -> None:
        self._report = report
        self._pace = Pace()
        self._work = work
        self._old = old
        self._new = new
        self._is_below = new is not None and _is_below(old, new)

    async def keep(self, offset: int) -> int:
        """Give the image what would change, from `offset` on; returns where that ended."""
        top = self._work.node
        while offset < top.length:
            with _saying("error while reading image metadata", why=True):
                allocated, count = await is_allocated(top, offset, min(top.length - offset, _STEP))
            end = offset + count
            while not allocated and offset < end:
                offset += await self._keep_some(offset, end)
                await self._pass(offset)
            offset = end
            await self._pass(offset)
        return offset

    async def _pass(self, offset: int) -> None:
        if self._report is not None:
            self._report(offset, self._work.length)
        await self._pace.spent(0)

    async def _keep_some(self, offset: int, end: int) -> int:
        count = await self._same_by_status(offset, end - offset)
        if count:
            return count
        top = self._work.node
        cluster = max(top.cluster_size, top.limits.request_alignment)
        # Whole clusters of the image, but for the first and the last one.
        count = min(end, align_down(offset + max(MAX_BOUNCE, cluster), cluster)) - offset
        old, new = bytearray(count), bytearray(count)
        with _saying("error while reading from old backing file"):
            await _read(self._old, offset, old)
        with _saying("error while reading from new backing file"):
            await _read(self._new, offset, new)
        # As few requests as possible: each takes its range back from whoever uses it.
        at = start = 0
        while at < count:
            stop = min(count, align_up(offset + at + 1, cluster) - offset)
            if old[at:stop] == new[at:stop]:
                await self._take(offset + start, at - start)
                start = stop
            at = stop
        await self._take(offset + start, count - start)
        return count

    async def _take(self, offset: int, length: int) -> None:
        with _saying("Error while writing to COW image", why=True):
            await self._work.prefetch(offset, length)

    async def _same_by_status(self, offset: int, length: int) -> int:
        """For how many bytes it is known that both are the same."""
        if self._is_below:
            assert self._old is not None
            assert self._new is not None
            node, base = self._old.node, self._new.node
            # A layer in between that is shorter hides what is below.
            if offset + length <= min(self._old.length, base.length):
                allocated, count = await is_allocated_above(node, base, offset, length)
                return 0 if allocated else count
        return min(
            await _zeroes(self._old, offset, length), await _zeroes(self._new, offset, length)
        )


@contextmanager
def _saying(what: str, *, why: bool = False) -> Iterator[None]:
    """Errors say what was being done, in the words of qemu-img, and with `why` what the errno means."""
    try:
        yield
    except BlockError as error:
        number = error.errno or errno.EIO
        raise BlockError(number, f"{what}: {os.strerror(number)}" if why else what) from error


def _is_below(old: BlockBackend | None, new: BlockBackend) -> bool:
    node = old.node if old is not None else None
    while node is not None and node is not new.node:
        node = node.backing if not node.is_filter else skip_filters(node)
    return node is not None


async def _zeroes(user: BlockBackend | None, offset: int, length: int) -> int:
    """For how many bytes it is known that zeroes are there."""
    if user is None or offset >= user.length:
        return length
    status = await status_above(user.node, None, offset, min(length, user.length - offset))
    return status.length if status.flags & StatusFlag.ZERO else 0


async def _read(user: BlockBackend | None, offset: int, data: bytearray) -> None:
    """What is behind the end is zeroes."""
    length = min(len(data), user.length - offset) if user is not None else 0
    if user is not None and length > 0:
        await user.preadv(offset, IoVec([memoryview(data)[:length]]))
