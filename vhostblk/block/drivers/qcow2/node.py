"""The `qcow2` driver: images with allocation, backing files, compression and subclusters. For reading, as yet.

Theory of operation: the header is checked, the L1 table read whole; slices of L2 tables are kept in a cache. A request
is cut into runs (`entries.py`), each of which comes from one place: the image's file or external data file, the
backing file, a compressed cluster, or nowhere. What is allocated and not compressed is given to the engine as extents,
zeroes and backing files likewise, so that a chain costs nothing once it was looked up.

An image is not trusted: whatever is wrong with a table is an error of the request that found it (EIO), and logged once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from dataclasses import dataclass, replace

from vhostblk.block.driver import NodeInfo, OpenContext
from vhostblk.block.drivers.qcow2.compressed import Decompress, decompressor
from vhostblk.block.drivers.qcow2.entries import L1_RESERVED, OFFSET_MASK, EntryReader, Kind, Run
from vhostblk.block.drivers.qcow2.header import MAGIC, Header, Incompatible, cluster_size_of
from vhostblk.block.drivers.qcow2.tables import Table, TableCache, read_table
from vhostblk.block.edge import Edge
from vhostblk.block.extent import ExtentFlag, FlushTarget, HostExtent
from vhostblk.block.flags import StatusFlag
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import SECTOR_SIZE, align_down
from vhostblk.block.node import BlockNode
from vhostblk.block.options import SIZE, NodeOptions, option
from vhostblk.block.pipeline import host_extent
from vhostblk.block.reopen import Reopen
from vhostblk.block.roles import Role
from vhostblk.block.status import BlockStatus
from vhostblk.errors import BlockError, ConfigError, ImageError

log = logging.getLogger(__name__)

_MAX_L2_CACHE = 32 << 20
_MAX_SLICE = 64 << 10
_MIN_SLICE = 512


@dataclass(frozen=True, slots=True)
class Qcow2Options:
    """QEMU's options for qcow2, besides `file`, `backing` and `data-file`."""

    l2_cache_size: int | None = option(
        SIZE, None, about="bytes of L2 tables to keep; absent: enough for the disk, at most 32 MiB"
    )
    l2_cache_entry_size: int | None = option(
        SIZE,
        None,
        about="bytes of an L2 table to read at a time, a power of two; absent: a cluster, at most 64 KiB",
    )
    cache_size: int | None = option(
        SIZE, None, about="bytes for tables of all kinds; what `l2-cache-size` does not say"
    )


class Qcow2Node(BlockNode):
    """A qcow2 image, read-only."""

    driver_name = "qcow2"
    options_type = Qcow2Options
    options: Qcow2Options
    child_keys = ("file", "backing", "data-file")
    _header: Header
    _file: Edge
    _data: Edge
    _l1: Table
    _l2: TableCache
    _entries: EntryReader
    _decompress: Decompress

    @classmethod
    def probe(cls, header: bytes, filename: str) -> int:
        """By the magic, and a version that is known."""
        return 100 if header[:4] == MAGIC and header[4:8] in (b"\0\0\0\2", b"\0\0\0\3") else 0

    async def open(self, context: OpenContext) -> None:
        """Read and check the header and the L1 table; open the data file and the backing file.

        Raises:
            ConfigError: not a qcow2 image, or one that is damaged or not supported; writing was asked for.
        """
        self._refuse_writing(self.read_only, self.common)
        self.read_only = True
        self._logged = False
        self._file = await context.open_child(self, "file", Role.IMAGE)
        try:
            self._header = header = Header.parse(await self._beginning())
            self._decompress = decompressor(header.compression)
            self._l1 = await read_table(self._file, header.l1_offset, header.l1_entries)
        except ImageError as error:
            raise ConfigError(f"Image is not usable: {error}") from None
        except BlockError as error:
            raise ConfigError(f"Could not read qcow2 header: {error.strerror}") from None
        self._entries = EntryReader(header)
        self.cluster_size = header.cluster_size
        self.length = align_down(header.size, SECTOR_SIZE)
        await self._open_data_file(context)
        self._l2 = self._make_cache()
        await context.open_implied(
            self, "backing", Role.COW, header.backing_name, header.backing_format
        )

    async def reopen_prepare(self, reopen: Reopen) -> None:
        """As when it was opened.

        Raises:
            ConfigError: writing was asked for.
        """
        self._refuse_writing(reopen.read_only, reopen.common)
        reopen.read_only = True

    def _refuse_writing(self, read_only: bool, common: NodeOptions) -> None:
        if not read_only and not common.auto_read_only:
            raise ConfigError(
                f"Node '{self.node_name}': qcow2 images can only be opened read-only by this version "
                "(read-only=on)",
                errno.ENOTSUP,
            )

    async def _beginning(self) -> bytes:
        """The first cluster, or the whole file."""
        data = bytearray(min(SECTOR_SIZE, self._file.node.length))
        await self._file.preadv(0, IoVec.of(data))
        cluster_size = min(cluster_size_of(data), self._file.node.length)
        if cluster_size > len(data):
            data = bytearray(cluster_size)
            await self._file.preadv(0, IoVec.of(data))
        return bytes(data)

    async def _open_data_file(self, context: OpenContext) -> None:
        name = self._header.data_file_name
        if self._header.has_data_file:
            edge = await context.open_implied(self, "data-file", Role.DATA, name)
            if edge is None:
                raise ConfigError("'data-file' is required for this image")
            self._data = edge
            self._file.role = Role.METADATA | Role.PRIMARY
            return
        self._data = self._file
        if await context.open_optional_child(self, "data-file", Role.DATA) is not None:
            raise ConfigError("'data-file' can only be set for images with an external data file")

    def _make_cache(self) -> TableCache:
        header, options = self._header, self.options
        slice_size = options.l2_cache_entry_size or min(header.cluster_size, _MAX_SLICE)
        if slice_size.bit_count() != 1 or not _MIN_SLICE <= slice_size <= header.cluster_size:
            raise ConfigError(
                "Parameter 'l2-cache-entry-size' must be a power of two between "
                f"{_MIN_SLICE} and the cluster size ({header.cluster_size})"
            )
        total, both = options.l2_cache_size, options.cache_size
        if total is not None and both is not None and total > both:
            raise ConfigError("Parameter 'l2-cache-size' may not exceed 'cache-size'")
        if total is None:
            tables = header.l1_entries_needed(header.size) * header.cluster_size
            total = min(tables, _MAX_L2_CACHE) if both is None else both
        self._slice_size = slice_size
        return TableCache(self._file, slice_size, total)

    def info(self) -> NodeInfo:
        """Sizes of clusters; what a guest's state would be saved behind; whether it was closed."""
        header = self._header
        covered = header.cluster_size * header.l2_entries
        return NodeInfo(
            cluster_size=header.cluster_size,
            subcluster_size=header.subcluster_size,
            vm_state_offset=header.l1_entries_needed(header.size) * covered,
            is_dirty=bool(header.incompatible & Incompatible.DIRTY),
        )

    # ------------------------------------------------------------------ where bytes come from

    async def _run(self, offset: int, limit: int) -> Run:
        """The run around `offset`; no need to know what is behind `limit`.

        Raises:
            BlockError: EIO: the image is damaged there, or the child's errno.
        """
        header = self._header
        covered = header.l2_entries << header.cluster_bits
        index = offset // covered
        start = index * covered
        entry = self._l1[index]
        l2_offset = entry & OFFSET_MASK
        try:
            if entry & L1_RESERVED or l2_offset & (header.cluster_size - 1):
                raise ImageError(f"L2 table offset {entry:#x} unaligned (L1 index: {index})")
            if not l2_offset:
                return self._unallocated(index, covered, limit)
            # Each slice is for so many bytes of the disk.
            part = self._slice_size // header.l2_entry_size << header.cluster_bits
            which = (offset - start) // part
            table = await self._l2.get(l2_offset + which * self._slice_size)
            return self._entries.run_at(table, start + which * part, offset, limit)
        except ImageError as error:
            if not self._logged:
                log.warning("node '%s': image is corrupt: %s", self.node_name, error)
                self._logged = True
            raise BlockError(errno.EIO, f"{self.node_name}: image is corrupt: {error}") from None

    def _unallocated(self, index: int, covered: int, limit: int) -> Run:
        """No L2 table: all that the entries of the L1 table around this one say nothing of either."""
        first = last = index
        while first and not self._l1[first - 1] & (OFFSET_MASK | L1_RESERVED):
            first -= 1
        most = min(-(-limit // covered), len(self._l1))
        while last + 1 < most and not self._l1[last + 1] & (OFFSET_MASK | L1_RESERVED):
            last += 1
        return Run(Kind.UNALLOCATED, first * covered, (last + 1) * covered)

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        """Run by run."""
        end, at = offset + length, offset
        while at < end:
            run = await self._run(at, end)
            count = min(run.end, end) - at
            part = iov if count == length else iov.slice(at - offset, count)
            if run.kind is Kind.NORMAL:
                await self._data.preadv(run.host + at - run.start, part)
            elif run.kind is Kind.COMPRESSED:
                await self._read_compressed(run, at - run.start, part)
            elif run.kind is Kind.UNALLOCATED and (backing := self.children.get("backing")):
                await backing.preadv(at, part)
            else:
                part.zero(0, count)
            at += count

    async def _read_compressed(self, run: Run, skip: int, iov: IoVec) -> None:
        data = bytearray(run.compressed)
        await self._file.preadv(run.host, IoVec.of(data))
        # It takes some hundred microseconds: not in the loop.
        cluster = await asyncio.to_thread(self._decompress, bytes(data), self._header.cluster_size)
        iov.copy_from(memoryview(cluster)[skip : skip + iov.length])

    async def driver_block_status(self, offset: int, length: int, precise: bool) -> BlockStatus:
        """The run at `offset`, and where it is."""
        run = await self._run(offset, offset + length)
        count = min(run.end, offset + length) - offset
        if run.kind is Kind.COMPRESSED:
            return BlockStatus(StatusFlag.DATA | StatusFlag.COMPRESSED, count)
        flags = StatusFlag(0)
        if run.kind is Kind.NORMAL:
            flags |= StatusFlag.DATA
        elif run.kind is Kind.ZERO:
            flags |= StatusFlag.ZERO
        if not run.has_host:
            return BlockStatus(flags, count)
        place = run.host + offset - run.start
        return BlockStatus(flags | StatusFlag.OFFSET_VALID, count, self._data.node, place)

    # ------------------------------------------------------------------ the engine

    async def host_extent(self, offset: int, length: int) -> HostExtent | None:
        """What is allocated is the data file's, what is not is the backing file's, or zeroes."""
        run = await self._run(offset, self.length)
        start, end = run.start, min(run.end, self.length)
        shift = 0
        child: Edge | None = None
        if run.kind is Kind.COMPRESSED:
            return None
        if run.kind is Kind.NORMAL:
            child, shift = self._data, run.host - run.start
        elif run.kind is Kind.UNALLOCATED and (backing := self.children.get("backing")):
            if offset < backing.node.length:
                child = backing
            else:
                start = max(start, backing.node.length)
        if child is None:
            return HostExtent(start, end - start, None, 0, ExtentFlag.READ | ExtentFlag.ZERO)
        extent = await host_extent(child.node, offset + shift, min(length, end - offset))
        if extent is None or shift % extent.request_alignment:
            return None
        extent = extent.cut(start + shift, end + shift)
        return extent and replace(extent.without(ExtentFlag.WRITE), offset=extent.offset - shift)

    def flush_target(self) -> int | FlushTarget:
        """Nothing is ever written."""
        return FlushTarget.NOTHING

    async def child_revoke(self, edge: Edge, offset: int, length: int) -> None:
        """A backing file has our offsets; what is where in the image is not worth knowing."""
        if edge.role & Role.COW:
            end = min(offset + length, self.length)
            if offset < end:
                await self.revoke(offset, end - offset)
        else:
            await super().child_revoke(edge, offset, length)
