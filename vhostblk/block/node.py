"""The contract of a block node: what a driver states, and what every node has.

A driver states what it can do, for requests that are already checked, tracked, aligned and cut to
its limits; only `pipeline.py` calls its `driver_*` methods. A method that a *filter* leaves out
passes through to its filtered child, one that any other driver leaves out fails with ENOTSUP and is
emulated by the pipeline (block layer rows B03.6 and B03.9).

Everything is in bytes. Knows nothing about virtio, vhost-user or the engine, except that a
`HostExtent` is what somebody may do without asking.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from vhostblk.block.bounce import BouncePool
from vhostblk.block.extent import ExtentFlag, FlushTarget, HostExtent
from vhostblk.block.limits import MAX_BOUNCING, SECTOR_SIZE, BlockLimits
from vhostblk.block.op_blockers import OpBlockers
from vhostblk.block.permissions import Perm
from vhostblk.block.quiesce import Quiescent
from vhostblk.block.roles import Role, default_child_permissions
from vhostblk.block.tracking import RequestTracker
from vhostblk.errors import BlockError

if TYPE_CHECKING:
    from vhostblk.block.edge import Edge
    from vhostblk.block.host_io import HostIO
    from vhostblk.block.iov import IoVec
    from vhostblk.block.options import NodeOptions

__all__ = [
    "BlockNode",
    "BlockSizes",
    "EdgeParent",
    "ExtentFlag",
    "FlushTarget",
    "HostExtent",
    "OpenContext",
    "Req",
    "Role",
]

log = logging.getLogger(__name__)


class Req(enum.IntFlag):
    """Request flags (row B02). APIs take plain integers: the arithmetic of IntFlag is slow."""

    NONE = 0
    COPY_ON_READ = 0x001
    ZERO_WRITE = 0x002
    MAY_UNMAP = 0x004
    REGISTERED_BUF = 0x008
    FUA = 0x010
    WRITE_COMPRESSED = 0x020
    WRITE_UNCHANGED = 0x040
    SERIALISING = 0x080
    NO_FALLBACK = 0x100
    PREFETCH = 0x200
    NO_WAIT = 0x400
    MASK = 0x7FF


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """Sizes a disk reports to its user, in bytes (row B31.7); 0 means unknown.

    Attributes:
        logical: smallest unit of a request; at least 512.
        physical: smallest unit the storage writes without read-modify-write.
        min_io, opt_io: preferred sizes of small and of streaming requests.
    """

    logical: int = SECTOR_SIZE
    physical: int = SECTOR_SIZE
    min_io: int = 0
    opt_io: int = 0


class EdgeParent(Protocol):
    """Whoever stands above an edge: a node, or the root (a `BlockBackend`)."""

    def describe_use(self, edge: Edge) -> str:
        """Who uses the child and as what, for messages."""

    async def child_revoke(self, edge: Edge, offset: int, length: int) -> None:
        """Nobody above may touch this range of the child on their own once this returns."""

    async def child_revoke_flush(self, edge: Edge) -> None:
        """Nobody above flushes the child's file on their own once this returns."""

    def child_resized(self, edge: Edge) -> None:
        """The child's length has changed."""

    subtree_quiesced: int

    def child_drained_begin(self, edge: Edge) -> None:
        """Send the child nothing new until `child_drained_end`. Must not change the graph (row B26.5)."""

    async def child_drained_poll(self, edge: Edge) -> None:
        """Return when nothing is in flight to the child any more, and nobody uses its extents."""

    def child_drained_end(self, edge: Edge) -> None:
        """Undo one `child_drained_begin`."""

    def external_writes(self) -> int:
        """Completed writes into the child that did not go through the pipeline; only grows."""


class OpenContext(Protocol):
    """What a node may ask of its graph while it opens."""

    bounce: BouncePool

    async def open_child(self, parent: BlockNode, key: str, role: Role) -> Edge:
        """Open or find the child that the options give under `key` (row B05.11)."""

    def host_io(self, aio: str | None) -> HostIO:
        """The file I/O of this kind ("io_uring", "threads", None: the best there is)."""


class BlockNode(Quiescent):
    """One node of the graph; drivers derive from it.

    Args:
        name: unique in its graph.
        common: the options every node has.
        options: the driver's own, an instance of its `options_type`.

    Context: the control loop.
    """

    driver_name: ClassVar[str]
    # A frozen dataclass made of `options.option()` fields.
    options_type: ClassVar[type[Any]]
    is_filter: ClassVar[bool] = False
    # At the bottom of a graph: reaches storage by itself. The others are formats and filters.
    is_protocol: ClassVar[bool] = False
    # `name:rest` is a file name for this driver; None: it can only be made from options.
    protocol_name: ClassVar[str | None] = None
    # Options that name or describe a child (`file=...` or `file.*`).
    child_keys: ClassVar[tuple[str, ...]] = ()
    # Flags the driver obeys itself; the pipeline emulates the others (rows B19.12 and B17.10).
    supported_write_flags: int = 0
    supported_zero_flags: int = 0

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        """The options that a file name stands for (row B04.6)."""
        return {"filename": filename.removeprefix(f"{cls.protocol_name}:")}

    @classmethod
    def probe(cls, header: bytes, filename: str) -> int:
        """How sure it is that content which begins like this is in this format; 0: it is not (row B04.9)."""
        return 0

    @classmethod
    def probe_device(cls, filename: str) -> int:
        """How sure it is that this is the name of a device for this protocol driver; 0: it is not (row B04.7)."""
        return 0

    def __init__(self, name: str, common: NodeOptions, options: Any) -> None:
        super().__init__()
        self.node_name = name
        self.common = common
        self.options = options
        self.read_only = common.read_only
        self.unmap = common.discard == "unmap"
        self.no_flush = common.cache_no_flush
        self.force_share = common.force_share
        self.length = 0  # bytes, a multiple of 512
        self.limits = BlockLimits()
        self.block_sizes = BlockSizes()
        self.children: dict[str, Edge] = {}
        self.parents: list[Edge] = []
        # Where it comes from (row B07.13).
        self.given: dict[str, Any] = {}  # its own options as the user wrote them, flat
        self.inherits_from: BlockNode | None = None  # the parent whose options it was written in
        self.probed = False  # nobody said what format this is
        self.references = 0  # users that are no parents: `BlockGraph.hold`
        self.op_blockers = OpBlockers()
        self.inactive = False  # the image is somebody else's for now (row B40)
        self.bounce = BouncePool()
        # State of the pipeline.
        self.tracker = RequestTracker()
        self.bouncing = asyncio.Semaphore(MAX_BOUNCING)
        self.write_gen = 0
        # Not 0: whatever ran before us may have left writes in the page cache, so the first flush
        # must reach the disk.
        self.flushed_gen = -1
        self.flush_active = False
        self.flush_queue: list[asyncio.Future[None]] = []

    def __repr__(self) -> str:
        return f"<{self.driver_name} node '{self.node_name}'>"

    # ------------------------------------------------------------------ what a driver states

    async def open(self, context: OpenContext) -> None:
        """Open files and children, set `length` (and `read_only`, if it turned out so).

        Raises: ConfigError: one line that names the option or the file. What was opened before is
            closed by `close()`.
        """

    async def close(self) -> None:
        """Release everything; must work after a failed `open()` too. Children are closed by the graph."""

    async def refresh_length(self) -> None:
        """Set `length` to what it is now; by default what the children, which look first, make of it."""
        for edge in tuple(self.children.values()):
            await edge.node.refresh_length()

    def refresh_limits(self) -> None:
        """Adjust `limits`, which are merged from the children already (row B12.2)."""

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        """Fill `iov` with the bytes at `offset`; all of them or BlockError."""
        await self._filtered().preadv(offset, iov)

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        """Write `iov` at `offset`. `flags` are within `supported_write_flags`."""
        await self._filtered().pwritev(offset, iov, flags)

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        """Make the range read as zeroes, cheaply; ENOTSUP makes the pipeline write them (row B17.11)."""
        await self._filtered().pwrite_zeroes(offset, length, flags)

    async def driver_pdiscard(self, offset: int, length: int) -> None:
        """The range is not needed any more; ENOTSUP is no error (row B18.2)."""
        await self._filtered().pdiscard(offset, length)

    async def driver_flush_to_os(self) -> None:
        """Hand what this process caches to the host: it survives our crash (row B19.9)."""

    async def driver_flush_to_disk(self) -> None:
        """Make what the host has durable: it survives a power cut. Children are flushed by the pipeline."""

    async def driver_truncate(self, length: int) -> None:
        """Change the length; what is new reads as zeroes."""
        await self._filtered().truncate(length)

    async def driver_cut_padding(self, end: int) -> None:
        """A padded write has reached past `end`, the end of the node: undo that, where it shows (a file has grown)."""

    def driver_drain_begin(self) -> None:
        """A drain begins: release requests that wait here, start none of your own; those count in `in_flight`."""

    def driver_drain_end(self) -> None:
        """The last drain has ended."""

    def can_discard(self) -> bool:
        """Whether a discard has an effect; what the export offers to the guest."""
        return self.is_filter and self._filtered().node.can_discard()

    async def host_extent(self, offset: int, length: int) -> HostExtent | None:
        """The largest extent around `offset` that may be used without asking, or None.

        Called through `pipeline.host_extent()`, which knows about drains and serialising requests.
        A filter that wants to see requests returns None.
        """
        return None

    def flush_target(self) -> int | FlushTarget:
        """The one file whose fdatasync is a complete flush of this node, or why there is none."""
        return FlushTarget.ASK

    def flush_failed(self, error: int) -> None:
        """Somebody's fdatasync of `flush_target()` failed with this errno."""
        for edge in self.children.values():
            edge.node.flush_failed(error)

    def register_buf(self, host: int, size: int) -> None:
        """Memory that requests will come from: address in this process and bytes (row B13.3)."""
        for edge in self.children.values():
            edge.node.register_buf(host, size)

    def unregister_buf(self, host: int) -> None:
        """Undo `register_buf` of this address."""
        for edge in self.children.values():
            edge.node.unregister_buf(host)

    def child_perm(self, edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """What this node needs of a child, and shares, when its parents ask for this (row B09.5)."""
        return default_child_permissions(
            edge.role,
            perm,
            shared,
            writable=not self.read_only and not self.inactive,
            inactive=self.inactive,
        )

    def check_perm(self, perm: Perm, shared: Perm) -> None:
        """Take what the change needs, locks for instance; raises ConfigError (row B09.4)."""

    def set_perm(self, perm: Perm, shared: Perm) -> None:
        """The change was made: give back what is not needed any more."""

    def abort_perm(self) -> None:
        """The change was not made."""

    # ------------------------------------------------------------------ what every node does

    def _filtered(self) -> Edge:
        """The child of a filter; ENOTSUP for everybody else."""
        if self.is_filter:
            for edge in self.children.values():
                if edge.role & Role.FILTERED:
                    return edge
        raise BlockError(errno.ENOTSUP, f"{self.driver_name}: operation not supported")

    def write_generation(self) -> int:
        """Grows with every write that may have reached this node, by the pipeline or past it (row B16.12)."""
        return self.write_gen + self.external_writes()

    def external_writes(self) -> int:
        """Writes that went past the pipeline of this node, through an extent given to somebody above."""
        total = 0
        for edge in self.parents:
            total += edge.parent.external_writes()
        return total

    def fold_external_writes(self, writes: int) -> None:
        """Keep counting the external writes of a parent that goes away."""
        self.write_gen += writes
        for edge in self.children.values():
            edge.node.fold_external_writes(writes)

    def mappable(self, offset: int, length: int) -> bool:
        """Whether extents may be given out for the range now."""
        return not self.quiesced and not self.tracker.serialises(offset, offset + length)

    async def revoke(self, offset: int, length: int) -> None:
        """Take back every extent that touches the range; nobody uses one once this returns."""
        for edge in tuple(self.parents):
            await edge.parent.child_revoke(edge, offset, length)

    async def revoke_flush(self) -> None:
        """Take back the right to flush `flush_target()`; nobody does once this returns, and failures are known."""
        for edge in tuple(self.parents):
            await edge.parent.child_revoke_flush(edge)

    def describe_use(self, edge: Edge) -> str:
        """Who uses the child and as what, for messages."""
        return f"node '{self.node_name}' as '{edge.name}'"

    async def child_revoke(self, edge: Edge, offset: int, length: int) -> None:
        """A child takes back a range. Filters have the same offsets; anybody else must know better, or lose all."""
        if edge.role & Role.FILTERED:
            await self.revoke(offset, length)
        else:
            await self.revoke(0, self.length)

    async def child_revoke_flush(self, edge: Edge) -> None:
        """A child flushes by itself now, so nobody above may."""
        await self.revoke_flush()

    def child_resized(self, edge: Edge) -> None:
        """A child's length changed: a filter is as long as its child."""
        if edge.role & Role.FILTERED:
            self.set_length(edge.node.length)

    def child_drained_begin(self, edge: Edge) -> None:
        """A child is being drained, so this node is."""
        self.quiesce()

    async def child_drained_poll(self, edge: Edge) -> None:
        """Wait for what is in flight here, and above."""
        await self.settle()

    def child_drained_end(self, edge: Edge) -> None:
        """Undo one `child_drained_begin`."""
        self.unquiesce()

    def set_length(self, length: int) -> None:
        """Change `length` and tell whoever is above."""
        if length != self.length:
            self.length = length
            for edge in tuple(self.parents):
                edge.parent.child_resized(edge)

    def quiesce(self) -> None:
        """Begin a drain: whoever is above sends nothing new; what is in flight goes on (`settle`)."""
        self.quiesced += 1
        for edge in tuple(self.parents):
            edge.parent.child_drained_begin(edge)
        if self.quiesced == 1:
            self.driver_drain_begin()

    async def settle(self) -> None:
        """Return when nothing is in flight, here and above; whoever calls has quiesced the node."""
        for edge in tuple(self.parents):
            await edge.parent.child_drained_poll(edge)
        await self.idle()

    async def settle_below(self) -> None:
        """Return when what was in flight below is over; others may go on there (row B26.2)."""
        for edge in tuple(self.children.values()):
            await edge.node.idle_moment()
            await edge.node.settle_below()

    def unquiesce(self) -> None:
        """Undo one `quiesce`."""
        assert self.quiesced
        self.quiesced -= 1
        if not self.quiesced:
            self.driver_drain_end()
        for edge in tuple(self.parents):
            edge.parent.child_drained_end(edge)

    async def drained_begin(self) -> None:
        """Quiesce: nobody sends anything new, extents are back, nothing is in flight when this returns (row B26)."""
        self.quiesce()
        await self.settle()
        await self.settle_below()

    def drained_end(self) -> None:
        """Undo one `drained_begin`."""
        self.unquiesce()
