"""The contract of a block driver: what it states, for requests that others have checked.

Requests that come to the `driver_*` methods are checked, tracked, aligned and cut to `limits`; only the pipeline
calls them. A method that a *filter* leaves out passes through to its filtered child, one that any other driver leaves
out fails with ENOTSUP and is emulated by the pipeline (block layer rows B03.6 and B03.9). A filter that leaves out
`host_extent` sees every request. What a driver does besides requests counts in `in_flight`.

`image_driver.py` has what a driver can do with an image as a whole, `node.py` what every node has. Everything is in
bytes. Knows nothing about virtio, vhost-user or the engine.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from vhostblk.block.bounce import BouncePool
from vhostblk.block.eager import Request
from vhostblk.block.extent import FlushTarget, HostExtent, Ranges, Writer
from vhostblk.block.flags import Preallocation, StatusFlag
from vhostblk.block.host_needs import HostNeeds
from vhostblk.block.image_driver import ImageDriver
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.limits import SECTOR_SIZE, BlockLimits
from vhostblk.block.permissions import Perm
from vhostblk.block.roles import Role, default_child_permissions, filtered_child
from vhostblk.block.status import BlockStatus, StatusRuns
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.crypto.secret import Secrets
    from vhostblk.block.edge import Edge
    from vhostblk.block.host_io import HostIO
    from vhostblk.block.iov import IoVec
    from vhostblk.block.node import BlockNode
    from vhostblk.block.registry import DriverRegistry
    from vhostblk.block.reopen import Reopen
    from vhostblk.block.throttle_group import ThrottleGroup


@lean_dataclass(frozen=True, slots=True)
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


_FILTERED = int(Role.FILTERED)
_and = int.__and__  # that of IntFlag makes an object


@lean_dataclass(frozen=True, slots=True)
class NodeInfo:
    """Facts about an image (row B41.1).

    Attributes: cluster_size: bytes in which it allocates; 0: none. subcluster_size: the same, where parts of a cluster
        can be. vm_state_offset: where a guest's state would be saved. is_dirty: it was not closed properly.
        needs_compressed_writes: it can be written compressed only.
    """

    cluster_size: int = 0
    subcluster_size: int = 0
    vm_state_offset: int = 0
    is_dirty: bool = False
    needs_compressed_writes: bool = False


class OpenContext(Protocol):
    """What a node may ask of its graph while it opens."""

    bounce: BouncePool
    drivers: DriverRegistry
    secrets: Secrets
    serves_guests: bool

    async def open_child(self, parent: BlockNode, key: str, role: Role) -> Edge:
        """Open or find the child that the options give under `key` (row B05.11)."""

    async def open_optional_child(self, parent: BlockNode, key: str, role: Role) -> Edge | None:
        """The same, where there may be none."""

    async def open_implied(
        self, parent: BlockNode, key: str, role: Role, name: str, driver: str = ""
    ) -> Edge | None:
        """The same, where an image names the child (and its driver) that it has if the options do not (row B32.1)."""

    def host_io(self, aio: str | None) -> HostIO:
        """The file I/O of this kind ("io_uring", "threads", None: the best there is)."""

    def find_node(self, name: str) -> BlockNode:
        """The node of this name, or ConfigError."""

    def throttle_group(self, name: str) -> ThrottleGroup:
        """The object of this id, or ConfigError."""


class Driver(ImageDriver):
    """What drivers and filters override; derive from `BlockNode`, which has the rest.

    Methods that make requests may be `async def ... -> None`, whatever the type says: `Request` is what such a one
    returns. Those that mostly have nothing to wait for may be functions instead that return DONE (`eager.py`).

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
    # And so are names with these prefixes.
    more_protocol_names: ClassVar[tuple[str, ...]] = ()
    # Names in an image can be relative to the folder in this one's.
    has_directory: ClassVar[bool] = True
    # Options that name or describe a child (`file=...` or `file.*`).
    child_keys: ClassVar[tuple[str, ...]] = ()
    # Flags the driver obeys itself; the pipeline emulates the others (rows B19.12 and B17.10), except for
    # WRITE_COMPRESSED, which nobody else can do. Those of a node that hands its requests on (`hands_on_to`) are masked
    # by the child's.
    supported_write_flags: int = 0
    supported_zero_flags: int = 0
    # Number (dev_t) of the host's block device that the bytes are on; None: they are elsewhere.
    device_number: int | None = None
    # Bytes in which this layer allocates; 0: unknown (row B14.14).
    cluster_size: int = 0
    # Whether `driver_prepare_writes` does something.
    prepares_writes: bool = False
    # Whether its content can only be read with a key.
    is_encrypted: bool = False
    # Whether `driver_debug_event` wants to hear (row B43).
    has_debug_events: bool

    node_name: str
    read_only: bool
    inactive: bool
    length: int
    limits: BlockLimits
    children: dict[str, Edge]

    @classmethod
    def parse_filename(cls, filename: str, drivers: DriverRegistry) -> dict[str, Any]:
        """The options that a file name stands for (row B04.6).

        Args:
            drivers: for a driver whose names have the name of another in them.
        """
        return {"filename": filename.removeprefix(f"{cls.protocol_name}:")}

    def info(self) -> NodeInfo | None:
        """Facts about the image; None: there is nothing to say. A layer without its own has what it shows."""
        if self.cluster_size:
            return NodeInfo(self.cluster_size, self.cluster_size)
        for edge in self.children.values():
            if edge.role & Role.FILTERED:
                return edge.node.info()
        return None

    def host_needs(self) -> HostNeeds:
        """What this node itself, without its children, needs of the host from now on."""
        return HostNeeds()

    def exact_filename(self) -> str:
        """A name that opens the same again, without options; nothing: there is none (row B41.4)."""
        return ""

    def filename_over(self, child: str) -> str:
        """The same, of a filter whose child is called so."""
        return ""

    @classmethod
    def probe(cls, header: bytes, filename: str) -> int:
        """How sure it is that content which begins like this is in this format; 0: it is not (row B04.9)."""
        return 0

    @classmethod
    def probe_device(cls, filename: str) -> int:
        """How sure it is that this is the name of a device for this protocol driver; 0: it is not (row B04.7)."""
        return 0

    # ------------------------------------------------------------------ what a driver states

    async def open(self, context: OpenContext) -> None:
        """Open files and children, set `length` (and `read_only`, if it turned out so).

        Raises: ConfigError: one line that names the option or the file. What was opened before is
            closed by `close()`.
        """

    async def close(self) -> None:
        """Release everything; must work after a failed `open()` too. Children are closed by the graph, later."""

    async def refresh_length(self) -> None:
        """Set `length` to what it is now; by default what the children, which look first, make of it."""
        for edge in tuple(self.children.values()):
            await edge.node.refresh_length()

    @classmethod
    def join_options(cls, new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
        """What a reopen begins with that keeps what it does not change; flat."""
        return {**old, **new}

    async def reopen_prepare(self, reopen: Reopen) -> None:
        """Get what the new options need, beside the old; raises ConfigError, and has then changed nothing (row B34).

        The node is drained and flushed; options that may not change have not.
        """

    def reopen_commit(self, reopen: Reopen) -> None:
        """The new options are in place: use what was prepared, at once. Must not fail."""

    async def reopen_done(self, reopen: Reopen) -> None:
        """Put away what was used before."""

    async def reopen_abort(self, reopen: Reopen) -> None:
        """Put away what was prepared."""

    async def driver_inactivate(self) -> None:
        """Store what only this process knows: the image is about to be somebody else's (row B40.3)."""

    async def driver_activate(self) -> None:
        """The image is ours again: forget what was cached of it, read it anew."""

    def refresh_limits(self) -> None:
        """Adjust `limits`, which are merged from the children already (row B12.2)."""

    def driver_preadv(self, offset: int, length: int, iov: IoVec) -> Request:
        """Fill `iov` with the bytes at `offset`; all of them or BlockError."""
        return self._filtered().preadv(offset, iov)

    def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> Request:
        """Write `iov` at `offset`. `flags` are within `supported_write_flags`.

        With WRITE_COMPRESSED the request is neither cut nor bounced (row B16.11); EINVAL for parts of clusters.
        """
        return self._filtered().pwritev(offset, iov, flags)

    def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> Request:
        """Make the range read as zeroes, cheaply; ENOTSUP makes the pipeline write them (row B17.11)."""
        return self._filtered().pwrite_zeroes(offset, length, flags)

    def driver_pdiscard(self, offset: int, length: int) -> Request:
        """The range is not needed any more; ENOTSUP is no error (row B18.2)."""
        return self._filtered().pdiscard(offset, length)

    async def driver_flush_all(self) -> bool:
        """Flush this node and all beneath it, and return True; or leave it to the pipeline (row B19.3)."""
        return False

    async def driver_flush_to_os(self) -> None:
        """Hand what this process caches to the host: it survives our crash (row B19.9)."""

    async def driver_flush_to_disk(self) -> None:
        """Make what the host has durable: it survives a power cut. Children are flushed by the pipeline."""

    async def driver_truncate(self, length: int, preallocation: Preallocation) -> None:
        """Change the length; what is new reads as zeroes. ENOTSUP for a preallocation it cannot do."""
        await self._filtered().truncate(length, preallocation)

    async def driver_allocated_size(self) -> int:
        """Bytes on the disk; by default those of the children, except for the backing file and of a filter's others."""
        if self.is_filter:
            return await self._filtered().node.driver_allocated_size()
        edges = [edge for edge in self.children.values() if not edge.role & Role.COW]
        if not edges:
            raise BlockError(errno.ENOTSUP, f"{self.node_name}: allocated size is not known")
        return sum([await edge.node.driver_allocated_size() for edge in edges])

    async def driver_cut_padding(self, end: int) -> None:
        """A padded write has reached past `end`, the end of the node: undo that, where it shows (a file has grown)."""

    async def driver_block_status(self, offset: int, length: int, precise: bool) -> BlockStatus:
        """What this layer has at `offset`; see `status.py`. The range is aligned and inside the node.

        Args:
            precise: False: only allocation matters; a long answer is better than an exact one (row B21.10).
        """
        if self.is_filter:
            flags = StatusFlag.RAW | StatusFlag.OFFSET_VALID
            return BlockStatus(flags, length, self._filtered().node, offset)
        if self.children:
            return BlockStatus(StatusFlag.DATA, length)
        return BlockStatus(StatusFlag.DATA | StatusFlag.OFFSET_VALID, length, map=offset)

    async def driver_block_statuses(self, offset: int, length: int) -> StatusRuns:
        """The same, exactly, for ranges one behind the other from `offset` on; none: ask for them one by one.

        Who says OFFSET_VALID names the node, too; nobody says RAW.
        """
        return StatusRuns([])

    def has_zero_init(self) -> bool:
        """Whether a node that was just made reads as zeroes (row B21.15)."""
        return self.is_filter and self._filtered().node.has_zero_init()

    async def driver_copy_range_from(
        self, offset: int, target: BlockNode, target_offset: int, length: int, flags: int
    ) -> None:
        """Copy to another node without moving the bytes; a layer passes on to its child (`copy_range.py`)."""
        raise BlockError(errno.ENOTSUP)

    async def driver_copy_range_to(
        self, source: BlockNode, source_offset: int, offset: int, length: int, flags: int
    ) -> None:
        """The other half: `source` is the leaf that has the bytes."""
        raise BlockError(errno.ENOTSUP)

    def close_complaints(self, error: OSError) -> tuple[str, ...]:
        """What QEMU's tools say when closing has failed; nothing by default."""
        return ()

    async def driver_load_vm_state(self, offset: int, iov: IoVec) -> None:
        """Read a guest's saved state; by default, what is below has it."""
        await self._has_vm_state().driver_load_vm_state(offset, iov)

    async def driver_save_vm_state(self, offset: int, iov: IoVec) -> None:
        """Write it; nobody else uses the node meanwhile."""
        await self._has_vm_state().driver_save_vm_state(offset, iov)

    def _has_vm_state(self) -> BlockNode:
        for edge in self.children.values():
            if edge.role & Role.PRIMARY:
                return edge.node
        raise BlockError(errno.ENOTSUP, f"{self.node_name}: no place for a guest's state")

    def driver_cancel_in_flight(self) -> None:
        """Make pending requests fail soon, where waiting for them may take long (row B25.3)."""

    async def driver_debug_event(self, event: str) -> None:
        """A request has come to a named point (row B43.1)."""

    def driver_plug(self) -> None:
        """Requests may be kept back until `driver_unplug`, to be submitted together (row B28)."""

    def driver_unplug(self) -> None:
        """Submit what was kept back."""

    def driver_drain_begin(self) -> None:
        """A drain begins: release requests that wait here, start none of your own; those count in `in_flight`."""

    def driver_drain_end(self) -> None:
        """The last drain has ended."""

    def can_discard(self) -> bool:
        """Whether a discard has an effect; what the export offers to the guest."""
        return self.is_filter and (child := self._filtered().node).unmap and child.can_discard()

    async def driver_prepare_writes(
        self, ranges: Ranges, writer: Writer = Writer.REGULAR
    ) -> tuple[list[HostExtent], Ranges]:
        """Somebody would like to write to these ranges by extents: make it possible, where that is no more work than a
        write; `prepares_writes` says that this does something. What the disk shows stays the same, unless it is a
        maker who writes.

        Returns: extents, in order, where it has become possible now; and where it was possible before.

        Raises:
            BlockError: whoever writes there finds the same.
        """
        return [], ranges

    async def host_extent(self, offset: int, length: int) -> HostExtent | None:
        """The largest extent around `offset` that may be used without asking, or None.

        Called through `pipeline.host_extent()`, which knows about drains and serialising requests.
        A filter that wants to see requests returns None.
        """
        return None

    async def host_extents(self, ranges: Ranges) -> list[HostExtent]:
        """The same for many ranges (in order, apart from each other) at once: what may be used of them, in order, not
        what is around them. By default nothing: whoever wants to know asks for one after the other."""
        return []

    def flush_target(self) -> int | FlushTarget:
        """The one file whose fdatasync is a complete flush of this node, or why there is none."""
        return FlushTarget.ASK

    def flush_failed(self, error: int) -> None:
        """Somebody's fdatasync of `flush_target()` failed with this errno."""
        for edge in self.children.values():
            edge.node.flush_failed(error)

    def driver_register_buf(self, host: int, size: int) -> None:
        """Requests will come from this memory: address in this process and bytes (`registered_buf.py`)."""

    def driver_unregister_buf(self, host: int) -> None:
        """None will any more."""

    def child_perm(self, edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """What this node needs of a child, and shares, when its parents ask for this (row B09.5)."""
        return default_child_permissions(
            edge.role,
            perm,
            shared,
            writable=not self.read_only and not self.inactive,
            inactive=self.inactive,
        )

    def driver_add_child(self, child: BlockNode) -> tuple[str, Role]:
        """Name and role that a further child would have (row B08.11); most drivers have the children they have.

        Raises:
            ConfigError: ENOTSUP; or why not this one.
        """
        raise ConfigError(f"Node '{self.node_name}' does not support adding a child", errno.ENOTSUP)

    def driver_del_child(self, edge: Edge) -> None:
        """Whether a child may go.

        Raises:
            ConfigError: ENOTSUP; or why not this one.
        """
        raise ConfigError(
            f"Node '{self.node_name}' does not support removing a child", errno.ENOTSUP
        )

    def check_perm(self, perm: Perm, shared: Perm) -> None:
        """Take what the change needs, locks for instance; raises ConfigError (row B09.4)."""

    def set_perm(self, perm: Perm, shared: Perm) -> None:
        """The change was made: give back what is not needed any more."""

    def abort_perm(self) -> None:
        """The change was not made."""

    def hands_on_to(self) -> Edge | None:
        """The child that gets this node's requests with all their flags."""
        return filtered_child(self) if self.is_filter else None  # type: ignore[arg-type]

    def _filtered(self) -> Edge:
        """The child of a filter; ENOTSUP for everybody else."""
        if self.is_filter:
            for edge in self.children.values():
                if _and(edge.role, _FILTERED):
                    return edge
        raise BlockError(errno.ENOTSUP, f"{self.driver_name}: operation not supported")
