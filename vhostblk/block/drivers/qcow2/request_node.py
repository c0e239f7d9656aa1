"""What a qcow2 node does with requests.

Theory of operation: a request is cut into runs (`entries.py`), each of which comes from one place: the image's file or
external data file, the backing file, a compressed cluster, or nowhere. How clusters get a place is in `clusters.py`,
what the engine may do by itself in `extents.py`.

Context: the control loop. Knows nothing about opening.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from vhostblk.block.drivers.qcow2 import unwritten
from vhostblk.block.drivers.qcow2.check_node import CheckNode
from vhostblk.block.drivers.qcow2.clusters import Clusters
from vhostblk.block.drivers.qcow2.compressed import ClusterCodec
from vhostblk.block.drivers.qcow2.compressing import CompressedWrites
from vhostblk.block.drivers.qcow2.data_file import RawDataFile
from vhostblk.block.drivers.qcow2.entries import STATUS_FLAGS, Kind, Run
from vhostblk.block.drivers.qcow2.extents import Qcow2Extents
from vhostblk.block.drivers.qcow2.first_writes import FirstWrites
from vhostblk.block.edge import Edge
from vhostblk.block.extent import FlushTarget, HostExtent, Ranges, Writer
from vhostblk.block.flags import Req, StatusFlag
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import SECTOR_SIZE, align_down, align_up
from vhostblk.block.pipeline import flush_target
from vhostblk.block.roles import Role
from vhostblk.block.status import BlockStatus, StatusRuns, status_above
from vhostblk.errors import BlockError, ImageError

if TYPE_CHECKING:
    from vhostblk.block.crypto.encrypted_file import Encryption

T = TypeVar("T")

_READ_EVENTS = {
    Kind.NORMAL: "read_aio",
    Kind.COMPRESSED: "read_compressed",
    Kind.UNALLOCATED: "read_backing_aio",
}
_DATA, _OFFSET_VALID = int(StatusFlag.DATA), int(StatusFlag.OFFSET_VALID)
_RECURSE = int(StatusFlag.RECURSE)
_IN_FILE = _DATA | _OFFSET_VALID
_MAY_UNMAP = int(Req.MAY_UNMAP)
_WRITE_COMPRESSED = int(Req.WRITE_COMPRESSED)


class RequestNode(CheckNode, Qcow2Extents):
    """The part of a qcow2 node that answers requests."""

    supported_write_flags = _WRITE_COMPRESSED
    supported_zero_flags = _MAY_UNMAP | int(Req.NO_FALLBACK)
    prepares_writes = True
    _clusters: Clusters
    _compressing: CompressedWrites
    _first_writes: FirstWrites
    _raw_data: RawDataFile | None
    _codec: ClusterCodec
    _is_sparse: bool | None = None
    _encryption: Encryption | None = None

    # ------------------------------------------------------------------ where bytes come from

    async def _run(self, offset: int, limit: int, since: int | None = None) -> Run:
        """The run around `offset`; no need to know what is behind `limit`, or before `since` (absent: `offset`).

        Raises:
            BlockError: EIO: the image is damaged there, or the child's errno.
        """
        try:
            return await self._clusters.run(offset, limit, since)
        except ImageError as error:
            raise await self._corrupt(error) from None

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        """Run by run; nobody moves what is being read."""
        if self.read_only:
            await self._read(offset, iov)
            return
        async with self._clusters.locks.held(offset, offset + length, alone=False):
            await self._read(offset, iov)

    async def _read(self, offset: int, iov: IoVec) -> None:
        end, at = offset + iov.length, offset
        while at < end:
            count = end - at
            if self.length <= at < self._vm_state_offset:
                iov.zero(at - offset, count)
                return
            run = await self._run(at, end)
            count = min(run.end, end) - at
            part = iov if count == iov.length else iov.slice(at - offset, count)
            if self._file.node.has_debug_events and run.kind in _READ_EVENTS:
                await self._file.debug_event(_READ_EVENTS[run.kind])
            if run.kind is Kind.NORMAL and self._encryption is not None:
                await self._encryption.read(self._data, at, run.host + at - run.start, part)
            elif run.kind is Kind.NORMAL:
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
        cluster = await asyncio.to_thread(
            self._codec.decompress, bytes(data), self._header.cluster_size
        )
        iov.copy_from(memoryview(cluster)[skip : skip + iov.length])

    # ------------------------------------------------------------------ a guest's saved state

    @property
    def _vm_state_offset(self) -> int:
        """The end of what the L1 table has to be for, for this disk; behind that is a guest's saved state."""
        header = self._header
        return header.l1_entries_needed(header.size) * header.cluster_size * header.l2_entries

    async def driver_load_vm_state(self, offset: int, iov: IoVec) -> None:
        """As if the disk went on."""
        self._check_vm_state(offset, iov)
        await self._file.debug_event("vmstate_load")
        try:
            await self._read(self._vm_state_offset + offset, iov)
        except ImageError as error:
            raise await self._corrupt(error) from None

    async def driver_save_vm_state(self, offset: int, iov: IoVec) -> None:
        """As if the disk went on; the L1 table grows if it has to."""
        self._check_vm_state(offset, iov)
        await self._file.debug_event("vmstate_save")
        await self._change(self._save_vm_state(self._vm_state_offset + offset, iov))

    def _check_vm_state(self, offset: int, iov: IoVec) -> None:
        if self.is_encrypted and (offset | iov.length) % SECTOR_SIZE:
            raise BlockError(errno.EINVAL, f"{self.node_name}: encrypted by whole sectors only")

    async def _save_vm_state(self, place: int, iov: IoVec) -> None:
        await self._metadata.make_room(place + iov.length)
        self._header = self._metadata.header
        await self._clusters.write(place, iov)

    # ------------------------------------------------------------------ writing

    async def _moved(self, start: int, end: int) -> None:
        """Other clusters are shown now: nobody may use the old ones, nor flush without the tables."""
        self.moves += 1
        await self.revoke_flush()
        end = min(end, self.length)
        if start < end:
            await self.revoke(start, end - start)

    async def driver_prepare_writes(
        self, ranges: Ranges, writer: Writer = Writer.REGULAR
    ) -> tuple[list[HostExtent], Ranges]:
        """Clusters get a place; those of external data files have one."""
        if self._data is not self._file:
            return [], ranges
        backing = self.children.get("backing")
        backed = backing.node.length if backing is not None else 0
        new, there = await self._change(self._prepare(ranges, backed, writer))
        return await self._extents_of(new), there

    async def _prepare(
        self, ranges: Ranges, backed: int, writer: Writer
    ) -> tuple[list[Run], Ranges]:
        new, there = await self._first_writes.prepare(ranges, backed, writer)
        moves = self.moves
        await self._hand_down()
        # What was true until then has to be looked up again.
        return (new, there) if self.moves == moves else ([], ranges)

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        """In place, or to new clusters; or compressed."""
        if flags & _WRITE_COMPRESSED:
            if self._data is not self._file:
                raise BlockError(errno.ENOTSUP, f"{self.node_name}: not in an external data file")
            if self.is_encrypted:
                raise BlockError(errno.ENOTSUP, f"{self.node_name}: either compressed or encrypted")
            if not self._is_whole(offset, length, self.cluster_size):
                raise BlockError(errno.EINVAL, f"{self.node_name}: only whole clusters compress")
            if length:
                await self._change(self._compressing.write(offset, iov))
            else:
                # Nothing more comes: as QEMU does, the file ends with a whole sector.
                await self._file.truncate(self._file.node.length)
            return
        await self._change(self._clusters.write(offset, iov))

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        """By changing tables, where whole clusters or subclusters read as zeroes then; ENOTSUP else."""
        unit = self._header.subcluster_size
        unwritten = not self._is_whole(offset, length, unit)
        if unwritten:
            start, end = align_down(offset, unit), align_up(offset + length, unit)
            if self._raw_data is not None or not (
                await self._is_zero(start, offset) and await self._is_zero(offset + length, end)
            ):
                raise BlockError(errno.ENOTSUP)
            offset, length = start, end - start
        if self._raw_data is not None:
            await self._change(self._raw_data.pwrite_zeroes(offset, length, flags))
            return
        keep, discard = not flags & _MAY_UNMAP, False
        if self._header.version < 3:
            # No cluster of version 2 can say that it is zeroes; one that is given up is, if nothing is below.
            keep, discard = False, True
        length = self._with_last_cluster(offset, length)
        await self._change(
            self._clusters.clear(offset, length, keep=keep, discard=discard, unwritten=unwritten)
        )

    async def _is_zero(self, start: int, end: int) -> bool:
        """Whether a range is known to read as zeroes; what is behind the end of the disk is."""
        end = min(end, self.length)
        while start < end:
            found = await status_above(self, None, start, end - start)
            if not found.flags & StatusFlag.ZERO or not found.length:
                return False
            start += found.length
        return True

    async def driver_pdiscard(self, offset: int, length: int) -> None:
        """Clusters are given up; they read as zeroes then."""
        if not self._is_whole(offset, length, self._header.cluster_size):
            raise BlockError(errno.ENOTSUP)
        if self._raw_data is not None:
            await self._change(self._raw_data.pdiscard(offset, length))
            return
        length = self._with_last_cluster(offset, length)
        await self._change(self._clusters.clear(offset, length, keep=False, discard=True))

    def _with_last_cluster(self, offset: int, length: int) -> int:
        """Of a range that is to be cleared; the disk has perhaps a part of its last cluster only, and that is all."""
        end, size = offset + length, self.cluster_size
        is_whole = end >= self.length and align_down(end, size) >= offset
        return align_up(end, size) - offset if is_whole else length

    def _is_whole(self, offset: int, length: int, unit: int) -> bool:
        """Units only, except for the end of the disk."""
        end = offset + length
        return not offset % unit and (not end % unit or end >= self.length)

    async def _change(self, change: Coroutine[Any, Any, T]) -> T:
        try:
            self._check_whole()
            result = await change
            await self._hand_down()
            return result
        except ImageError as error:
            raise await self._corrupt(error) from None
        finally:
            change.close()

    async def _hand_down(self) -> None:
        """Whoever comes after us if we are killed finds what has completed, where somebody counts on that."""
        if self.is_outlived and self._metadata.is_dirty:
            await self._metadata.sync()

    def can_discard(self) -> bool:
        """Clusters that are given up are used again."""
        return not self.read_only

    # ------------------------------------------------------------------ what is where

    async def driver_block_status(self, offset: int, length: int, precise: bool) -> BlockStatus:
        """The run at `offset`, and where it is."""
        run = await self._run(offset, offset + length)
        count = min(run.end, offset + length) - offset
        flags = STATUS_FLAGS[run.kind]
        if not run.has_host or run.kind is Kind.COMPRESSED or self.is_encrypted:
            return BlockStatus(flags, count)
        if precise and run.kind is Kind.NORMAL and await self._has_unwritten():
            flags |= _RECURSE
        place = run.host + offset - run.start
        return BlockStatus(flags | _OFFSET_VALID, count, self._data.node, place)

    async def driver_block_statuses(self, offset: int, length: int) -> StatusRuns:
        """All that one slice of a table says."""
        recurse = not self.is_encrypted and await self._has_unwritten()
        try:
            found = await self._clusters.statuses(offset, offset + length)
        except ImageError as error:
            raise await self._corrupt(error) from None
        if self.is_encrypted:
            found = [(flags & ~_OFFSET_VALID, count, 0) for flags, count, _ in found]
        if recurse:
            found = [
                (flags | _RECURSE if flags & _IN_FILE == _IN_FILE else flags, count, place)
                for flags, count, place in found
            ]
        return StatusRuns(found, self._data.node)

    async def _has_unwritten(self) -> bool:
        """Whether clusters have a place in the file that were never written, as far as one can see from its size."""
        if self._is_sparse is None:
            self._is_sparse = await unwritten.is_sparse(self._file, self._header)
        return self._is_sparse

    def has_zero_init(self) -> bool:
        """As long as nothing has a place; what is preallocated is as its file was."""
        try:
            if not self.length or not self._metadata.l2_table(0):
                return True
        except ImageError:
            return False
        return not self.is_encrypted and self._data.node.has_zero_init()

    # ------------------------------------------------------------------ the engine

    def flush_target(self) -> int | FlushTarget:
        """The file's, while no table waits to be written."""
        if self.read_only:
            return FlushTarget.NOTHING
        if self._metadata.is_dirty or self._data is not self._file:
            return FlushTarget.ASK
        return flush_target(self._file.node)

    async def child_revoke(self, edge: Edge, offset: int, length: int) -> None:
        """A backing file has our offsets; what is where in the image is not worth knowing."""
        if edge.role & Role.COW:
            end = min(offset + length, self.length)
            if offset < end:
                await self.revoke(offset, end - offset)
        else:
            await super().child_revoke(edge, offset, length)
