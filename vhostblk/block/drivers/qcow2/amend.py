"""Changing what a qcow2 image is like: version, features, width of reference counts (block layer row B35.8).

Theory of operation: everything is checked first. Each change is one write of the header's first sector, after what it
needs is on the disk: reference counts of another width are written where the file ends, zero clusters, which version 2
does not have, become clusters of zeroes or none. So a crash leaves an image as it was, or as it is going to be, or one
between two changes, which is as sound.

Context: the control loop; nobody else uses the image.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from typing import Any

from vhostblk.block import pipeline
from vhostblk.block.drivers.qcow2 import amend_options, header_change, layout, resize
from vhostblk.block.drivers.qcow2.backing import rewritten
from vhostblk.block.drivers.qcow2.clusters import Clusters
from vhostblk.block.drivers.qcow2.encrypted_node import EncryptedNode
from vhostblk.block.drivers.qcow2.entries import (
    COMPRESSED,
    OFFSET_MASK,
    ZERO,
    Kind,
)
from vhostblk.block.drivers.qcow2.extensions import Extension, ExtensionType, feature_names
from vhostblk.block.drivers.qcow2.header import (
    AutoClear,
    Compatible,
    Compression,
    Header,
)
from vhostblk.block.drivers.qcow2.metadata import HeaderChange
from vhostblk.block.drivers.qcow2.snapshot_node import SnapshotNode
from vhostblk.block.drivers.qcow2.tables import OFFSETS, Codec, read_table
from vhostblk.block.edge import Edge
from vhostblk.block.execution import to_the_end
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError, ConfigError, ImageError

_PIECE = 1 << 20


class AmendNode(SnapshotNode, EncryptedNode):
    """The part of a qcow2 node that changes what the image is like."""

    @classmethod
    def amend_options_type(cls) -> type[Any] | None:
        """See `amend_options.py`."""
        return amend_options.Qcow2AmendOptions

    _clusters: Clusters
    _data: Edge

    async def driver_amend(
        self,
        options: amend_options.Qcow2AmendOptions,
        progress: Callable[[int, int], None],
        *,
        force: bool = False,
    ) -> None:
        """Upgrade first, because other changes may need that, and downgrade last."""
        options.check(self._header)
        if self._is_corrupt:
            raise BlockError(errno.EIO, f"{self.node_name}: image is corrupt")
        version = options.compat or self._header.version
        keys = options.key_change(self._header.crypt)
        steps = [
            (self._upgrade, version > self._header.version),
            (lambda: self._change_keys(keys, force=force), keys is not None),
            (
                lambda: self._set_refcount_bits(options.refcount_bits),
                options.refcount_bits is not None,
            ),
            (lambda: self._set_features(options), True),
            (lambda: pipeline.truncate(self, options.size or 0), bool(options.size)),
            (self._downgrade, version < self._header.version),
        ]
        if version < self._header.version:
            size = options.size or self._header.size
            await self._check_snapshots(size)
            if self.is_encrypted and self._has_backing and await self._snapshots_have_zeroes():
                raise ConfigError(
                    "Cannot downgrade an encrypted image with zero clusters in snapshots",
                    errno.ENOTSUP,
                )
            if any(bitmap.persistent for bitmap in self.bitmaps):  # stored or not
                raise ConfigError(
                    "Cannot downgrade an image with persistent bitmaps", errno.ENOTSUP
                )
        wanted = [step for step, is_wanted in steps if is_wanted]
        for done, step in enumerate(wanted):
            progress(done, len(wanted))
            try:
                await step()
            except ImageError as error:
                raise await self._corrupt(error) from None
        progress(len(wanted), len(wanted))

    async def _rewrite(self, change: Callable[[Header], HeaderChange]) -> None:
        """Another header, when everything that it is about is on the disk."""
        await self._settle()
        await self._file.flush()
        await to_the_end(self._use_header(self._metadata.change_header(change)))

    async def _use_header(self, write: Coroutine[Any, Any, None]) -> None:
        """Write a header and read anew what follows from it; or put back what was there."""
        before = self._metadata.header
        try:
            await write
            await self._file.flush()
        except BlockError as error:
            try:
                await self._metadata.write_header(**_counts_of(before))
                await self._file.flush()
            except BlockError:
                raise self._give_up(f"the header could not be written: {error.strerror}") from None
            raise
        try:
            await self._reload()
        except ConfigError as error:
            raise self._give_up(f"the tables could not be read again: {error}") from None

    async def _settle(self) -> None:
        await self._metadata.finish()

    # ------------------------------------------------------------------ features

    async def _set_features(self, options: amend_options.Qcow2AmendOptions) -> None:
        header = self._header
        new = replace(header, extensions=_with_data_file(header, options.data_file))
        if options.data_file_raw is False:
            new = replace(new, autoclear=new.autoclear & ~AutoClear.RAW_DATA_FILE)
        if options.lazy_refcounts is not None:
            rest = new.compatible & ~Compatible.LAZY_REFCOUNTS
            lazy = Compatible.LAZY_REFCOUNTS if options.lazy_refcounts else 0
            new = replace(new, compatible=rest | lazy)
        if new == header:
            return

        def change(old: Header) -> HeaderChange:
            changed = replace(
                old,
                extensions=new.extensions,
                autoclear=new.autoclear,
                compatible=new.compatible,
                backing_offset=0,
            )
            return _changed(old, changed, _without_names(changed))

        await self._rewrite(change)

    # ------------------------------------------------------------------ versions

    async def _upgrade(self) -> None:
        if any(one.disk_size is None for one in (await self._snapshots()).snapshots):
            # Version 3 wants to know it.
            await self._change_snapshots(lambda change: change.rewrite())

        def change(old: Header) -> HeaderChange:
            bare = _without_names(replace(old, version=3, backing_offset=0))
            names = feature_names(old.cluster_size)
            return _changed(old, replace(bare, extensions=bare.extensions + names), bare)

        await self._rewrite(change)

    async def _check_snapshots(self, size: int) -> None:
        table = await self._snapshots()
        # A size that is not said is that of the disk.
        if any(
            one.vm_state_size >> 32 or one.disk_size not in (None, size) for one in table.snapshots
        ):
            raise ConfigError("Internal snapshots prevent downgrade of image", errno.ENOTSUP)
        for one in table.snapshots:
            one.check_l1(self._header.cluster_size)
        if self._header.compression != Compression.ZLIB:
            await self._settle()
            active = self._header.l1_offset, self._header.l1_entries
            for l1 in (active, *((one.l1_offset, one.l1_entries) for one in table.snapshots)):
                async for entry in self._entries_of(*l1):
                    if entry & COMPRESSED:
                        raise ConfigError(
                            "Cannot downgrade an image with zstd compression type and existing compressed clusters",
                            errno.ENOTSUP,
                        )

    async def _entries_of(self, offset: int, entries: int) -> AsyncIterator[int]:
        """Of all L2 tables of an L1 table."""
        for table in await read_table(self._file, offset, entries):
            if table & OFFSET_MASK:
                words = self._header.cluster_size // 8
                for entry in await read_table(self._file, table & OFFSET_MASK, words):
                    yield entry

    @property
    def _has_backing(self) -> bool:
        return "backing" in self.children or bool(self._header.backing_name)

    async def _downgrade(self) -> None:
        has_backing = self._has_backing
        await self._expand_zeroes(has_backing=has_backing)
        if await self._snapshots_have_zeroes():
            await self._change_snapshots(
                lambda change: change.without_zeroes(has_backing=has_backing)
            )

        def change(old: Header) -> HeaderChange:
            new = replace(
                _without_names(old),
                version=2,
                incompatible=0,
                compatible=0,
                autoclear=0,
                compression=Compression.ZLIB,
                unknown=b"",
                backing_offset=0,
            )
            return _changed(old, new)

        await self._rewrite(change)

    async def _snapshots_have_zeroes(self) -> bool:
        for one in (await self._snapshots()).snapshots:
            async for entry in self._entries_of(one.l1_offset, one.l1_entries):
                if entry & (ZERO | COMPRESSED) == ZERO:
                    return True
        return False

    async def _expand_zeroes(self, *, has_backing: bool) -> None:
        """Zero clusters become clusters of zeroes; or nothing, where nothing is below."""
        clusters, metadata = self._clusters, self._metadata
        size, end = self._header.cluster_size, metadata.l1_covers
        changes = resize.Resize(metadata, clusters, self._file, self._data, 0)
        at = 0
        while at < end:
            run = await clusters.run(at, end)
            if run.kind is Kind.ZERO and has_backing:
                stop = min(run.end, at + max(_PIECE, size))
                await clusters.write(at, IoVec.of(bytes(stop - at)))
                at = stop
                continue
            if run.kind is Kind.ZERO:
                await changes.forget(at, run.end)
            at = run.end

    # ------------------------------------------------------------------ reference counts

    async def _set_refcount_bits(self, bits: int | None) -> None:
        header, refcounts = self._header, self._metadata.refcounts
        order = (bits or 1).bit_length() - 1
        if order == header.refcount_order:
            return
        await self._settle()
        codec, size = Codec(order), header.cluster_size
        per_block = size * 8 >> order
        old_tables = {offset // size for offset in refcounts.block_offsets()}
        first = header.refcount_table_offset // size
        old_tables.update(range(first, first + header.refcount_table_clusters))
        async with refcounts.end() as end_offset:
            end = end_offset // size
        blocks, table = layout.refcount_clusters(end, size, order)
        total = end + blocks + table
        new = replace(
            header,
            refcount_order=order,
            refcount_table_offset=(end + blocks) * size,
            refcount_table_clusters=table,
        )
        try:
            new.check()
        except ImageError as error:
            raise BlockError(errno.EFBIG, str(error)) from None
        largest, bad = codec.largest, None
        for index in range(blocks):
            counts = codec.decode(bytes(size))
            there = await refcounts.counts(
                index * per_block, min(per_block, total - index * per_block)
            )
            for at, count in enumerate(there):
                cluster = index * per_block + at
                if cluster >= end:
                    counts[at] = 1
                elif cluster in old_tables:
                    counts[at] = count - 1
                elif count > largest:
                    bad = cluster, count
                    break
                else:
                    counts[at] = count
            if bad is not None:
                raise ConfigError(
                    f"Cannot decrease refcount entry width to {bits} bits: Cluster at offset "
                    f"{bad[0] * size:#x} has a refcount of {bad[1]}"
                )
            await self._file.pwritev((end + index) * size, IoVec.of(codec.encode(counts)))
        entries = OFFSETS.decode(bytes(table * size))
        for index in range(blocks):
            entries[index] = (end + index) * size
        await self._file.pwritev((end + blocks) * size, IoVec.of(OFFSETS.encode(entries)))
        await self._file.flush()
        fields = _counts_of(new)
        await to_the_end(self._use_header(self._metadata.write_header(**fields)))


def _changed(old: Header, *wanted: Header) -> HeaderChange:
    """The first of these headers that fits to where things are, or else the last."""
    try:
        return rewritten(old, wanted)
    except BlockError as error:
        if error.errno != errno.ENOSPC:
            raise
    return header_change.change(old, wanted[-1])


def _without_names(header: Header) -> Header:
    """Those of features are for messages only, and may be in the way."""
    left = tuple(e for e in header.extensions if e.type != ExtensionType.FEATURE_NAMES)
    return replace(header, extensions=left)


def _counts_of(header: Header) -> dict[str, int]:
    """What the header says about reference counts."""
    return {
        "refcount_order": header.refcount_order,
        "refcount_table_offset": header.refcount_table_offset,
        "refcount_table_clusters": header.refcount_table_clusters,
    }


def _with_data_file(header: Header, name: str | None) -> tuple[Extension, ...]:
    if name is None:
        return header.extensions
    says = Extension(ExtensionType.DATA_FILE, name.encode(errors="surrogateescape"))
    if name and header.data_file_name:
        return tuple(says if old.type == says.type else old for old in header.extensions)
    others = tuple(old for old in header.extensions if old.type != says.type)
    return (says, *others) if name else others
