"""The virtio-blk device in front of a block backend: what it offers, its configuration space, its requests.

VIRTIO 1.2 §5.2. Knows neither rings nor sessions: a `BlkRequest` comes in, a status and the number of bytes
written to the guest come out. In between it may have failed, waited and been tried again: see error_policy.py.

The write cache is the one the guest is told of: `writeback` starts as the backend's mode and follows what the driver
sets; without VIRTIO_BLK_F_FLUSH every write is durable when it completes (§5.2.6.2). What the driver set outlives the
connection, because the driver does: a front-end that reconnects does not tell us again. Only a device reset forgets it.

The field means something only to a driver that negotiated VIRTIO_BLK_F_CONFIG_WCE (§5.2.5). But a write to it cannot be
refused for the want of that: vhost-user tells us a driver's features when the device starts, and the driver may set the
field before. So it is always taken, and has an effect while the feature is negotiated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import mmap
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import ClassVar

from vhostblk.block.backend import BlockBackend
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode
from vhostblk.block.permissions import parents_first
from vhostblk.errors import BlockError, ConfigError
from vhostblk.export.again import Again
from vhostblk.export.error_log import ErrorLog
from vhostblk.export.error_policy import Action, ErrorPolicy
from vhostblk.export.parking import Parking
from vhostblk.export.statistics import OPERATION_OF
from vhostblk.virtio.blk import ID_BYTES, SECTOR, BlkConfig, RequestType, Status
from vhostblk.virtio.blk_request import BlkRequest
from vhostblk.virtio.chain import copy_to
from vhostblk.virtio.features import Feature

# QEMU's queues have 128 entries unless told otherwise; two of them are the header and the status.
SEG_MAX = 126
# The largest request of the block layer (B02) in sectors: bounds one segment.
_MAX_SECTORS = 4194303

_EVERY_PAGE = slice(None, None, mmap.PAGESIZE)

# status, data bytes written to the guest
Outcome = tuple[int, int]
_IOERR: Outcome = (int(Status.IOERR), 0)
_OK: Outcome = (int(Status.OK), 0)
_POLICY = ErrorPolicy()


class BlkDevice:
    """One virtio-blk device.

    Args:
        backend: the disk; its write permission decides whether the device is read-only.
        serial: what GET_ID answers, at most 20 bytes of UTF-8.
        num_queues: virtqueues offered.
        max_segments: segments of a DISCARD or WRITE_ZEROES request.
        logical_block_size: bytes; None: the disk's own.
        errors: where failed requests are counted.
        policy: what becomes of requests that the disk fails.

    Raises:
        ConfigError: the serial is too long, or the logical block size is smaller than the disk's.

    Context: the control loop.
    """

    def __init__(
        self,
        backend: BlockBackend,
        *,
        serial: str,
        num_queues: int,
        max_segments: int,
        logical_block_size: int | None,
        errors: ErrorLog,
        policy: ErrorPolicy = _POLICY,
    ) -> None:
        self.backend = backend
        self.serial = os.fsencode(serial)  # a command line may hold any bytes
        if len(self.serial) > ID_BYTES:
            raise ConfigError(f"serial '{serial}': at most {ID_BYTES} bytes")
        sizes = backend.block_sizes
        if logical_block_size is None:
            logical_block_size = sizes.logical
        elif logical_block_size < sizes.logical:
            raise ConfigError(
                f"logical-block-size={logical_block_size}: the disk's own is {sizes.logical}"
            )
        self.logical_block_size = logical_block_size
        self._num_queues = num_queues
        self.max_segments = max_segments
        self._errors = errors
        self._log = logging.getLogger(__name__)
        self._configured_writeback = backend.write_cache
        self.writeback = backend.write_cache
        """The mode of the write cache that the driver was told, or has set."""
        self.is_drivers_mode = False
        """It has set it."""
        self.offered_features = self._offer()
        self.features = 0
        self.medium = 0
        """Which disk it is: grows when the export gets another."""
        self.policy = policy
        self.parking = Parking()
        """Whoever waits for requests to end must close it meanwhile."""
        self._look = Again(self._look_at_devices)
        self.on_io_error: Callable[[bool, Action, int], None] = lambda _is_read, _action, _error: (
            None
        )
        """Told of each request that the disk has failed: whether it was a read, what is done about it, errno."""
        self.memory_faulted: Callable[[], bool] = lambda: False
        """Whether the front-end has truncated memory that was used since; the data path knows."""

    @property
    def read_only(self) -> bool:
        """Whether the guest may not write."""
        return not self.backend.writable

    @property
    def capacity(self) -> int:
        """Bytes the guest sees: whole sectors."""
        return self.backend.length // SECTOR * SECTOR

    def _offer(self) -> int:
        # SIZE_MAX is not offered: there is no limit that its field could name (field.md L5).
        offered = (
            Feature.VIRTIO_F_VERSION_1
            | Feature.VIRTIO_F_EVENT_IDX
            | Feature.VIRTIO_F_INDIRECT_DESC
            | Feature.VIRTIO_F_RING_PACKED
            | Feature.VIRTIO_BLK_F_SEG_MAX
            | Feature.VIRTIO_BLK_F_BLK_SIZE
            | Feature.VIRTIO_BLK_F_TOPOLOGY
            | Feature.VIRTIO_BLK_F_FLUSH
            | Feature.VIRTIO_BLK_F_CONFIG_WCE
            | Feature.VIRTIO_BLK_F_MQ
        )
        if self.read_only:
            offered |= Feature.VIRTIO_BLK_F_RO
        else:
            offered |= Feature.VIRTIO_BLK_F_WRITE_ZEROES
            if self.backend.can_discard:
                offered |= Feature.VIRTIO_BLK_F_DISCARD
        return int(offered)

    def config(self) -> BlkConfig:
        """The configuration space as it is now."""
        sizes, limits, block = (
            self.backend.block_sizes,
            self.backend.limits,
            self.logical_block_size,
        )
        min_io = max(sizes.min_io // block, 1)
        config = BlkConfig(
            capacity=self.capacity // SECTOR,
            seg_max=SEG_MAX,
            blk_size=block,
            physical_block_exp=max(sizes.physical // block, 1).bit_length() - 1,
            # 16 bits: a stripe that does not fit is not told of, because half of one would be wrong.
            min_io_size=min_io if min_io <= 0xFFFF else 0,
            opt_io_size=sizes.opt_io // block,
            writeback=int(self.writeback and not self._cannot_flush),
            num_queues=self._num_queues,
        )
        if self.offered_features & Feature.VIRTIO_BLK_F_WRITE_ZEROES:
            config = dataclasses.replace(
                config,
                max_write_zeroes_sectors=_sectors(limits.max_pwrite_zeroes),
                max_write_zeroes_seg=self.max_segments,
                write_zeroes_may_unmap=int(self.backend.can_discard),
            )
        if self.offered_features & Feature.VIRTIO_BLK_F_DISCARD:
            alignment = max(limits.discard_unit, sizes.physical, block)
            config = dataclasses.replace(
                config,
                max_discard_sectors=_sectors(limits.max_pdiscard),
                max_discard_seg=self.max_segments,
                discard_sector_alignment=alignment // SECTOR,
            )
        return config

    @property
    def _cannot_flush(self) -> bool:
        """VIRTIO 1.2 §5.2.5.2: a driver that took CONFIG_WCE without FLUSH finds `writeback` at 0."""
        taken = self.features & (Feature.VIRTIO_BLK_F_CONFIG_WCE | Feature.VIRTIO_BLK_F_FLUSH)
        return taken == Feature.VIRTIO_BLK_F_CONFIG_WCE

    @property
    def write_through(self) -> bool:
        """Whether every write must be durable when it completes."""
        if not self.features & Feature.VIRTIO_BLK_F_FLUSH:
            return True
        has_field = self.features & Feature.VIRTIO_BLK_F_CONFIG_WCE
        return not (self.writeback if has_field else self._configured_writeback)

    def reset(self) -> None:
        """Forget what a driver negotiated and set."""
        self.writeback = self._configured_writeback
        self.is_drivers_mode = False
        self.set_features(0)

    def set_features(self, features: int) -> None:
        """Take what the driver acknowledged; the session has checked that all of it was offered."""
        self.features = features
        self.backend.write_cache = not self.write_through

    def write_config(self, offset: int, contents: bytes) -> None:
        """Take a write to the configuration space.

        If that made `write_through` true, the caller makes what has completed so far durable before it acknowledges.

        Raises:
            GuestError: it changes anything but `writeback` (VIRTIO 1.2 §5.2.5).
        """
        self.take_over(writeback=bool(self.config().write(offset, contents).writeback))

    def take_over(self, *, writeback: bool) -> None:
        """Have the write cache that the driver believes in: it has set it, here or with the device before this one.

        As for `write_config`, look at `write_through` before and after.
        """
        self.writeback = writeback
        self.is_drivers_mode = True
        self.backend.write_cache = not self.write_through

    async def execute(self, request: BlkRequest, error: int = 0) -> Outcome:
        """Do what a request asks.

        Args:
            request: one that was not refused; its data is live guest memory.
            error: errno with which somebody has failed it already; 0: nobody has tried.

        Returns:
            The VIRTIO_BLK_S_* status and the data bytes written to the guest.

        Raises:
            asyncio.CancelledError: nothing uses its memory any more, and it has to be answered, once, like any other
                (row B25): see `cancelled`. Nothing else.
        """
        if request.status is not None:
            if request.status == Status.IOERR:
                why = errno.EFAULT if request.is_incomplete else errno.EINVAL
                self.record_io_error(request.type, why, request.offset, request.length)
            return int(request.status), 0
        known = 0  # of the engine's attempt nobody knows when it began
        try:
            while True:
                if not error:
                    known = self.backend.revocations
                    try:
                        return await self._HANDLERS[request.type](self, request)
                    except BlockError as exc:
                        error = exc.errno or errno.EIO
                outcome = await self._failed(request, error, known)
                if outcome is not None:
                    return outcome
                error = 0
        except Exception:
            self._log.exception("a bug: request %s failed", RequestType(request.type).name)
        return _IOERR

    def cancelled(self, request: BlkRequest) -> Outcome:
        """What becomes of a request whose `execute` was cancelled, unless it is left in flight."""
        self.record_io_error(request.type, errno.ECANCELED, request.offset, request.length)
        return _IOERR

    async def _failed(self, request: BlkRequest, error: int, known: int) -> Outcome | None:
        """What becomes of a request that the disk has failed; None: try again.

        Args:
            known: revocations when it was tried.
        """
        is_read = request.type == RequestType.IN
        action = self.policy.action(error, is_read=is_read)
        if action is Action.STOP and self.parking.is_open and await self._has_changed(known):
            return None
        if action is Action.STOP and not (self.parking.is_open and self._is_inside(request)):
            action = Action.REPORT
        if action is Action.STOP:
            self.parking.note(error)
        else:
            self.record_io_error(
                request.type,
                error,
                request.offset,
                request.length,
                is_ignored=action is Action.IGNORE,
            )
        self.on_io_error(is_read, action, error)
        if action is Action.STOP and await self.parking.park():
            return None
        return _OK if action is Action.IGNORE else _IOERR

    async def _has_changed(self, known: int) -> bool:
        """Whether the disk may be another one than the one that has failed a request.

        Asked before anybody has to wait. A block device says ENOSPC behind its end, and if it was removed: nobody will
        make room there. And who makes room elsewhere, by a larger device, may have done so since. One look is for all
        that have failed before it.
        """
        if any(node.device_number is not None for node in self._nodes()):
            self._look.ask()
            await self._look.wait()
        return self.backend.revocations != known

    async def _look_at_devices(self) -> None:
        for node in self._nodes():
            if node.device_number is not None:
                with contextlib.suppress(BlockError):
                    await node.refresh_length()

    def _nodes(self) -> list[BlockNode]:
        return parents_first([self.backend.node])

    def _is_inside(self, request: BlkRequest) -> bool:
        """Whether there is such a place on the disk; it may have shrunk since the request was checked."""
        ends = [segment.offset + segment.length for segment in request.segments]
        return max(ends, default=request.offset + request.length) <= self.capacity

    def engine_failed(self, kind: int, error: int, offset: int, length: int) -> None:
        """The engine has failed a request by itself: it was refused, or it is a matter of course to report it.

        Args: see `record_io_error`.
        """
        self.record_io_error(kind, error, offset, length)
        if error != errno.EINVAL:
            self.on_io_error(kind == RequestType.IN, Action.REPORT, error)

    def record_io_error(
        self, kind: int, error: int, offset: int, length: int, *, is_ignored: bool = False
    ) -> None:
        """Count a request that has failed.

        Args:
            kind: `RequestType`, or anything else where there was no header to say it.
            error: positive errno; EINVAL if it broke a rule of `blk_request`.
            offset, length: bytes on the disk.
            is_ignored: the guest is told that it succeeded.
        """
        name = OPERATION_OF.get(kind, "a request without a header")
        if is_ignored:
            name += " (ignored)"
        self._errors.record_io_error(name, error, offset, length)

    async def _transfer(self, request: BlkRequest) -> Outcome:
        if request.type == RequestType.OUT:
            for view in request.data:
                view[_EVERY_PAGE].tobytes()
                view[-1]
            if self.memory_faulted():
                raise BlockError(errno.EFAULT)
            await self.backend.pwritev(request.offset, IoVec(request.data))
            return _OK
        await self.backend.preadv(request.offset, IoVec(request.data))
        return _OK[0], request.length

    async def _flush(self, _request: BlkRequest) -> Outcome:
        await self.backend.flush()
        return _OK

    async def _get_id(self, request: BlkRequest) -> Outcome:
        return int(Status.OK), copy_to(request.data, self.serial.ljust(ID_BYTES, b"\0"))

    async def _discard(self, request: BlkRequest) -> Outcome:
        if not self.features & Feature.VIRTIO_BLK_F_DISCARD:
            return int(Status.UNSUPP), 0
        medium = self.medium
        for segment in request.segments:
            if self.backend.quiesced:
                await self._resumed(medium)
            await self.backend.pdiscard(segment.offset, segment.length)
        return _OK

    async def _write_zeroes(self, request: BlkRequest) -> Outcome:
        medium = self.medium
        for segment in request.segments:
            if self.backend.quiesced:
                await self._resumed(medium)
            await self.backend.pwrite_zeroes(
                segment.offset, segment.length, may_unmap=segment.unmap
            )
        return _OK

    async def _resumed(self, medium: int) -> None:
        """Wait for the end of a drain: no request is done on two disks (row B38)."""
        await self.backend.resumed()
        if self.medium != medium:
            raise BlockError(errno.ENOMEDIUM)

    _HANDLERS: ClassVar[Mapping[int, Callable[[BlkDevice, BlkRequest], Awaitable[Outcome]]]] = {
        RequestType.IN: _transfer,
        RequestType.OUT: _transfer,
        RequestType.FLUSH: _flush,
        RequestType.GET_ID: _get_id,
        RequestType.DISCARD: _discard,
        RequestType.WRITE_ZEROES: _write_zeroes,
    }


def _sectors(limit: int) -> int:
    """A limit of the block layer (0: none) in sectors."""
    return min(limit // SECTOR, _MAX_SECTORS) if limit else _MAX_SECTORS
