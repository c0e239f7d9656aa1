"""What a qcow2 node does about internal snapshots: the driver's half of `block/internal_snapshot.py`.

Context: the control loop; nothing is in flight in the node.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING

from vhostblk.block import internal_snapshot
from vhostblk.block.drivers.qcow2 import snapshot_changes
from vhostblk.block.drivers.qcow2.bitmap_node import BitmapNode
from vhostblk.block.drivers.qcow2.header import Header
from vhostblk.block.drivers.qcow2.snapshots import (
    NO_ICOUNT,
    Snapshot,
    SnapshotTable,
    load_snapshots,
)
from vhostblk.block.execution import to_the_end
from vhostblk.block.limits import SECTOR_SIZE, align_down
from vhostblk.errors import BlockError, ConfigError, ImageError

if TYPE_CHECKING:
    from vhostblk.block.drivers.qcow2.shadow import Shadow
    from vhostblk.block.drivers.qcow2.snapshot_changes import Build
    from vhostblk.block.internal_snapshot import SnapshotInfo

log = logging.getLogger(__name__)

# Discards are a hint; what is freed in more pieces than this is used again anyway.
_MOST_DISCARDS = 1 << 16


class SnapshotNode(BitmapNode):
    """The part of a qcow2 node that knows of snapshots.

    Attributes: _shown: the snapshot that a read-only node shows instead of what is active.
    """

    has_internal_snapshots = True
    _shown: str | None = None

    async def _load_tables(self) -> None:
        raise NotImplementedError

    async def driver_snapshots(self) -> tuple[SnapshotInfo, ...]:
        """As the image has them."""
        return tuple(self._info_of(one) for one in (await self._snapshots()).snapshots)

    async def driver_snapshot_create(
        self, snapshot: internal_snapshot.SnapshotInfo
    ) -> SnapshotInfo:
        """Raises BlockError: EEXIST, EFBIG; ENOTSUP: guest data are elsewhere; EINVAL: counts are too narrow."""
        table = await self._snapshots()
        made = Snapshot(
            l1_offset=0,
            l1_entries=0,
            id=snapshot.id or table.next_id(),
            name=snapshot.name,
            seconds=snapshot.seconds & 0xFFFF_FFFF,
            nanoseconds=snapshot.nanoseconds,
            vm_clock=snapshot.vm_clock,
            vm_state_size=snapshot.vm_state_size,
            disk_size=self._header.size,
            icount=NO_ICOUNT if snapshot.icount is None else snapshot.icount,
        )
        if table.find(made.id, None):
            raise BlockError(errno.EEXIST, f"there is a snapshot with ID '{made.id}'")
        await self._change_snapshots(lambda change: change.create(made))
        return self._info_of(made)

    async def driver_snapshot_delete(self, id_: str | None, name: str | None) -> SnapshotInfo:
        """Raises BlockError: ENOENT, ENOTSUP."""
        found = _existing((await self._snapshots()).find(id_, name))
        await self._change_snapshots(lambda change: change.delete(found))
        return self._info_of(found)

    async def driver_snapshot_goto(self, id_: str) -> None:
        """Raises BlockError: ENOENT, ENOTSUP."""
        found = _existing((await self._snapshots()).find(id_, None))
        try:
            found.check_l1(self._header.cluster_size)
        except BlockError as error:
            log.error("%s", error, extra={"qemu_reports": [error.strerror]})
            raise
        size = self._info_of(found).disk_size
        await self._change_snapshots(lambda change: change.go_to(found, size))
        self.set_length(align_down(self._header.size, SECTOR_SIZE))

    async def driver_snapshot_load(self, id_: str | None, name: str | None) -> SnapshotInfo:
        """Raises BlockError: ENOENT; EIO, EFBIG, EINVAL: it is damaged."""
        found = _existing((await self._snapshots()).find(id_, name))
        found.check_l1(self._header.cluster_size)
        before = self._header
        try:
            self._header = self._header_of(found)
            await self._load_tables()
        except (ConfigError, ImageError) as error:
            self._header = before
            raise BlockError(errno.EIO, str(error)) from None
        self._shown = found.id
        length = align_down(self._header.size, SECTOR_SIZE)
        if length != self.length:
            self._forget_bitmaps()  # they are of the disk as it is now
        self.set_length(length)
        return self._info_of(found)

    async def _reload(self) -> None:
        """Read anew what is, or was, on the disk."""
        self._header = await self._load_header()
        if self._shown is not None:
            try:
                found = (await self._snapshots()).find(self._shown, None)
                if found is None:
                    raise ConfigError(f"Can't find snapshot '{self._shown}'", errno.ENOENT)
                self._header = self._header_of(found)
            except (BlockError, ImageError) as error:
                raise ConfigError(f"Snapshot '{self._shown}' is not usable: {error}") from None
        await self._load_tables()

    async def _snapshots(self) -> SnapshotTable:
        try:
            return await load_snapshots(self._file, self._header)
        except ImageError as error:
            raise BlockError(errno.EIO, str(error)) from None

    def _info_of(self, one: Snapshot) -> SnapshotInfo:
        return internal_snapshot.SnapshotInfo(
            id=_shown(one.id, internal_snapshot.MAX_ID),
            name=_shown(one.name, internal_snapshot.MAX_NAME),
            seconds=one.seconds,
            nanoseconds=one.nanoseconds,
            vm_clock=one.vm_clock,
            vm_state_size=one.vm_state_size,
            disk_size=self._header.size if one.disk_size is None else one.disk_size,
            icount=None if one.icount == NO_ICOUNT else one.icount,
        )

    def _header_of(self, one: Snapshot) -> Header:
        """The header, if the snapshot were what is active."""
        size = self._header.size if one.disk_size is None else one.disk_size
        header = replace(
            self._header, size=size, l1_offset=one.l1_offset, l1_entries=one.l1_entries
        )
        header.check()
        return header

    async def _change_snapshots(self, build: Build) -> None:
        if self._header.has_data_file:
            raise BlockError(errno.ENOTSUP, "guest data are in an external data file")
        self._check_whole()
        await self._store(self._metadata.finish())
        await to_the_end(self._switch(build))

    async def _switch(self, build: Build) -> None:
        try:
            shadow = await snapshot_changes.switch(self._file, self._metadata, build)
        except ImageError as error:
            raise await self._corrupt(error) from None
        except snapshot_changes.HalfWrittenError as error:
            raise self._give_up(f"the header could not be written: {error}") from None
        if self.unmap:
            with contextlib.suppress(BlockError):  # it is a hint
                for offset, length in [run async for run in _first(shadow)]:
                    await self._file.pdiscard(offset, length)
        try:
            await self._reload()
        except ConfigError as error:
            raise self._give_up(f"the tables could not be read again: {error}") from None

    def _give_up(self, why: str) -> BlockError:
        self._is_corrupt = True
        log.error("node '%s': %s; open the image anew", self.node_name, why)
        return BlockError(errno.EIO, why)


def _shown(text: str, most: int) -> str:
    """What there is to see of a string in the table: as far as others read it."""
    return (
        text.partition("\0")[0]
        .encode(errors="surrogateescape")[:most]
        .decode(errors="surrogateescape")
    )


def _existing(found: Snapshot | None) -> Snapshot:
    if found is None:
        raise BlockError(errno.ENOENT, "Can't find the snapshot")
    return found


async def _first(shadow: Shadow) -> AsyncIterator[tuple[int, int]]:
    """What was freed, as far as it is worth while."""
    left = _MOST_DISCARDS
    async for run in shadow.freed():
        yield run
        left -= 1
        if not left:
            return
