"""`copy-before-write`: the old bytes are in another node before new ones replace them (block layer row B24.2).

Theory of operation: from when the filter is inserted, every write, zero-write and discard first has the clusters that
it touches copied to `target` (`block_copy.py`), each once. Target and child together are the node as it was then: what
is copied is in the target, the rest still in the child. `snapshot-access` reads it so. A read of the child for the
snapshot may be under way when a write to the same clusters comes and copies them: the write waits for it, too.

Where the copy fails, or takes longer than `cbw-timeout`, either the write fails (`break-guest-write`) and the snapshot
stays exact, or the write goes on and the snapshot is lost, for good (`break-snapshot`).

What is copied already may be written without asking, and everything may be read, so the engine may serve those.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from dataclasses import dataclass

from vhostblk.block import pipeline
from vhostblk.block.block_copy import (
    DONE,
    GIVEN_UP,
    BlockCopy,
    Busy,
    cluster_size_for,
    until_over,
)
from vhostblk.block.driver import OpenContext
from vhostblk.block.edge import Edge
from vhostblk.block.extent import ExtentFlag, FlushTarget, HostExtent
from vhostblk.block.filters.filter import FilterNode
from vhostblk.block.flags import Preallocation, Req, StatusFlag
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode
from vhostblk.block.options import INTEGER, SIZE, choice, option
from vhostblk.block.permissions import Perm
from vhostblk.block.roles import Role
from vhostblk.block.status import BlockStatus, status_above
from vhostblk.errors import BlockError, ConfigError

log = logging.getLogger(__name__)

_WRITE_UNCHANGED = int(Req.WRITE_UNCHANGED)


@dataclass(frozen=True, slots=True)
class CopyBeforeWriteOptions:
    """QEMU's options for copy-before-write, besides `file` and `target`."""

    on_cbw_error: str = option(
        choice("break-guest-write", "break-snapshot"),
        "break-guest-write",
        about="what is given up if the old bytes cannot be copied: the write, or the snapshot",
    )
    cbw_timeout: int = option(
        INTEGER, 0, about="seconds after which a copy counts as failed; 0: never"
    )
    min_cluster_size: int = option(
        SIZE, 0, about="bytes that are copied at least, a power of two; 0: as the target likes"
    )


class CopyBeforeWriteNode(FilterNode):
    """A `SnapshotSource`; see the module."""

    driver_name = "copy-before-write"
    options_type = CopyBeforeWriteOptions
    options: CopyBeforeWriteOptions
    child_keys = ("file", "target")
    target: Edge
    snapshot_length = 0
    _copy: BlockCopy
    _lost = False  # the snapshot is not what it was

    # ------------------------------------------------------------------ life

    async def open(self, context: OpenContext) -> None:
        """Open both children. The snapshot is of the moment when the first user comes.

        Raises:
            ConfigError: an option makes no sense, or the target is not fit to be one.
        """
        least = self.options.min_cluster_size
        if least & (least - 1):
            raise ConfigError(f"Parameter 'min-cluster-size': {least} is not a power of two")
        await super().open(context)
        self.target = await context.open_child(self, "target", Role.DATA)
        source, target = self.file.node, self.target.node
        if source in _storage_of(target) or target in _storage_of(source):
            raise ConfigError(
                f"Parameter 'target': node '{target.node_name}' has the same storage as "
                f"'{source.node_name}'"
            )
        if target.length < source.length:
            raise ConfigError(
                f"Parameter 'target': node '{target.node_name}' has {target.length} bytes, "
                f"'{source.node_name}' has {source.length}"
            )
        self._copy = BlockCopy(self.file, self.target, cluster_size_for(self.target, least))
        self._reads: list[Busy] = []  # of the child, for the snapshot
        self.snapshot_length = source.length

    def child_perm(self, edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """While there are users, nobody writes the child past us; the target may not change its length."""
        if self.inactive:
            return (Perm.NONE if edge.name == "target" else perm), Perm.ALL
        if edge.name == "target":
            # Shared with those who write what it is backed by, which may be our child.
            change = Perm.NONE if self.read_only else Perm.WRITE  # nothing will be copied
            return Perm.CONSISTENT_READ | change, Perm.ALL & ~Perm.RESIZE
        if not self.parents:
            return perm, shared
        return perm | Perm.CONSISTENT_READ, shared & ~(Perm.WRITE | Perm.RESIZE)

    async def driver_inactivate(self) -> None:
        """Whoever writes the image elsewhere copies nothing.

        Raises:
            ConfigError: there is a snapshot to lose.
        """
        if not self._lost and not self._copy.is_copied(0, self.snapshot_length):
            raise ConfigError(
                f"Node '{self.node_name}' keeps a snapshot, which would be lost elsewhere",
                errno.EBUSY,
            )

    async def driver_flush_all(self) -> bool:
        """Only the child: nobody has been promised that the snapshot survives."""
        await self.file.flush()
        return True

    # ------------------------------------------------------------------ writes

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        """When the old bytes are safe."""
        if not flags & _WRITE_UNCHANGED:
            await self._save(offset, offset + length)
        await self.file.pwritev(offset, iov, flags)

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        """When the old bytes are safe."""
        if not flags & _WRITE_UNCHANGED:
            await self._save(offset, offset + length)
        await self.file.pwrite_zeroes(offset, length, flags)

    async def driver_pdiscard(self, offset: int, length: int) -> None:
        """When the old bytes are safe."""
        await self._save(offset, offset + length)
        await self.file.pdiscard(offset, length)

    async def driver_truncate(self, length: int, preallocation: Preallocation) -> None:
        """When what is cut off is safe."""
        if length < self.length:
            await self._save(length, self.length)
        await self.file.truncate(length, preallocation)

    async def _save(self, start: int, end: int) -> None:
        """Have the range copied, and nobody reading it from the child.

        Raises:
            BlockError: it cannot be copied, and the write is what fails then.
        """
        if self._lost:
            return
        if not self._copy.is_copied(start, end):
            try:
                if self.options.cbw_timeout:
                    await self._copy_in_time(start, end)
                else:
                    await self._copy.copy(start, end)
            except BlockError as error:
                if self.options.on_cbw_error == "break-guest-write" and not self._lost:
                    raise
                self._lose(str(error))
                return
        if self._reads:
            size = self._copy.cluster_size
            await until_over(self._reads, start // size * size, -(-end // size) * size)

    def child_resized(self, edge: Edge) -> None:
        """What is cut off behind our back cannot be kept: what comes in its place some day is not what was there."""
        super().child_resized(edge)
        length, kept = edge.node.length, self.snapshot_length
        if edge.role & Role.FILTERED and length < kept and not self._copy.is_copied(length, kept):
            self._lose(f"'{edge.node.node_name}' has become {length} bytes long")

    def _lose(self, why: str) -> None:
        if not self._lost:
            self._lost = True
            log.error("node '%s': the snapshot is lost: %s", self.node_name, why)

    async def _copy_in_time(self, start: int, end: int) -> None:
        """The same, but for so long only; a run that was begun is finished later."""
        in_time = True

        async def copy() -> None:
            try:
                await self._copy.copy(start, end, lambda: in_time)
            finally:
                self.leave()

        self.in_flight += 1
        task = asyncio.create_task(copy())
        task.add_done_callback(_look_at)
        try:
            done, _ = await asyncio.wait({task}, timeout=self.options.cbw_timeout)
        finally:
            in_time = task.done()
        if not done:
            raise BlockError(
                errno.ETIMEDOUT,
                f"{self.node_name}: copy takes more than {self.options.cbw_timeout} s",
            )
        await task

    # ------------------------------------------------------------------ the snapshot

    async def snapshot_preadv(self, offset: int, iov: IoVec) -> None:
        """See `SnapshotSource`."""
        done = 0
        while done < iov.length:
            at = offset + done
            edge, end = self._place(at, offset + iov.length)
            part = iov.slice(done, end - at)
            if edge is self.target:
                await edge.preadv(at, part)
            else:
                read = Busy(at, end)
                self._reads.append(read)
                try:
                    await edge.preadv(at, part)
                finally:
                    self._reads.remove(read)
                    read.over.set()
            done += part.length
        self._check_kept()

    async def snapshot_block_status(self, offset: int, length: int) -> BlockStatus:
        """See `SnapshotSource`."""
        edge, end = self._place(offset, offset + length)
        status = await status_above(edge.node, None, offset, end - offset)
        self._check_kept()
        flag = StatusFlag.ZERO if status.flags & StatusFlag.ZERO else StatusFlag.DATA
        return BlockStatus(flag, status.length or end - offset)

    async def snapshot_pdiscard(self, offset: int, length: int) -> None:
        """See `SnapshotSource`."""
        self._check_kept()
        await self._copy.give_up(offset, offset + length)

    def _place(self, offset: int, end: int) -> tuple[Edge, int]:
        """Who has the old bytes at `offset` now, and up to where."""
        self._check_kept()
        state, end = self._copy.run(offset, end)
        if state == GIVEN_UP:
            raise BlockError(errno.EACCES, f"{self.node_name}: given up by a discard: {offset}")
        return (self.target if state == DONE else self.file), end

    def _check_kept(self) -> None:
        if self._lost:
            raise BlockError(errno.EACCES, f"{self.node_name}: the snapshot is lost")

    # ------------------------------------------------------------------ extents

    async def host_extent(self, offset: int, length: int) -> HostExtent | None:
        """The child's; only what is copied, and not being read for the snapshot, may be written."""
        extent = await pipeline.host_extent(self.file.node, offset, length)
        if extent is None or self._lost or not extent.flags & ExtentFlag.WRITE:
            return extent
        copied, start, end = self._copy.copied_run(offset)
        if not copied or self._reads:
            extent = extent.without(ExtentFlag.WRITE)
        return extent.cut(start, end)

    def flush_target(self) -> int | FlushTarget:
        """The child's: a flush is of nothing else."""
        return pipeline.flush_target(self.file.node)

    async def child_revoke(self, edge: Edge, offset: int, length: int) -> None:
        """Nobody above has extents of the target."""
        if edge is self.file:
            await super().child_revoke(edge, offset, length)

    async def child_revoke_flush(self, edge: Edge) -> None:
        """Nobody above flushes the target."""
        if edge is self.file:
            await super().child_revoke_flush(edge)


def _storage_of(node: BlockNode) -> set[BlockNode]:
    """A node and what its own bytes are in; not what it is backed by."""
    edges = [edge for edge in node.children.values() if not edge.role & Role.COW]
    return {node}.union(*(_storage_of(edge.node) for edge in edges))


def _look_at(task: asyncio.Task[None]) -> None:
    """Nobody may be left to hear of a failure: the write has failed already, or the snapshot is lost."""
    if not task.cancelled():
        task.exception()
