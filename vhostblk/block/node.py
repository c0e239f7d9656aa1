"""What every node has: identity, edges to both sides, the state of its requests.

What a driver states is in `driver.py`; what requests go through in `pipeline.py`. Everything is in bytes. Knows nothing
about virtio, vhost-user or the engine, except that a `HostExtent` is what somebody may do without asking.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from vhostblk.block.bounce import BouncePool
from vhostblk.block.driver import BlockSizes, Driver, OpenContext
from vhostblk.block.extent import ExtentFlag, FlushTarget, HostExtent, PastWrites
from vhostblk.block.flags import Req
from vhostblk.block.lane import Decides, Lane
from vhostblk.block.limits import MAX_BOUNCING, BlockLimits
from vhostblk.block.op_blockers import OpBlockers
from vhostblk.block.options import strong_options
from vhostblk.block.quiesce import Quiescent
from vhostblk.block.registered_buf import RegisteredBuffers
from vhostblk.block.roles import Role, cow_child
from vhostblk.block.tracking import TrackedRequest

if TYPE_CHECKING:
    from vhostblk.block.dirty_bitmap import DirtyBitmap
    from vhostblk.block.edge import Edge
    from vhostblk.block.options import NodeOptions

__all__ = [
    "BlockNode",
    "BlockSizes",
    "EdgeParent",
    "ExtentFlag",
    "FlushTarget",
    "HostExtent",
    "OpenContext",
    "PastWrites",
    "Req",
    "Role",
]

log = logging.getLogger(__name__)

_WRITE_UNCHANGED = int(Req.WRITE_UNCHANGED)

BeforeWrite = Callable[[TrackedRequest], Awaitable[None]]


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

    def child_changed(self, edge: Edge) -> None:
        """The child is another node now, or has other limits."""

    subtree_quiesced: int
    buffers: RegisteredBuffers

    def child_drained_begin(self, edge: Edge) -> None:
        """Send the child nothing new until `child_drained_end`. Must not change the graph (row B26.5)."""

    async def child_drained_poll(self, edge: Edge) -> None:
        """Return when nothing is in flight to the child any more, and nobody uses its extents."""

    def child_drained_end(self, edge: Edge) -> None:
        """Undo one `child_drained_begin`."""

    def collect_writes(self, *, ranges: bool) -> None:
        """Tell the child, and everybody below, of the writes that did not go through the pipeline (`wrote_past`).

        Args:
            ranges: also where they were; that takes longer.
        """


class BlockNode(Driver, Quiescent):
    """One node of the graph; drivers derive from it, and override what `Driver` has.

    Args:
        name: unique in its graph.
        common: the options every node has.
        options: the driver's own, an instance of its `options_type`.

    Context: the control loop.
    """

    # The first is for whoever is above; the image is somebody else's for now (row B40); a driver's `Driver`; an option.
    read_only: bool = cast(bool, Decides())
    inactive: bool = cast(bool, Decides())
    has_debug_events: bool = cast(bool, Decides())
    detect_zeroes: str = cast(str, Decides())

    def __init__(self, name: str, common: NodeOptions, options: Any) -> None:
        super().__init__()
        self.node_name = name
        self.lane = Lane(self)
        self.tracker = self.lane.tracker
        self.write_log = self.lane.log
        self.before_write: list[BeforeWrite] = []  # see `add_before_write`
        self._inactive = self._detect_zeroes = self._has_debug_events = False
        self.read_only = common.read_only
        self.block_sizes = BlockSizes()
        self.children: dict[str, Edge] = {}
        self.parents: list[Edge] = []
        self.buffers = RegisteredBuffers()
        self.set_modes(common)
        self.set_options(options)
        # Where it comes from (row B07.13).
        self.given: dict[str, Any] = {}  # its own options as the user wrote them, flat
        self.is_spelled = False  # as image tools write options, and its name has them like that
        # Whose options it was written in, and what it was there; still above it (row B06.10).
        self.inherits_from: BlockNode | None = None
        self.inherits_as = Role(0)
        self.probed = False  # nobody said what format this is
        # Names of the children that the image itself asks for, by key (row B41.4).
        self.implied: dict[str, str] = {}
        self.references = 0  # users that are no parents: `BlockGraph.hold`
        # Closes the node if nobody needs it any more; for roots that leave.
        self.left_alone: Callable[[BlockNode], Awaitable[None]] | None = None
        self.op_blockers = OpBlockers()
        # A user goes on if this process is killed: what has completed must be in the hands of the kernel.
        self.is_outlived = False
        self.write_threshold = 0  # see `write_threshold.py`
        self.being_activated = False  # it may turn out that it still is: nobody new may come
        self.bounce = BouncePool()
        # State of the pipeline, besides these two.
        self.bouncing = asyncio.Semaphore(MAX_BOUNCING)
        self.bitmaps: list[DirtyBitmap] = []  # the latest one first; see `dirty_bitmap.py`
        self.plugged = 0
        # Not 0: whatever ran before us may have left writes in the page cache, so the first flush
        # must reach the disk.
        self.flushed_gen = -1
        self.flush_active = False
        self.flush_queue: list[asyncio.Future[None]] = []

    def __repr__(self) -> str:
        return f"<{self.driver_name} node '{self.node_name}'>"

    # ------------------------------------------------------------------ what every node does

    @property
    def length(self) -> int:
        """Bytes, a multiple of 512."""
        return self.lane.length

    @length.setter
    def length(self, length: int) -> None:
        self.lane.length = length

    @property
    def limits(self) -> BlockLimits:
        """What the driver takes at once."""
        return self.lane.limits

    @limits.setter
    def limits(self, limits: BlockLimits) -> None:
        self.lane.limits = limits

    def review_writes(self) -> None:
        """Something has changed that decides whether writes may pass, without being looked at."""
        self.lane.may_write = not (
            self.read_only
            or self.inactive
            or self.before_write
            or self.detect_zeroes
            or self.has_debug_events
        )

    async def add_before_write(self, hook: BeforeWrite) -> None:
        """Call `hook` with every write, zero-write and discard before it happens; it may raise BlockError to veto it.

        From when this returns on, no write goes past it.
        """
        self.before_write.append(hook)
        self.review_writes()
        await self.revoke(0, self.length)

    def remove_before_write(self, hook: BeforeWrite) -> None:
        """Undo `add_before_write`."""
        self.before_write.remove(hook)
        self.review_writes()

    def cancel_in_flight(self) -> None:
        """Make pending requests here and below fail soon, if they can (row B25.3)."""
        self.driver_cancel_in_flight()
        for edge in self.children.values():
            edge.node.cancel_in_flight()

    def plug(self) -> None:
        """More requests follow at once; every call needs an `unplug` (row B28)."""
        for edge in self.children.values():
            edge.node.plug()
        self.plugged += 1
        if self.plugged == 1:
            self.driver_plug()

    def unplug(self) -> None:
        """Undo one `plug`."""
        assert self.plugged
        self.plugged -= 1
        if not self.plugged:
            self.driver_unplug()
        for edge in self.children.values():
            edge.node.unplug()

    @property
    def backing(self) -> BlockNode | None:
        """Where what this layer does not have comes from."""
        edge = cow_child(self)
        return edge.node if edge is not None else None

    def naming_options(self) -> dict[str, Any]:
        """Its own options that are part of its name: those that decide about what it shows (row B41.2)."""
        return strong_options(self.options, self.given if self.is_spelled else {})

    def write_generation(self) -> int:
        """Grows with every write that may have reached this node, by the pipeline or past it (row B16.12)."""
        self.collect_writes(ranges=False)
        return self.write_log.generation

    def highest_offset(self) -> int:
        """The end of the write that reached furthest, by the pipeline or past it (row B24.4)."""
        self.collect_writes(ranges=False)
        return self.write_log.highest

    def collect_writes(self, *, ranges: bool) -> None:
        """Take note of what was written through extents given to somebody above; see `EdgeParent`."""
        for edge in self.parents:
            edge.parent.collect_writes(ranges=ranges)

    def wrote_past(self, writes: PastWrites) -> None:
        """Somebody above has written through extents of this node: the same bookkeeping, here and below."""
        self.write_log.wrote_past(writes)
        for edge in self.children.values():
            shift = self.child_range(edge, 0)
            # Who does not know where they were at least has something to flush.
            below = PastWrites(writes.count) if shift is None else writes.shifted(shift)
            edge.node.wrote_past(below)

    def child_range(self, edge: Edge, offset: int) -> int | None:
        """Where in the child a byte of this node is, if all of it is there in one piece, and by its extents."""
        return offset if edge.role & Role.FILTERED else None

    def mappable(self, offset: int, length: int) -> bool:
        """Whether extents may be given out for the range now."""
        return not (self.quiesced or self.inactive) and not self.tracker.serialises(
            offset, offset + length
        )

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

    def child_changed(self, edge: Edge) -> None:
        """The child is another node now, or has other limits: ours follow (row C21)."""
        self.compute_limits()
        self.child_resized(edge)

    def compute_limits(self) -> None:
        """Compute limits and flags from the children's and the driver's own, and tell whoever is above (row B12.2)."""
        limits = BlockLimits()
        if self.children:
            limits.min_mem_alignment = limits.opt_mem_alignment = 1
            for edge in self.children.values():
                limits.merge(edge.node.limits)
        self.limits = limits
        inherited = replace(limits)
        self.refresh_limits()
        self.limits.fit(inherited)
        self.limits.check()
        below, own = self.hands_on_to(), type(self)
        if below is not None:
            # Of what the child does not do itself, whoever is asked first emulates it, as in QEMU.
            child = below.node
            self.supported_write_flags = own.supported_write_flags & (
                _WRITE_UNCHANGED | child.supported_write_flags
            )
            self.supported_zero_flags = own.supported_zero_flags & (
                _WRITE_UNCHANGED | child.supported_zero_flags
            )
        for edge in tuple(self.parents):
            edge.parent.child_changed(edge)

    def set_options(self, options: Any) -> None:
        """Take over the driver's own options, when the node is made and when it is reopened."""
        self.options = options

    def set_modes(self, common: NodeOptions) -> None:
        """Take over the options that every node has; `read_only` may turn out otherwise."""
        self.common = common
        self.unmap = common.discard == "unmap"
        self.no_flush = common.cache_no_flush
        self.force_share = common.force_share
        self.detect_zeroes = "" if common.detect_zeroes == "off" else common.detect_zeroes

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
            for dirty in (*self.write_log.dirty_maps, *(bitmap.map for bitmap in self.bitmaps)):
                dirty.resize(length)
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
        """Return when what was in flight below is over; others may go on there, without end (row B26.2)."""
        for edge in tuple(self.children.values()):
            await edge.node.tracker.settle()
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
        try:
            await self.settle()
            await self.settle_below()
        except BaseException:
            self.unquiesce()
            raise

    def drained_end(self) -> None:
        """Undo one `drained_begin`."""
        self.unquiesce()
