"""The root edge: a node as its user outside the graph sees it (block layer rows B08.9 and B19.15).

An export, and later a job, owns a `BlockBackend`. It holds the permissions, decides about the write
cache (lower layers are always write-back), refuses what lies outside the disk, and keeps requests
waiting while the graph is drained.

Knows nothing about virtio or vhost-user.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from vhostblk.block import clear, pipeline
from vhostblk.block.driver import Driver
from vhostblk.block.eager import DONE, Request
from vhostblk.block.edge import Edge
from vhostblk.block.extent_user import ExtentUser, TakeWrites
from vhostblk.block.flags import Preallocation
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import BlockLimits
from vhostblk.block.no_medium import NoMediumNode
from vhostblk.block.node import BlockNode, BlockSizes, Req, Role
from vhostblk.block.permissions import Perm, of_user, parents_first
from vhostblk.block.pipeline import preadv, pwritev
from vhostblk.block.quiesce import drained, wake
from vhostblk.block.registered_buf import RegisteredBuffers, register, unregister
from vhostblk.block.transaction import GraphTransaction
from vhostblk.errors import BlockError

log = logging.getLogger(__name__)

Revoke = Callable[[int, int], Awaitable[None]]
RevokeFlush = Callable[[], Awaitable[None]]

_FUA = int(Req.FUA)
_MAY_UNMAP = int(Req.MAY_UNMAP)


class BlockBackend(ExtentUser):
    """One user's view of a node.

    Args:
        name: who uses it, for messages (`export 'disk0'`).
        writable: ask for the write permission.
        write_cache: False makes every write durable when it completes.
        resize: ask for the resize permission too.
        shared: what other users may do meanwhile.

    Raises: ConfigError: the permissions are not to be had: the node is read-only, or another user
        or process excludes this.

    Context: the control loop.
    Owns: its edge, and with it the permissions and file locks, until `close()`.
    """

    def __init__(
        self,
        node: BlockNode,
        name: str,
        *,
        writable: bool,
        write_cache: bool = True,
        resize: bool = False,
        shared: Perm = Perm.CONSISTENT_READ | Perm.WRITE_UNCHANGED,
    ) -> None:
        super().__init__()
        self._is_outlived = False
        self._use(node)
        self.name = name
        self.writable = writable
        self.write_cache = write_cache
        self.buffers = RegisteredBuffers()
        self.revocations = 0  # how often extents were taken back
        self._queued: list[asyncio.Future[None]] = []
        self._revoke: Revoke | None = None
        self._revoke_flush: RevokeFlush | None = None
        self._resized: Callable[[int], None] | None = None
        self._take_writes: TakeWrites | None = None
        wanted = of_user(writable, resize), shared
        # Of an image that is somebody else's for now there is nothing to be had: later (row B40.3).
        perm, shared = (Perm.NONE, Perm.ALL) if node.inactive else wanted
        self._edge = Edge(self, node, "root", Role.FILTERED | Role.PRIMARY, perm, shared)
        self._edge.suspended = wanted if node.inactive else None
        self._edge.attach()
        self._closed = False

    def _use(self, node: BlockNode) -> None:
        self.node = node
        self._lane = node.lane
        self._mark_outlived()
        self.may_map = type(node).host_extent is not Driver.host_extent
        """Whether there can be extents at all: nothing that wants to see every request is on top."""
        self.prepares_writes = node.prepares_writes
        """Whether `prepare_writes` may find more than `extents`."""

    # ------------------------------------------------------------------ what it is

    @property
    def root(self) -> Edge:
        """Its edge, for whoever moves it."""
        return self._edge

    @property
    def length(self) -> int:
        """Bytes, a multiple of 512."""
        return self.node.length

    @property
    def limits(self) -> BlockLimits:
        """What one request may be; larger ones are split, so this is advice."""
        return self.node.limits

    @property
    def block_sizes(self) -> BlockSizes:
        """What the disk reports of itself."""
        return self.node.block_sizes

    @property
    def can_discard(self) -> bool:
        """Whether a discard reaches the storage: `discard=unmap`, a driver that can, and writable."""
        return self.writable and self.node.unmap and self.node.can_discard()

    def attach(
        self,
        *,
        revoke: Revoke | None = None,
        revoke_flush: RevokeFlush | None = None,
        resized: Callable[[int], None] | None = None,
        take_writes: TakeWrites | None = None,
    ) -> None:
        """Say who is to be told.

        Args: revoke: awaited with (offset, length) before the graph does something that extents
            would not see; when it returns, nobody uses an extent that touches the range.
            revoke_flush: awaited before the graph flushes `flush_target()` itself; when it returns,
            nobody else does, and `flush_failed` was called if somebody's flush has failed. resized:
            called with the new length. take_writes: what was written through extents since this was
            last called, with True also where. Without it a flush after such writes might be skipped,
            and nothing is writable that has to be recorded.
        """
        self._revoke = revoke
        self._revoke_flush = revoke_flush
        self._resized = resized
        self._take_writes = take_writes

    async def ask(self, *, writable: bool, resize: bool = False) -> None:
        """Ask for other permissions than were given so far.

        Raises:
            ConfigError: they are not to be had; nothing has changed.
        """
        async with AsyncExitStack() as stack:
            if self.writable and not writable:
                # Extents that allow writing come back.
                await stack.enter_async_context(drained(self.node))
            with GraphTransaction() as change:
                change.ask(self._edge, of_user(writable, resize), self._edge.shared)
            self.writable = writable

    # ------------------------------------------------------------------ requests

    async def preadv(self, offset: int, iov: IoVec) -> None:
        """Read `iov` full.

        Raises:
            BlockError: EIO outside the disk, else the driver's errno.
        """
        await self.begin_preadv(offset, iov)

    async def pwritev(self, offset: int, iov: IoVec, flags: int = 0) -> None:
        """Write `iov`; durable when this returns if `flags` has `Req.FUA` or there is no write cache.

        Raises:
            BlockError: EIO outside the disk, EPERM if not writable, else the driver's errno.
        """
        await self.begin_pwritev(offset, iov, flags)

    def begin_preadv(self, offset: int, iov: IoVec, has_waited: bool = False) -> Request:
        """`preadv` without a coroutine if it need not wait, see `eager.py`: await at once what this gives.

        Args:
            has_waited: for `resumed` already.
        """
        if self.quiesced and not has_waited:
            return self._begin_later(self.begin_preadv, offset, iov)
        request = preadv(self._lane, offset, iov, 0, self)
        return request if request is DONE else self._counted(request)

    def begin_pwritev(
        self, offset: int, iov: IoVec, flags: int = 0, has_waited: bool = False
    ) -> Request:
        """The same of `pwritev`."""
        if self.quiesced and not has_waited:
            return self._begin_later(self.begin_pwritev, offset, iov, flags)
        if not self.writable:
            self.check_write(offset, iov.length)
        if not self.write_cache:
            flags |= _FUA
        request = pwritev(self._lane, offset, iov, flags, self)
        return request if request is DONE else self._counted(request)

    async def _begin_later(self, begin: Callable[..., Request], *arguments: Any) -> None:
        await self.resumed()
        await begin(*arguments, has_waited=True)

    async def _counted(self, request: Request) -> None:
        self.in_flight += 1
        try:
            await request
        finally:
            self.leave()

    async def pwrite_zeroes(
        self, offset: int, length: int, may_unmap: bool = False, flags: int = 0
    ) -> None:
        """Make a range read as zeroes; durable as with `pwritev`.

        Args:
            may_unmap: the range may lose its allocation (only with `discard=unmap`).

        Raises:
            BlockError: as `pwritev`.
        """
        if self.quiesced:
            await self.resumed()
        self.check_write(offset, length)
        if may_unmap:
            flags |= _MAY_UNMAP
        if not self.write_cache:
            flags |= _FUA
        await self._counted(clear.pwrite_zeroes(self.node, offset, length, flags))

    async def pdiscard(self, offset: int, length: int) -> None:
        """The range is not needed any more; does nothing unless the node has `discard=unmap`.

        Raises:
            BlockError: as `pwritev`.
        """
        if self.quiesced:
            await self.resumed()
        self.check_write(offset, length)
        await self._counted(clear.pdiscard(self.node, offset, length))

    async def flush(self) -> None:
        """Make durable every write that has completed before this call, also through extents.

        Raises:
            BlockError: the driver's errno.
        """
        if self.quiesced:
            await self.resumed()
        await self._counted(pipeline.flush(self.node))

    async def truncate(self, length: int, preallocation: Preallocation = Preallocation.OFF) -> None:
        """Change the length; needs the resize permission.

        Raises:
            BlockError: as `pipeline.truncate`.
        """
        if self.quiesced:
            await self.resumed()
        await self._counted(self._edge.truncate(length, preallocation))

    def plug(self) -> None:
        """More requests follow at once: call `unplug` when they have begun, before anything else runs (row B28)."""
        self.node.plug()

    def unplug(self) -> None:
        """Undo `plug`: what was kept back is submitted."""
        self.node.unplug()

    # ------------------------------------------------------------------ memory

    def register_buf(self, host: int, size: int) -> None:
        """Announce memory that requests come from: address in this process and bytes."""
        if self.buffers.add(host, size):
            register(self.node, host, size)

    def unregister_buf(self, host: int) -> None:
        """Undo `register_buf`."""
        if self.buffers.remove(host) and self._edge in self.node.parents:
            unregister(self.node, host)

    # ------------------------------------------------------------------ life

    async def drain(self) -> None:
        """Return when nothing is in flight, in the node and below; requests that come meanwhile wait."""
        await self.node.drained_begin()
        self.node.drained_end()

    async def settle(self) -> None:
        """Return when none of our requests is in flight; those that come meanwhile wait, other users go on."""
        self.child_drained_begin(self._edge)
        try:
            await self.child_drained_poll(self._edge)
        finally:
            self.child_drained_end(self._edge)

    async def close(self) -> bool:
        """Drain, flush, and give up the permissions; errors of the flush are logged. Idempotent.

        Whoever was cancelled calls it again: it goes on where it was.

        Returns:
            False if this call's flush failed.
        """
        if self._closed:
            return True
        self._closed = True
        is_durable = True
        try:
            if self._edge in self.node.parents:
                is_durable = await self._leave_disk()
            if self.node.left_alone is not None:
                await self.node.left_alone(self.node)
        except BaseException:
            self._closed = False
            raise
        return is_durable

    async def _leave_disk(self) -> bool:
        is_durable = True
        try:
            await self.drain()
            if self.writable and not isinstance(self.node, NoMediumNode):
                await pipeline.flush(self.node)
        except BlockError as error:
            # Whoever wrote has heard of it; QEMU's tools say no more, the driver does.
            log.error(
                "%s: flush at close failed: %s",
                *(self.name, error),
                extra={"qemu_says": None},
            )
            is_durable = False
        self._edge.detach()
        self.attach()
        return is_durable

    # ------------------------------------------------------------------ what the edge calls (EdgeParent)

    def describe_use(self, edge: Edge) -> str:
        """Who uses the node."""
        return self.name

    async def child_revoke(self, edge: Edge, offset: int, length: int) -> None:
        """Nobody uses an extent in this range once this returns."""
        self.revocations += 1
        if self._revoke is not None:
            await self._revoke(offset, length)
            if offset == 0 and length >= self.node.length:
                # Before the graph changes: it is the nodes that are below now that were written.
                self.collect_writes(ranges=True)

    async def child_revoke_flush(self, edge: Edge) -> None:
        """Nobody else flushes the node's file once this returns."""
        if self._revoke_flush is not None:
            await self._revoke_flush()

    async def be_outlived(self) -> None:
        """The guest goes on if this process is killed: from now on, what has completed is in the hands of the kernel.

        What nodes know and the kernel does not would be gone; so they tell it before they answer, and now. The disk is
        not flushed: files whose flush has failed, or takes long, are none the worse for being tracked.

        Raises:
            BlockError: what they know already cannot be written.
        """
        self._is_outlived = True
        self._mark_outlived()
        for node in parents_first([self.node]):
            await node.driver_flush_to_os()

    def _mark_outlived(self) -> None:
        if self._is_outlived:
            for node in parents_first([self.node]):
                node.is_outlived = True

    def child_resized(self, edge: Edge) -> None:
        """The node's length has changed."""
        if self._resized is not None:
            self._resized(self.node.length)

    def child_changed(self, edge: Edge) -> None:
        """The graph was rebuilt below us: requests go to another node from here on."""
        before = self.node.length
        self._use(edge.node)
        if edge.node.length != before:
            self.child_resized(edge)

    def child_drained_begin(self, edge: Edge) -> None:
        """Hold new requests."""
        self.quiesced += 1

    async def child_drained_poll(self, edge: Edge) -> None:
        """Take back all extents, wait for what runs."""
        await self.child_revoke(edge, 0, self.node.length)
        await self.idle()

    def child_drained_end(self, edge: Edge) -> None:
        """Let requests go on."""
        self.quiesced -= 1
        if not self.quiesced:
            queued, self._queued = self._queued, []
            wake(queued)

    # ------------------------------------------------------------------

    async def resumed(self) -> None:
        """Return when no drain holds requests."""
        while self.quiesced:
            waiter = asyncio.get_running_loop().create_future()
            self._queued.append(waiter)
            await waiter

    def check_write(self, offset: int, length: int) -> None:
        """Whether there is such a place on the disk, and it may be written to.

        Raises:
            BlockError: EIO, EPERM.
        """
        self.check_read(offset, length)
        self.check_writable()

    def check_read(self, offset: int, length: int) -> None:
        """Whether there is such a place on the disk.

        Raises:
            BlockError: EIO.
        """
        # Row B14.1 leaves the end of the disk to the guest-facing layer.
        if offset < 0 or length < 0 or offset > self.node.length - length:
            raise BlockError(
                errno.EIO, f"{self.name}: {length} bytes at {offset} are outside the disk"
            )

    def check_writable(self) -> None:
        """Whoever writes asked for it.

        Raises:
            BlockError: EPERM: it did not.
        """
        if not self.writable:
            raise BlockError(errno.EPERM, f"{self.name}: not writable")
