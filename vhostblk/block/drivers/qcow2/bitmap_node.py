"""What a qcow2 node does about dirty bitmaps that its image keeps: `block/dirty_bitmap.py` has what they are.

Theory of operation: bitmaps are loaded when the image is opened. Who may write says in the image that they are in use,
before anything is written; one that is found in use was not stored, and is inconsistent. All are stored when the image
is closed, given away, or not to be written any more.

Context: the control loop; nothing is in flight in the node.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from vhostblk.block.dirty_bitmap import DirtyBitmap, release_bitmap
from vhostblk.block.dirty_map import DirtyMap, collect
from vhostblk.block.drivers.qcow2 import bitmap_store
from vhostblk.block.drivers.qcow2.bitmaps import (
    MAX_BITMAPS,
    MAX_BYTES,
    MAX_DIRECTORY,
    MAX_GRANULARITY_BITS,
    MAX_NAME,
    BitmapEntry,
    BitmapFlag,
    bytes_needed,
)
from vhostblk.block.drivers.qcow2.check_node import CheckNode
from vhostblk.block.limits import align_up
from vhostblk.errors import BlockError, ConfigError, ImageError

if TYPE_CHECKING:
    from vhostblk.block.drivers.qcow2.bitmap_store import BitmapStore, Bits

log = logging.getLogger(__name__)


class BitmapNode(CheckNode):
    """The part of a qcow2 node that knows of bitmaps.

    Attributes: _bitmap_store: None: the image's bitmaps were not loaded.
    """

    _bitmap_store: BitmapStore | None = None

    # ------------------------------------------------------------------ coming and going

    async def _load_bitmaps(self) -> None:
        """Make those that the image has; who may write is told in the image, when this returns.

        Raises:
            ConfigError: they are damaged; who only reads does without them.
        """
        self._forget_bitmaps()
        if self.for_check:
            return
        try:
            store = await bitmap_store.BitmapStore.load(self._file, self._header)
            for entry in store.directory.bitmaps:
                self._add(entry, await store.bits(entry) if _is_usable(entry) else None)
            self._bitmap_store = store
            if not self.read_only:
                await self._mark_in_use()
        except (ImageError, BlockError) as error:
            self._forget_bitmaps()
            if not self.read_only:
                raise ConfigError(f"Could not load the image's bitmaps: {error}") from None
            log.warning("node '%s': bitmaps are not usable: %s", self.node_name, error)

    def _add(self, entry: BitmapEntry, bits: bytes | None) -> None:
        dirty = DirtyMap(self.length, entry.granularity)
        if bits is not None:
            dirty.load(bits)
        enabled = bits is not None and bool(entry.flags & BitmapFlag.AUTO)
        self.bitmaps.insert(
            0,
            DirtyBitmap(
                *(self, entry.name, dirty),
                enabled=enabled,
                persistent=True,
                inconsistent=bits is None,
                readonly=self.read_only,
            ),
        )
        if enabled:
            self.write_log.dirty_maps.append(dirty)  # nobody has extents yet

    def _forget_bitmaps(self) -> None:
        """Those of the image; it is about to be somebody else's."""
        for bitmap in tuple(self.bitmaps):
            if bitmap.persistent:
                release_bitmap(bitmap)
        self._bitmap_store = None

    async def _mark_in_use(self) -> None:
        assert self._bitmap_store is not None
        # One whose extra data nobody here knows is left as it is, unless it had to follow what is written.
        names = {
            entry.name
            for entry in self._bitmap_store.directory.bitmaps
            if _is_known(entry) or entry.flags & BitmapFlag.AUTO
        }
        await self._bitmap_store.mark_in_use(names)

    async def _store_bitmaps(self) -> None:
        """What is in memory is in the image when this returns; it is not in use any more.

        Raises:
            BlockError: EBUSY: somebody works on one; EIO: the image is damaged; the child's errno.
        """
        if self._bitmap_store is None or self.read_only or self._is_corrupt:
            return
        kept = {entry.name: at for at, entry in enumerate(self._bitmap_store.directory.bitmaps)}
        bitmaps = sorted(
            (bitmap for bitmap in self.bitmaps if bitmap.persistent),
            key=lambda bitmap: kept.get(bitmap.name or "", len(kept)),
        )
        if bitmaps or kept:
            await self._write_bitmaps([self._wanted(bitmap) for bitmap in bitmaps])

    async def _write_bitmaps(self, wanted: list[Bits]) -> None:
        assert self._bitmap_store is not None
        try:
            await self._bitmap_store.store(self._metadata, wanted)
        except ImageError as error:
            raise BlockError(errno.EIO, str(error)) from None
        self._header = self._metadata.header

    def _wanted(self, bitmap: DirtyBitmap) -> Bits:
        """A bitmap, as it is to be stored."""
        assert self._bitmap_store is not None
        assert bitmap.name is not None
        old = self._bitmap_store.find(bitmap.name)
        if bitmap.inconsistent:
            assert old is not None
            return bitmap_store.Bits(old)
        collect(self)
        dirty = DirtyMap(bitmap.map.length, bitmap.granularity)
        dirty.merge(bitmap.map)
        if bitmap.successor is not None:
            dirty.merge(bitmap.successor.map)
        entry = BitmapEntry(bitmap.name, bitmap.granularity, 0, 0)
        if old is not None:
            entry = replace(
                entry, extra=old.extra, flags=old.flags & BitmapFlag.EXTRA_DATA_COMPATIBLE
            )
        if bitmap.is_recording:
            entry = replace(entry, flags=entry.flags | BitmapFlag.AUTO)
        return bitmap_store.Bits(entry, dirty.to_bytes())

    async def _store_bitmaps_at_last(self) -> None:
        """The image is closed; what cannot be stored is said to be in use already."""
        try:
            await self._store_bitmaps()
        except BlockError as error:
            log.error("node '%s': lost persistent bitmaps: %s", self.node_name, error)

    # ------------------------------------------------------------------ reopening

    async def _give_bitmaps_away(self) -> None:
        """The image is about to be somebody else's.

        Raises:
            ConfigError: EBUSY: somebody works on a bitmap; or the image could not be written. They are still ours.
        """
        await self._store_or_stay()
        self._forget_bitmaps()

    async def _bitmaps_become_readonly(self) -> None:
        """Before the image is not written any more; raises ConfigError as `_give_bitmaps_away`."""
        await self._store_or_stay()
        for bitmap in self.bitmaps:
            bitmap.readonly = bitmap.persistent

    async def _store_or_stay(self) -> None:
        for bitmap in self.bitmaps:
            if bitmap.persistent and bitmap.busy:
                bitmap.check()
        try:
            await self._store_bitmaps()
        except BlockError as error:
            await self._bitmaps_become_writable()
            raise ConfigError(
                f"Could not store the bitmaps of node '{self.node_name}': {error.strerror}",
                error.errno or errno.EIO,
            ) from None

    async def _bitmaps_become_writable(self) -> None:
        """Before the image is written; if the image cannot be told, nobody writes it."""
        if self._bitmap_store is None:
            return
        try:
            # Whatever was stored, or not.
            self._bitmap_store = await bitmap_store.BitmapStore.load(
                self._file, self._metadata.header
            )
            await self._mark_in_use()
        except (BlockError, ImageError) as error:
            self._is_corrupt = True
            log.error(
                "node '%s': bitmaps are not writable, so nothing is: %s", self.node_name, error
            )
        for bitmap in self.bitmaps:
            bitmap.readonly = False

    # ------------------------------------------------------------------ for users

    def keeps_bitmaps(self) -> bool:
        """Since version 3."""
        return self._header.version >= 3

    def driver_check_bitmap(self, name: str, granularity: int) -> None:
        """Raises ConfigError: what the format, or the number of bitmaps, does not allow."""
        try:
            self._check_new_bitmap(name, granularity)
        except ConfigError as error:
            raise ConfigError(
                f"Can't make bitmap '{name}' persistent in '{self.node_name}': {error}",
                error.errno,
            ) from None

    def _check_new_bitmap(self, name: str, granularity: int) -> None:
        if self._header.version < 3:
            raise ConfigError("Cannot store dirty bitmaps in qcow2 v2 files", errno.ENOTSUP)
        if self.read_only or self.inactive or self._bitmap_store is None:
            raise ConfigError("the image cannot be written", errno.EPERM)
        if granularity >> (MAX_GRANULARITY_BITS + 1):
            raise ConfigError(f"Granularity exceeds maximum ({1 << MAX_GRANULARITY_BITS} bytes)")
        size = bytes_needed(self.length, granularity)
        if align_up(size, self._header.cluster_size) > MAX_BYTES:
            raise ConfigError(
                "Too much space will be occupied by the bitmap. Use larger granularity"
            )
        if len(name.encode(errors="surrogateescape")) > MAX_NAME:
            raise ConfigError(f"Name length exceeds maximum ({MAX_NAME} characters)")
        kept = [bitmap for bitmap in self.bitmaps if bitmap.persistent]
        if len(kept) >= MAX_BITMAPS:
            raise ConfigError("Maximum number of persistent bitmaps is already reached")
        names = [name, *(bitmap.name or "" for bitmap in kept)]
        entries = (BitmapEntry(one, granularity, 0, 0) for one in names)
        if sum(len(entry.to_bytes()) for entry in entries) > MAX_DIRECTORY:
            raise ConfigError("Not enough space in the bitmap directory")

    async def driver_remove_bitmap(self, name: str) -> None:
        """Raises BlockError: EIO: the image is damaged; the child's errno."""
        if self._bitmap_store is None or self._bitmap_store.find(name) is None:
            return  # it would have been stored later
        if self._is_corrupt:
            raise BlockError(errno.EIO, f"{self.node_name}: image is corrupt")
        await self._write_bitmaps(
            [
                bitmap_store.Bits(entry)
                for entry in self._bitmap_store.directory.bitmaps
                if entry.name != name
            ]
        )

    def _check_bitmaps_resizable(self) -> None:
        """Refuse a new length where bitmaps cannot follow.

        Raises:
            BlockError: ENOTSUP.
        """
        for bitmap in self.bitmaps:
            if bitmap.persistent:
                try:
                    bitmap.check()
                except ConfigError as error:
                    raise BlockError(errno.ENOTSUP, f"{self.node_name}: {error}") from None


def _is_known(entry: BitmapEntry) -> bool:
    return not entry.extra or bool(entry.flags & BitmapFlag.EXTRA_DATA_COMPATIBLE)


def _is_usable(entry: BitmapEntry) -> bool:
    return _is_known(entry) and not entry.flags & BitmapFlag.IN_USE
