"""The reference data path: every queue is processed on the control loop, in readable Python.

It serves where the engine is not built, it is the oracle that the engine's tests are compared with, and the place to
read what the engine does. A turn takes what is available up to the queue's size, so that no guest can hold the loop.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Sequence

from vhostblk import native
from vhostblk.block.extent import PastWrites
from vhostblk.errors import ConfigError, GuestError, PeerError
from vhostblk.export import event_fd
from vhostblk.export.blk_device import BlkDevice
from vhostblk.export.data_path import DataPathEvents, guarded
from vhostblk.export.eager import run_eagerly
from vhostblk.export.io_thread import IOThread
from vhostblk.export.statistics import QueueCounters
from vhostblk.export.stats_layout import OPERATIONS
from vhostblk.export.stats_page import StatsPage
from vhostblk.vhost.mem_table import MemTable
from vhostblk.vhost.vring import VringFd, VringSnapshot
from vhostblk.virtio import blk_request
from vhostblk.virtio.blk import RequestType
from vhostblk.virtio.blk_request import BlkRequest
from vhostblk.virtio.chain import Broken
from vhostblk.virtio.features import Feature
from vhostblk.virtio.split import SplitVirtqueue

# How long a ring without a kick fd rests between two looks, seconds.
POLL_INTERVAL = 0.0005

_OPERATION: dict[int, str] = {
    RequestType.IN: "read",
    RequestType.OUT: "write",
    RequestType.FLUSH: "flush",
    RequestType.DISCARD: "discard",
    RequestType.WRITE_ZEROES: "write_zeroes",
    RequestType.GET_ID: "get_id",
}
assert set(_OPERATION.values()) < set(OPERATIONS)


class PythonDataPath:
    """See `DataPath`.

    Args:
        device: what the queues belong to.
        events: who hears of broken queues.
        page: where queues are counted.

    Context: the control loop.
    Owns: the virtqueues, and the guard over the memory snapshot.
    """

    description = "Python data path"

    def __init__(self, device: BlkDevice, events: DataPathEvents, page: StatsPage) -> None:
        self._device = device
        self._events = events
        self._page = page
        self._memory: MemTable | None = None
        self._guard: native.Memory | None = None
        self._queues: dict[int, _Queue] = {}
        self.paused = False
        """No queue takes requests."""
        self.notifier = event_fd.Notifier()
        """For the queues' call and error fds."""
        device.memory_faulted = self.memory_faulted

    async def open(self) -> None:
        """Nothing to prepare."""

    async def set_memory(self, memory: MemTable | None) -> None:
        """See `DataPath.set_memory`."""
        guard = guarded(memory) if memory is not None and native.available else None
        for queue in self._queues.values():
            await queue.pause()
        old_guard, self._guard, self._memory = self._guard, guard, memory
        for queue in self._queues.values():
            queue.resume_with(memory)
        if old_guard is not None:
            old_guard.close()

    async def start_queue(self, vring: VringSnapshot, features: int) -> None:
        """See `DataPath.start_queue`."""
        if self._memory is None:
            raise PeerError(f"queue {vring.index}: started before any memory was shared")
        counters = QueueCounters(self._page.queue(vring.index))
        self._queues[vring.index] = _Queue(self, vring, features, self._memory, counters)

    async def stop_queue(self, index: int) -> int:
        """See `DataPath.stop_queue`."""
        queue = self._queues[index]
        await queue.pause()
        del self._queues[index]
        return queue.next_avail

    async def enable_queue(self, index: int, enabled: bool) -> None:
        """See `DataPath.enable_queue`."""
        self._queues[index].enable(enabled)

    async def move(self, threads: Sequence[IOThread], queue_threads: Sequence[int] = ()) -> None:
        """See `DataPath.move`."""
        raise ConfigError("the Python data path has no threads", errno.ENOTSUP)

    def pause(self, paused: bool) -> None:
        """See `DataPath.pause`."""
        self.paused = paused
        if not paused:
            for queue in self._queues.values():
                queue.process_soon()

    async def set_queue_fd(self, index: int, which: VringFd, fd: int | None) -> None:
        """See `DataPath.set_queue_fd`."""
        self._queues[index].set_fd(which, fd)

    async def set_write_through(self, write_through: bool) -> None:
        """See `DataPath.set_write_through`: the backend's own requests know their rule when they begin."""
        await self._device.backend.settle()

    def set_capacity(self, capacity: int) -> None:
        """Every request asks the device."""

    async def revoke(self, offset: int, length: int) -> None:
        """Nothing is remembered here."""

    async def revoke_flush(self) -> None:
        """All go through the block layer."""

    def take_writes(self, ranges: bool) -> PastWrites:
        """All go through the block layer."""
        return PastWrites()

    async def close(self) -> None:
        """See `DataPath.close`."""
        await self.set_memory(None)
        self.notifier.close()

    def memory_faulted(self) -> bool:
        """Whether an access hit memory that the front-end has truncated away; tells the export, too."""
        if self._guard is None or not self._guard.faulted:
            return False
        self._events.memory_faulted()
        return True

    def queue_broken(self, index: int, reason: str) -> None:
        """Pass it on."""
        self._events.queue_broken(index, reason)

    @property
    def device(self) -> BlkDevice:
        """What the queues belong to."""
        return self._device


class _Queue:
    """One started queue: its virtqueue and its fds."""

    def __init__(
        self,
        path: PythonDataPath,
        vring: VringSnapshot,
        features: int,
        memory: MemTable,
        counters: QueueCounters,
    ) -> None:
        self._path = path
        self._loop = asyncio.get_running_loop()
        self._vring = vring
        self._features = features
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
        try:
            self._ring: SplitVirtqueue | None = self._make_ring(memory, vring.base)
        except GuestError as exc:
            raise PeerError(f"queue {vring.index}: {exc}") from None
        self._next_avail = vring.base
        if vring.call_fd is not None:
            # As the engine does: who had the ring before may not have told of all that was completed.
            self._path.notifier.signal(vring.call_fd)
        self._watch()

    @property
    def next_avail(self) -> int:
        """VRING_BASE."""
        return self._next_avail

    def _make_ring(self, memory: MemTable, base: int) -> SplitVirtqueue:
        vring = self._vring
        return SplitVirtqueue(
            memory,
            vring.size,
            vring.desc,
            vring.avail,
            vring.used,
            base=base,
            event_idx=bool(self._features & Feature.VIRTIO_F_EVENT_IDX),
            indirect=bool(self._features & Feature.VIRTIO_F_INDIRECT_DESC),
        )

    # ------------------------------------------------------------------ control

    async def pause(self) -> None:
        """Take no more requests and wait for those in flight; lets go of guest memory."""
        self._unwatch()
        await self._idle.wait()
        if self._ring is not None:
            self._notify()
            self._next_avail = self._ring.next_avail
            self._ring = None

    def resume_with(self, memory: MemTable | None) -> None:
        """Go on in this memory map; without one the queue is broken."""
        if self._is_broken:
            return  # until it is stopped, whatever else changes
        try:
            if memory is None:
                raise GuestError("its memory was taken away", Broken.RING_ADDRESS)
            self._ring = self._make_ring(memory, self._next_avail)
        except GuestError as exc:
            self._break(exc)
            return
        self._watch()

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
        if ring is None or self._is_broken or not self._enabled or self._path.paused:
            return
        device = self._path.device
        ring.disable_notification()
        device.backend.plug()
        try:
            for _ in range(self._vring.size):
                chain = None if self._path.paused else ring.pop()
                if chain is None:
                    break
                request = blk_request.parse(
                    chain,
                    capacity=device.capacity,
                    read_only=device.read_only,
                    max_segments=device.max_segments,
                )
                self._in_flight += 1
                self._counters.began()
                self._idle.clear()
                run_eagerly(self._execute(request), self._tasks)
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

    async def _execute(self, request: BlkRequest) -> None:
        began = time.monotonic_ns()
        status, written = await self._path.device.execute(request)
        ring = self._ring
        assert ring is not None
        ring.push(request.head, request.complete(status, written))
        length = request.length or sum(segment.length for segment in request.segments)
        self._counters.finished(
            _OPERATION.get(request.type, "other"),
            length,
            status != 0,
            time.monotonic_ns() - began,
            refused=request.status is not None,
        )
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()
        if not self._notify_scheduled:
            self._notify_scheduled = True
            self._loop.call_soon(self._notify)

    def _notify(self) -> None:
        if not self._notify_scheduled:
            return  # a pause has done it
        self._notify_scheduled = False
        assert self._ring is not None
        if self._ring.needs_notification():
            call_fd = self._fds[VringFd.CALL]
            if call_fd is not None:
                self._counters.called()
                self._path.notifier.signal(call_fd)
        else:
            self._counters.call_suppressed()

    def _break(self, error: GuestError) -> None:
        self._is_broken = True
        self._unwatch()
        error_fd = self._fds[VringFd.ERR]
        if error_fd is not None:
            self._path.notifier.signal(error_fd)
        self._path.queue_broken(self._vring.index, str(error))
