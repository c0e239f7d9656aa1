"""One queue of the reference data path: its turns, its fds, its end.

The engine's twin is native/src/queue.c.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from vhostblk.errors import GuestError, PeerError
from vhostblk.export import event_fd
from vhostblk.export.eager import run_eagerly
from vhostblk.export.inflight import QueueInflight
from vhostblk.export.statistics import OPERATION_OF, QueueCounters
from vhostblk.vhost.dirty_log import DirtyLog
from vhostblk.vhost.inflight_packed import InflightPacked
from vhostblk.vhost.inflight_split import InflightSplit
from vhostblk.vhost.mem_table import MemTable
from vhostblk.vhost.vring import VringFd, VringSnapshot
from vhostblk.virtio import blk_request
from vhostblk.virtio.blk_request import BlkRequest
from vhostblk.virtio.chain import Broken
from vhostblk.virtio.features import Feature
from vhostblk.virtio.packed import PackedVirtqueue
from vhostblk.virtio.split import SplitVirtqueue
from vhostblk.virtio.virtqueue import Virtqueue

if TYPE_CHECKING:
    from vhostblk.export.python_path import PythonDataPath

# How long a ring without a kick fd rests between two looks, seconds.
POLL_INTERVAL = 0.0005


class PythonQueue:
    """One started queue.

    Args:
        path: whose queue it is: its device, and whether it may take requests.
        vring, features: as the front-end and the driver have them.
        inflight: where requests are tracked, or None.
        memory: the guest's.
        counters: where it is counted.

    Raises:
        PeerError: the ring is not in memory, or nobody can wait for its kick fd.

    Context: the control loop.
    Owns: the virtqueue; not the fds.
    """

    def __init__(
        self,
        path: PythonDataPath,
        vring: VringSnapshot,
        features: int,
        inflight: QueueInflight | None,
        memory: MemTable,
        counters: QueueCounters,
    ) -> None:
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._vring = vring
        self._features = features
        self.inflight = inflight
        """Where requests are tracked."""
        self._enabled = vring.enabled
        self._fds = {
            VringFd.KICK: vring.kick_fd,
            VringFd.CALL: vring.call_fd,
            VringFd.ERR: vring.err_fd,
        }
        self._counters = counters
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._poll_timer: asyncio.TimerHandle | None = None
        self._again: asyncio.Handle | None = None
        self._notify_scheduled = False
        self._watched: int | None = None
        self._is_broken = False
        self._is_stopping = False
        self._is_suspending = False
        self._log: DirtyLog | None = None
        try:
            self._ring: Virtqueue | None = self._make_ring(memory, vring.base)
        except GuestError as exc:
            raise PeerError(f"queue {vring.index}: {exc}") from None
        self._base = self._ring.base
        self.replays = self._ring.replays
        """Requests that were in flight when the queue was started."""
        if vring.call_fd is not None:
            # As the engine does: who had the ring before may not have told of all that was completed.
            self._path.notifier.signal(vring.call_fd)
        self._watch()

    @property
    def base(self) -> int:
        """VRING_BASE."""
        return self._base

    def _make_ring(self, memory: MemTable, base: int) -> Virtqueue:
        vring = self._vring
        event_idx = bool(self._features & Feature.VIRTIO_F_EVENT_IDX)
        indirect = bool(self._features & Feature.VIRTIO_F_INDIRECT_DESC)
        areas = (vring.desc, vring.avail, vring.used)
        if self._features & Feature.VIRTIO_F_RING_PACKED:
            return PackedVirtqueue(
                memory,
                vring.size,
                *areas,
                base=base,
                event_idx=event_idx,
                indirect=indirect,
                tracker=InflightPacked(self.inflight.view) if self.inflight is not None else None,
            )
        return SplitVirtqueue(
            memory,
            vring.size,
            *areas,
            base=base,
            event_idx=event_idx,
            indirect=indirect,
            tracker=InflightSplit(self.inflight.view) if self.inflight is not None else None,
        )

    # ------------------------------------------------------------------ control

    async def stop(self) -> None:
        """Finish also what others have left in flight, enabled or not; then as `pause`."""
        self._is_stopping = True
        self._process()
        await self.pause()

    async def suspend(self) -> None:
        """As `pause`, but what need not be waited for stays in flight, for whoever has the ring next."""
        self._is_stopping = self._is_suspending = True
        for task in tuple(self._tasks):
            task.cancel()
        await self.pause()

    async def pause(self) -> None:
        """Take no more requests and wait for those in flight; lets go of guest memory."""
        self._unwatch()
        await self._idle.wait()
        if self._ring is not None:
            self._notify()
            self._base = self._ring.base
            self._ring = None

    def resume_with(self, memory: MemTable | None) -> None:
        """Go on in this memory map; without one the queue is broken."""
        if self._is_broken:
            return  # until it is stopped, whatever else changes
        try:
            if memory is None:
                raise GuestError("its memory was taken away", Broken.RING_ADDRESS)
            self._ring = self._make_ring(memory, self._base)
            self._mark_ring()
        except (GuestError, PeerError) as exc:
            self._break(exc)
            return
        self._watch()

    def set_log(self, log: DirtyLog | None) -> None:
        """Where what is written to the used ring is marked, if it is."""
        self._log = log
        self._mark_ring()

    def set_log_gpa(self, gpa: int | None) -> None:
        """Where the used ring is for the log."""
        self._vring = replace(self._vring, log_gpa=gpa)
        self._mark_ring()

    def _mark_ring(self) -> None:
        if self._ring is not None:
            was_marked = self._ring.mark is not None
            is_marked = self._log is not None and self._vring.log_gpa is not None
            self._ring.mark = self._path.mark if is_marked else None
            if is_marked and not was_marked and self.inflight is not None:
                # Whoever had the ring before may have been killed between a store and its mark, and the start may have
                # repaired it: QEMU gives the log when rings are started already.
                self._ring.mark_ring()

    def enable(self, enabled: bool) -> None:
        """Whether requests are taken."""
        self._enabled = enabled
        if enabled:
            self.process_soon()

    def set_fd(self, which: VringFd, fd: int | None) -> None:
        """Exchange an fd."""
        self._unwatch()
        self._fds[which] = fd
        if which is VringFd.CALL and fd is not None:
            self._path.notifier.signal(fd)  # what the old one was told of may have been missed
        if self._ring is not None and not self._is_broken:
            try:
                self._watch()
            except PeerError:
                self._fds[VringFd.KICK] = None
                self._watch()  # the old one is closed whatever happens: the ring is polled from here on
                raise

    def _watch(self) -> None:
        kick = self._fds[VringFd.KICK]
        if kick is not None:
            try:
                self._loop.add_reader(kick, self._kicked)
            except OSError as exc:
                index = self._vring.index
                raise PeerError(f"queue {index}: nobody can wait for this kick fd: {exc}") from None
            self._watched = kick
        self.process_soon()

    def _unwatch(self) -> None:
        if self._watched is not None:
            self._loop.remove_reader(self._watched)
            self._watched = None
        for handle in (self._poll_timer, self._again):
            if handle is not None:
                handle.cancel()
        self._poll_timer = self._again = None

    # ------------------------------------------------------------------ requests

    def process_soon(self) -> None:
        """Look at the ring."""
        if self._again is None:
            self._again = self._loop.call_soon(self._process)

    def _kicked(self) -> None:
        self._counters.kicked()
        assert self._watched is not None
        try:
            event_fd.clear(self._watched)
        except OSError:
            # Ready for ever, so it would keep us awake: the ring is polled instead.
            self._unwatch()
            self._fds[VringFd.KICK] = None
        self._process()

    def _process(self) -> None:
        self._again = None
        if self._poll_timer is not None:
            self._poll_timer.cancel()  # one is enough, whoever called
            self._poll_timer = None
        ring = self._ring
        if ring is None or self._is_broken or not self._may_pop(ring):
            return
        device = self._path.device
        ring.disable_notification()
        device.backend.plug()
        try:
            for _ in range(self._vring.size):
                chain = ring.pop() if self._may_pop(ring) else None
                if chain is None:
                    break
                request = blk_request.parse(
                    chain,
                    capacity=device.capacity,
                    read_only=device.read_only,
                    max_segments=device.max_segments,
                )
                self._in_flight += 1
                age = self._counters.began()
                self._idle.clear()
                run_eagerly(self._execute(request, age), self._tasks)
            pending = ring.enable_notification()
        except GuestError as exc:
            ring.break_queue(exc)
            self._break(exc)
            return
        finally:
            device.backend.unplug()
        if self._path.memory_faulted():
            self._unwatch()
        elif pending:
            self.process_soon()
        elif self._fds[VringFd.KICK] is None:
            self._poll_timer = self._loop.call_later(POLL_INTERVAL, self._process)

    def _may_pop(self, ring: Virtqueue) -> bool:
        if self._is_stopping:
            return ring.replays > 0 and not self._is_suspending
        return self._enabled and not self._path.paused

    async def _execute(self, request: BlkRequest, age: int) -> None:
        began = time.monotonic_ns()
        try:
            status, written = await self._path.device.execute(request)
        except asyncio.CancelledError:
            if self._is_suspending:
                self._suspended(request)
                return
            status, written = self._path.device.cancelled(request)
        ring = self._ring
        assert ring is not None
        vouched_for = request.complete(status, written)
        self._path.mark_written(request)
        ring.push(request.head, vouched_for)
        length = request.length or sum(segment.length for segment in request.segments)
        self._counters.finished(
            OPERATION_OF.get(request.type, "other"),
            length,
            status != 0,
            time.monotonic_ns() - began,
            age,
            refused=request.status is not None,
        )
        self._ended()
        if not self._notify_scheduled:
            self._notify_scheduled = True
            self._loop.call_soon(self._notify)

    def _ended(self) -> None:
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()

    def _suspended(self, request: BlkRequest) -> None:
        """It is not answered; a part of it may have been done."""
        self._path.mark_written(request)
        self._counters.suspended()
        self._ended()

    def _notify(self) -> None:
        if not self._notify_scheduled:
            return  # a pause has done it
        self._notify_scheduled = False
        assert self._ring is not None
        self._path.tell_of_marks()
        if self._ring.needs_notification():
            call_fd = self._fds[VringFd.CALL]
            if call_fd is not None:
                self._counters.called()
                self._path.notifier.signal(call_fd)
        else:
            self._counters.call_suppressed()

    def _break(self, error: GuestError | PeerError) -> None:
        self._is_broken = True
        self._unwatch()
        error_fd = self._fds[VringFd.ERR]
        if error_fd is not None:
            self._path.notifier.signal(error_fd)
        self._path.queue_broken(self._vring.index, str(error))
