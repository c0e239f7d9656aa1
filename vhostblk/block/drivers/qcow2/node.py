"""The `qcow2` driver: opening images, and what happens to them as a whole.

Theory of operation: the header is checked, the L1 table read whole; slices of L2 tables are kept in a cache
(`metadata.py`), and `request_node.py` answers requests with them. The other parts of the node are in `check_node.py`,
`bitmap_node.py`, `snapshot_node.py` and `amend.py`.

An image is not trusted: whatever is wrong with a table is an error of the request that found it (EIO), and logged once.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vhostblk.block import image_info
from vhostblk.block.driver import NodeInfo, OpenContext
from vhostblk.block.drivers.qcow2 import create as creating
from vhostblk.block.drivers.qcow2 import emptying, format_info, measuring, resize
from vhostblk.block.drivers.qcow2.amend import AmendNode
from vhostblk.block.drivers.qcow2.backing import change_backing
from vhostblk.block.drivers.qcow2.bitmaps import load_directory
from vhostblk.block.drivers.qcow2.cache import TableCache
from vhostblk.block.drivers.qcow2.clusters import Clusters
from vhostblk.block.drivers.qcow2.compressed import codec
from vhostblk.block.drivers.qcow2.compressing import CompressedWrites
from vhostblk.block.drivers.qcow2.data_file import RawDataFile
from vhostblk.block.drivers.qcow2.first_writes import FirstWrites
from vhostblk.block.drivers.qcow2.header import (
    MAGIC,
    AutoClear,
    Header,
    Incompatible,
    cluster_size_of,
)
from vhostblk.block.drivers.qcow2.metadata import Metadata
from vhostblk.block.drivers.qcow2.options import Qcow2Options, join_options
from vhostblk.block.drivers.qcow2.overlaps import TablePlaces
from vhostblk.block.drivers.qcow2.refcounts import Refcounts
from vhostblk.block.drivers.qcow2.request_node import RequestNode
from vhostblk.block.drivers.qcow2.snapshots import (
    SnapshotTableError,
    inactive_tables,
    load_snapshots,
)
from vhostblk.block.drivers.qcow2.tables import OFFSETS
from vhostblk.block.execution import to_the_end
from vhostblk.block.extent import Hull
from vhostblk.block.flags import Preallocation
from vhostblk.block.image_driver import BackingName
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import SECTOR_SIZE, align_down
from vhostblk.block.node import BlockNode
from vhostblk.block.roles import Role
from vhostblk.errors import BlockError, ConfigError, ImageError

if TYPE_CHECKING:
    from vhostblk.block.creation import Creation
    from vhostblk.block.image_info import FormatInfo
    from vhostblk.block.length import Measurement
    from vhostblk.block.reopen import Reopen


_OLDEST_VERSION = 2  # 1 is another format


class Qcow2Node(AmendNode, RequestNode):
    """A qcow2 image."""

    driver_name = "qcow2"
    options_type = Qcow2Options
    options: Qcow2Options
    child_keys = ("file", "backing", "data-file")
    create_aliases = MappingProxyType({"version": "compat"})
    create_child_keys = ("file", "data-file")

    @classmethod
    def create_options_type(cls) -> type[Any] | None:
        """See `create.py`."""
        return creating.Qcow2CreateOptions

    @classmethod
    def probe(cls, header: bytes, filename: str) -> int:
        """By the magic, and a version that is not of another format; opening looks at it again."""
        version = int.from_bytes(header[4:8])
        return 100 if header[:4] == MAGIC and version >= _OLDEST_VERSION else 0

    @classmethod
    async def create(cls, creation: Creation, options: creating.Qcow2CreateOptions) -> None:
        """See `create.py`."""
        await creating.create(creation, options)

    @classmethod
    def measure_options_type(cls) -> type[Any] | None:
        """See `measuring.py`."""
        return measuring.Qcow2MeasureOptions

    @classmethod
    async def measure(
        cls, options: measuring.Qcow2MeasureOptions, source: BlockNode | None
    ) -> Measurement:
        """See `measuring.py`."""
        return await measuring.measure(options, source)

    async def driver_bitmap_room(self, cluster_size: int) -> int | None:
        """Those that are kept, and are right."""
        if self._header.version < 3:
            return None
        return measuring.bitmap_room(self.bitmaps, self.length, cluster_size)

    async def open(self, context: OpenContext) -> None:
        """Read and check the header and the L1 table; open the data file and the backing file.

        Raises:
            ConfigError: not a qcow2 image, or one that is damaged or not supported.
        """
        self._is_open = self._is_corrupt = False
        self._reopened: Refcounts | None = None
        self._new_inactive: TablePlaces | None = None
        self._file = await context.open_child(self, "file", Role.IMAGE)
        self._header = header = await self._load_header()
        self.options.check(header)
        if header.version < 3:
            self.supported_zero_flags = 0
        self._codec = codec(header.compression)
        if self._is_written:
            try:
                self._check_may_write(header)
            except ConfigError:
                if not self.common.auto_read_only:
                    raise
                self.read_only = True
        self.cluster_size = header.cluster_size
        self.length = align_down(header.size, SECTOR_SIZE)
        await self._open_encryption(context)
        await self._open_data_file(context)
        await self._load_tables()
        if not self.without_backing:
            await context.open_implied(
                self, "backing", Role.COW, header.backing_name, header.backing_format
            )
        if not self.inactive:
            await self._load_bitmaps()
        self._is_open = True

    async def _load_header(self) -> Header:
        try:
            return Header.parse(await self._beginning(), for_check=self.for_check)
        except ImageError as error:
            raise _unusable(error) from None
        except BlockError as error:
            raise ConfigError(f"Could not read qcow2 header: {error.strerror}") from None

    async def _check_snapshots_are_read(self) -> None:
        """Whether the table of snapshots can be read; who checks the image finds out itself."""
        try:
            if not self.for_check:
                await load_snapshots(self._file, self._header)
        except ImageError as error:
            raise _unusable(error) from None
        except BlockError as error:
            raise ConfigError(f"Failed to read snapshot table: {error.strerror}") from None

    def _make_cache(self, header: Header) -> TableCache:
        slice_bytes = self.options.slice_bytes(header)
        total_bytes = self.options.l2_bytes(header)
        return TableCache(self._file, OFFSETS, slice_bytes, total_bytes, "l2_load")

    async def _load_refcounts(self, header: Header) -> Refcounts:
        options = self.options
        return await Refcounts.load(
            *(self._file, header, options.refcount_bytes()),
            protects_inactive=options.protects_inactive,
        )

    async def _load_tables(self) -> None:
        await self._check_snapshots_are_read()
        await self._repair_dirty()
        header, file = self._header, self._file
        refcounts = None
        try:
            if self._is_written:
                refcounts = await self._load_refcounts(header)
            self._metadata = await Metadata.load(
                file, self._data, header, self._make_cache(header), refcounts
            )
        except ImageError as error:
            raise _unusable(error) from None
        except BlockError as error:
            raise ConfigError(f"Could not read the tables: {error.strerror}") from None
        self._apply_options()
        self._clusters = Clusters(
            self._metadata,
            self._data,
            is_external=header.has_data_file,
            read=self._read,
            changed=self._moved,
            has_backing=lambda: "backing" in self.children,
            encryption=self._encryption,
        )
        self._compressing = CompressedWrites(self._clusters, self._codec, header.cluster_size)
        self._raw_data = None
        if header.has_data_file and header.autoclear & AutoClear.RAW_DATA_FILE:
            self._raw_data = RawDataFile(self._data, self._clusters.locks, self._clusters.run)
        self._first_writes = FirstWrites(
            self._metadata,
            self._data,
            self._clusters.locks,
            read=self._read,
            changed=self._got_place,
        )
        self.shown = Hull()
        if self._is_written:
            await self._metadata.clear_unknown_features()

    def _apply_options(self) -> None:
        passes = self.options.passes_discards
        self._metadata.discards = self.unmap if passes is None else passes
        self._metadata.lazy = self.options.is_lazy(self._header)

    def _check_may_write(self, header: Header) -> None:
        """Refuse to write what would be damaged by that.

        Raises:
            ConfigError: why.
        """
        why = ""
        if header.incompatible & Incompatible.CORRUPT:
            why = "Image is corrupt; cannot be opened read/write"
        if why:
            raise ConfigError(
                f"Node '{self.node_name}': {why}", errno.EACCES, qemu_text=f"qcow2: {why}"
            )

    def refresh_limits(self) -> None:
        """Zeroes by subclusters, discards by clusters; encryption by sectors."""
        if self.is_encrypted:
            self.limits.request_alignment = max(self.limits.request_alignment, SECTOR_SIZE)
        self.limits.pwrite_zeroes_alignment = self._header.subcluster_size
        self.limits.pdiscard_alignment = self._header.cluster_size

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
        if self.without_io:
            self._data = self._file  # which nobody asks for data
            return
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

    async def driver_format_info(self) -> FormatInfo:
        """The header, and the bitmaps as they are in the image now.

        Raises:
            ConfigError: the bitmaps are damaged.
        """
        try:
            directory = await load_directory(self._file, self._header)
        except (ImageError, BlockError) as error:
            raise ConfigError(f"Could not read the image's bitmaps: {error}") from None
        encryption = self._opened.facts() if self._opened is not None else None
        return image_info.FormatInfo(
            self.driver_name, format_info.qcow2_facts(self._header, directory, encryption)
        )

    async def driver_flush_to_os(self) -> None:
        """Tables, in the order that survives a crash."""
        if self._is_written and not self.inactive:
            await self._store(self._metadata.sync())

    async def close(self) -> None:
        """Write what was put off. What is damaged stays as it is."""
        if self._is_open and self._is_written and not self.inactive and not self._is_corrupt:
            await self._store_bitmaps_at_last()
            await self._store(self._metadata.finish())

    def close_complaints(self, error: OSError) -> tuple[str, ...]:
        """Which tables could not be written."""
        tables, counts = self._metadata.unwritten
        # As in QEMU, each of them ends with a flush, which fails as well if there is something to be flushed.
        file = self._file.node
        unflushed = file.write_log.generation > max(file.flushed_gen, 0)
        kinds = ("L2 table",) * (tables or unflushed)
        kinds += ("refcount block",) * (counts or unflushed)
        return tuple(f"Failed to flush the {kind} cache: {error.strerror}" for kind in kinds)

    async def driver_truncate(self, length: int, preallocation: Preallocation) -> None:
        """See `resize.py`."""
        resize.check_resizable(self._metadata.header, length)
        self._check_bitmaps_resizable()
        backing = self.children.get("backing")
        change = resize.Resize(
            *(self._metadata, self._clusters, self._file, self._data),
            backing.node.length if backing is not None else 0,
        )
        await self._change(change.run(self.length, length, preallocation))
        self._header = self._metadata.header
        self._metadata.cache.limit(self.options.l2_bytes(self._header))
        self.set_length(length)

    def recorded_backing(self) -> BackingName:
        """What the header says."""
        return BackingName(self._header.backing_name, self._header.backing_format)

    async def driver_change_backing(self, filename: str, driver: str) -> None:
        """Another header, by a write that nothing can tear."""
        self._check_whole()
        await to_the_end(
            self._metadata.change_header(lambda header: change_backing(header, filename, driver))
        )
        self._header = self._metadata.header

    async def driver_make_empty(self) -> None:
        """An L1 table without entries; not where the data file has to show the same."""
        if self._raw_data is not None:
            raise BlockError(
                errno.ENOTSUP, f"{self.node_name}: a raw data file cannot be emptied by tables"
            )
        keeps_bitmaps = any(bitmap.persistent for bitmap in self.bitmaps)
        at_once = emptying.can_be_emptied(self._header) and not keeps_bitmaps
        await self._change(self._make_empty() if at_once else self._clusters.make_empty())

    async def _make_empty(self) -> None:
        clusters, end = self._clusters, self._metadata.l1_covers
        async with clusters.locks.held(0, end, alone=True):
            await clusters.let_go(0, end, [])
            try:
                await to_the_end(emptying.empty(self._file, self._metadata))
                await self._reload()
            except (BlockError, ConfigError) as error:
                self._is_corrupt = True  # until it is opened anew
                why = f"the image could not be emptied: {error}"
                raise BlockError(error.errno or errno.EIO, why) from None

    async def driver_inactivate(self) -> None:
        """Write what only this process knows."""
        await self._give_bitmaps_away()
        if self._is_written:
            await self._store(self._metadata.finish())

    async def driver_activate(self) -> None:
        """Read anew what somebody else may have changed."""
        await self._file.node.refresh_length()  # tables may be where nothing was
        await self._reload()
        self.set_length(align_down(self._header.size, SECTOR_SIZE))
        if self._bitmap_store is None:
            await self._load_bitmaps()

    @classmethod
    def join_options(cls, new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
        """See `options.py`."""
        return join_options(new, old)

    async def reopen_prepare(self, reopen: Reopen) -> None:
        """Read what a writer needs; not what everybody has already.

        Raises:
            ConfigError: it may not be written.
        """
        reopen.options.check(self._header)
        if self._is_written and reopen.options.protects_inactive != self.options.protects_inactive:
            self._new_inactive = await self._load_inactive(reopen.options.protects_inactive)
        lazy = reopen.options.is_lazy(self._header)
        if reopen.read_only or not self.read_only:
            if self._is_written and reopen.read_only:
                await self._bitmaps_become_readonly()
            if self._is_written and (reopen.read_only or not lazy):
                try:
                    await self._store(self._metadata.finish())
                except BlockError as error:
                    raise ConfigError(f"Could not write the tables: {error.strerror}") from None
            return
        header = await self._load_header()
        self._check_may_write(header)
        if header.autoclear & ~sum(AutoClear):
            raise ConfigError(
                f"Node '{self.node_name}': Image has features that nobody here knows; open it for writing anew"
            )
        if header.incompatible & Incompatible.DIRTY or self.for_check:
            raise ConfigError(
                f"Node '{self.node_name}': Image was not closed properly; open it for writing anew"
            )
        try:
            self._reopened = await self._load_refcounts(header)
        except (ImageError, BlockError) as error:
            raise ConfigError(f"Could not read the reference counts: {error}") from None

    def reopen_commit(self, reopen: Reopen) -> None:
        """The tables are the same."""
        if self._reopened is not None:
            self._metadata.may_write(self._reopened)
        self._reopened = None
        self._apply_options()
        if self._new_inactive is not None and self._is_written:
            self._metadata.refcounts.inactive = self._new_inactive
        self._new_inactive = None
        cache = self._make_cache(self._header)
        if cache.slice_bytes == self._metadata.cache.slice_bytes:
            self._metadata.cache.limit(self.options.l2_bytes(self._header))
        elif not self._metadata.cache.is_dirty:
            self._metadata.use_cache(cache)

    async def _load_inactive(self, wanted: bool) -> TablePlaces:
        places = TablePlaces(self._header.cluster_bits)
        try:
            if wanted:
                places.add_all(await inactive_tables(self._file, self._header))
            return places
        except (ImageError, BlockError) as error:
            raise ConfigError(f"Could not read the snapshots' tables: {error}") from None

    async def reopen_abort(self, reopen: Reopen) -> None:
        """As if nobody had asked."""
        self._reopened = self._new_inactive = None
        if reopen.read_only and self._is_written:
            await self._bitmaps_become_writable()

    async def reopen_done(self, reopen: Reopen) -> None:
        """Whoever may write now says so, before anything is written."""
        if not self.read_only and any(bitmap.readonly for bitmap in self.bitmaps):
            await self._bitmaps_become_writable()


def _unusable(error: ImageError) -> ConfigError:
    text = f"{error}\n{error.hint}" if isinstance(error, SnapshotTableError) else str(error)
    return ConfigError(f"Image is not usable: {error}", qemu_text=text)
