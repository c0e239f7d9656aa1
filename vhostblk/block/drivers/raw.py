"""`raw`: a child's bytes as they are, or a window of them (`offset`, `size`).

Where nobody has said that the format is raw, the guest must not be able to make it look like another one to whoever
opens it next: then what is written to the first sector is looked at (row B04.11), also when it comes by an extent.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vhostblk.block.copy_range import copy_range_from, copy_range_to
from vhostblk.block.driver import NodeInfo
from vhostblk.block.drivers.new_file import PREALLOCATION
from vhostblk.block.edge import Edge
from vhostblk.block.flags import Preallocation, StatusFlag
from vhostblk.block.introspection import filename
from vhostblk.block.iov import IoVec
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.length import Measurement, measure_raw
from vhostblk.block.limits import SECTOR_SIZE, align_down
from vhostblk.block.node import (
    BlockNode,
    ExtentFlag,
    FlushTarget,
    HostExtent,
    OpenContext,
    Req,
    Role,
)
from vhostblk.block.options import SIZE, option
from vhostblk.block.permissions import Perm
from vhostblk.block.pipeline import flush_target, host_extent
from vhostblk.block.registry import PROBE_SIZE, DriverRegistry
from vhostblk.block.status import BlockStatus, StatusRuns, block_statuses
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.creation import Creation
    from vhostblk.block.reopen import Reopen

log = logging.getLogger(__name__)

# What QEMU prints, wherever an image is opened.
_GUESSED = """\
WARNING: Image format was not specified for '{filename}' and probing guessed raw.
         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.
         Specify the 'raw' format explicitly to remove the restrictions."""


@lean_dataclass(frozen=True, slots=True)
class RawOptions:
    """QEMU's options for raw, besides `file`."""

    offset: int = option(
        SIZE, 0, about="where the disk begins in the file, in bytes", mutable=True, strong=True
    )
    size: int | None = option(
        SIZE,
        None,
        about="bytes of the disk; the rest of the file if absent",
        mutable=True,
        strong=True,
    )


@lean_dataclass(frozen=True, slots=True)
class RawCreateOptions:
    """QEMU's options for new raw images."""

    size: int = option(SIZE, about="Virtual disk size")
    # It is the file's, as image tools tell it.
    preallocation: str = option(
        PREALLOCATION, "off", about="whether the disk gets its room now", listed=False
    )


@lean_dataclass(frozen=True, slots=True)
class RawMeasureOptions:
    """What decides how large an image gets."""

    size: int = option(SIZE, about="bytes of the disk")


_ASK_CHILD = int(StatusFlag.RAW | StatusFlag.OFFSET_VALID)


class RawNode(BlockNode):
    """A window onto its child; the whole of it makes a transparent layer (row B08.4)."""

    driver_name = "raw"
    options_type = RawOptions
    options: RawOptions
    child_keys = ("file",)
    create_child_keys = ("file",)
    # As far as the child does: see `hands_on_to`.
    supported_write_flags = int(Req.FUA | Req.WRITE_UNCHANGED)
    supported_zero_flags = int(Req.FUA | Req.MAY_UNMAP | Req.WRITE_UNCHANGED | Req.NO_FALLBACK)
    _file: Edge
    _drivers: DriverRegistry

    @classmethod
    def create_options_type(cls) -> type[Any] | None:
        """Few."""
        return RawCreateOptions

    @classmethod
    def probe(cls, header: bytes, filename: str) -> int:
        """Anything may be raw; whatever else is recognised is surer."""
        return 1

    @classmethod
    async def create(cls, creation: Creation, options: RawCreateOptions) -> None:
        """A file of this length that is zero; or a device that is that long, as it is.

        Raises:
            ConfigError: ENOSPC: it is not.
            BlockError: the child's errno.
        """
        file = await creation.child("file")
        if await creation.emptied(file):
            await file.truncate(options.size, Preallocation(options.preallocation))
        elif file.length < options.size:
            raise ConfigError(
                f"Node '{file.node.node_name}' is too small: {file.length} bytes, not {options.size}",
                errno.ENOSPC,
            )
        await file.flush()

    @classmethod
    def measure_options_type(cls) -> type[Any] | None:
        """How long the disk is, and nothing else."""
        return RawMeasureOptions

    @classmethod
    async def measure(cls, options: RawMeasureOptions, source: BlockNode | None) -> Measurement:
        """All of the disk."""
        return measure_raw(options.size)

    async def open(self, context: OpenContext) -> None:
        """Open the child and check that the window is inside.

        Raises:
            ConfigError: it is not.
        """
        self._file = await context.open_child(self, "file", _role(self.options))
        self._drivers = context.drivers
        child = self._file.node
        if self.probed and not self.read_only:
            log.warning(
                "node '%s': nobody said which format it has, and raw was guessed: the first sector can only be "
                "written in ways that do not look like another format (driver=raw lifts this)",
                self.node_name,
                extra={"qemu_says": _GUESSED.format(filename=filename(child))},
            )
        self.block_sizes = child.block_sizes
        self.length = _window(self.options, child.length)

    def hands_on_to(self) -> Edge | None:
        """Whatever the window is."""
        return self._file

    def refresh_limits(self) -> None:
        """What is looked at comes as a whole sector."""
        if self.probed:
            self.limits.request_alignment = SECTOR_SIZE

    def child_perm(self, edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """Nothing of its own is written, so it asks for no more than its parents do."""
        _, shared = super().child_perm(edge, perm, shared)
        return perm, shared

    async def reopen_prepare(self, reopen: Reopen) -> None:
        """Check the new window.

        Raises:
            ConfigError: it is not inside the child.
        """
        child = reopen.children.get("file", self._file.node)
        _window(reopen.options, child.length)

    def set_options(self, options: RawOptions) -> None:
        """What the child is to us depends on the window."""
        super().set_options(options)
        if "file" in self.children:
            self._file.role = _role(options)

    async def refresh_length(self) -> None:
        """As long as the child allows, which has to look first."""
        await super().refresh_length()
        self.child_resized(self._file)

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        """Shifted; EIO where the child does not hold a window of fixed size any more."""
        if (
            self.options.size is not None
            and offset + length + self.options.offset > self._file.node.length
        ):
            raise BlockError(errno.EIO, f"{self.node_name}: behind the end of what it is a part of")
        if self._file.node.has_debug_events:
            await self._file.node.driver_debug_event("read_aio")
        await self._file.preadv(offset + self.options.offset, iov)

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        """Shifted; ENOSPC behind the end of a window of fixed size."""
        self._check_window(offset + length)
        if self._file.node.has_debug_events:
            await self._file.node.driver_debug_event("write_aio")
        if self.probed and offset < PROBE_SIZE:
            self._check_header(iov)
        await self._file.pwritev(offset + self.options.offset, iov, flags)

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        """Shifted; ENOSPC behind the end of a window of fixed size."""
        self._check_window(offset + length)
        await self._file.pwrite_zeroes(offset + self.options.offset, length, flags)

    async def driver_pdiscard(self, offset: int, length: int) -> None:
        """Shifted; ENOSPC behind the end of a window of fixed size."""
        self._check_window(offset + length)
        await self._file.pdiscard(offset + self.options.offset, length)

    async def driver_truncate(self, length: int, preallocation: Preallocation) -> None:
        """The child's end moves; ENOTSUP with a fixed size."""
        if self.options.size is not None:
            raise BlockError(errno.ENOTSUP, "Cannot resize fixed-size raw disks")
        await self._file.truncate(length + self.options.offset, preallocation)

    async def driver_copy_range_from(
        self, offset: int, target: BlockNode, target_offset: int, length: int, flags: int
    ) -> None:
        """Shifted."""
        await copy_range_from(
            self._file.node, offset + self.options.offset, target, target_offset, length, flags
        )

    async def driver_copy_range_to(
        self, source: BlockNode, source_offset: int, offset: int, length: int, flags: int
    ) -> None:
        """Shifted; ENOSPC behind the end of a window of fixed size."""
        self._check_window(offset + length)
        await copy_range_to(
            source, source_offset, self._file.node, offset + self.options.offset, length, flags
        )

    async def driver_block_status(self, offset: int, length: int, precise: bool) -> BlockStatus:
        """What the child says (row B21.19)."""
        return BlockStatus(_ASK_CHILD, length, self._file.node, offset + self.options.offset)

    async def driver_block_statuses(self, offset: int, length: int) -> StatusRuns:
        """What the child says of many ranges, as far as it goes."""
        below, offset = self._file.node, offset + self.options.offset
        if offset >= below.length:
            return StatusRuns([])
        return await block_statuses(below, offset, min(length, below.length - offset))

    def has_zero_init(self) -> bool:
        """As the child."""
        return self._file.node.has_zero_init()

    def info(self) -> NodeInfo | None:
        """The child's, through any window."""
        return self._file.node.info()

    def can_discard(self) -> bool:
        """If the child can, and may."""
        return self._file.node.unmap and self._file.node.can_discard()

    async def host_extent(self, offset: int, length: int) -> HostExtent | None:
        """The child's, cut to the window and shifted; none if the shift breaks its alignment."""
        shift = self.options.offset
        extent = await host_extent(self._file.node, offset + shift, length)
        if extent is None or shift % extent.request_alignment:
            return None
        extent = extent.cut(shift, shift + self.length)
        if extent is not None and self.probed:
            if offset < PROBE_SIZE:
                extent = extent.without(ExtentFlag.WRITE).cut(0, PROBE_SIZE)
            else:
                extent = extent.cut(PROBE_SIZE, extent.end)
        if extent is not None and extent.record and shift:
            # Granules begin at other places here: those that begin at the same ones have to do.
            record = min(extent.record, shift & -shift)
            if record < SECTOR_SIZE:
                extent = extent.without(ExtentFlag.WRITE)
            extent = replace(extent, record=max(record, SECTOR_SIZE))
        return extent and replace(extent, offset=extent.offset - shift)

    def flush_target(self) -> int | FlushTarget:
        """The child's: nothing is cached here."""
        return flush_target(self._file.node)

    def child_range(self, edge: Edge, offset: int) -> int | None:
        """Shifted."""
        return offset + self.options.offset

    async def child_revoke(self, edge: Edge, offset: int, length: int) -> None:
        """The part of the child's range that shows through the window."""
        start = max(offset - self.options.offset, 0)
        end = offset + length - self.options.offset
        if self.options.size is not None:
            end = min(end, self.options.size)  # not our length, which may be another one by now
        if start < end:
            await self.revoke(start, end - start)

    def child_resized(self, edge: Edge) -> None:
        """Follow, if the size is not fixed; a child that no longer holds the window makes requests fail, not us."""
        size = self.options.size
        if size is None:
            size = align_down(max(edge.node.length - self.options.offset, 0), SECTOR_SIZE)
        self.set_length(size)

    def _check_window(self, end: int) -> None:
        if self.options.size is not None and end > self.options.size:
            raise BlockError(errno.ENOSPC, f"{self.node_name}: behind the end of a fixed size")

    def _check_header(self, iov: IoVec) -> None:
        header = iov.slice(0, min(PROBE_SIZE, iov.length)).tobytes()
        if self._drivers.probe(header, "") is not type(self):
            raise BlockError(
                errno.EPERM, f"{self.node_name}: the first sector would look like another format"
            )


def _role(options: RawOptions) -> Role:
    """Row B08.4."""
    whole = not options.offset and options.size is None
    return Role.PRIMARY | (Role.FILTERED if whole else Role.DATA)


def _window(options: RawOptions, available: int) -> int:
    """The length of the window."""
    offset, size = options.offset, options.size
    if offset > available:
        raise ConfigError(
            f"Parameter 'offset': {offset} is greater than the size of the containing file "
            f"({available})",
            qemu_text=f"Offset ({offset}) cannot be greater than size of the containing file ({available})",
        )
    if size is None:
        return align_down(available - offset, SECTOR_SIZE)
    if size > available - offset:
        raise ConfigError(
            f"Parameter 'size': the sum of offset ({offset}) and size ({size}) is greater than "
            f"the size of the containing file ({available})",
            qemu_text=f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size "
            f"of the containing file ({available})",
        )
    if size % SECTOR_SIZE:
        raise ConfigError(
            f"Parameter 'size': {size} is not a multiple of {SECTOR_SIZE}",
            qemu_text=f"Specified size is not multiple of {SECTOR_SIZE}",
        )
    return size
