"""The reference data path: every queue is processed on the control loop, in readable Python.

It serves where the engine is not built, it is the oracle that the engine's tests are compared with, and the place to
read what the engine does. A turn takes what is available up to the queue's size, so that no guest can hold the loop.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from vhostblk import native
from vhostblk.block.extent import PastWrites
from vhostblk.errors import ConfigError, PeerError
from vhostblk.export import event_fd
from vhostblk.export.blk_device import BlkDevice
from vhostblk.export.data_path import DataPathEvents, guarded
from vhostblk.export.inflight import QueueInflight
from vhostblk.export.io_thread import IOThread
from vhostblk.export.python_queue import PythonQueue
from vhostblk.export.statistics import QueueCounters
from vhostblk.export.stats_page import StatsPage
from vhostblk.vhost.dirty_log import DirtyLog
from vhostblk.vhost.mem_table import MemTable
from vhostblk.vhost.vring import VringFd, VringSnapshot
from vhostblk.virtio.blk import RequestType
from vhostblk.virtio.blk_request import BlkRequest

# Types of requests whose data the device writes.
_READING = (RequestType.IN, RequestType.GET_ID)


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
        self._queues: dict[int, PythonQueue] = {}
        self._log: DirtyLog | None = None
        self._logs_data = False
        self._log_fd: int | None = None
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

    async def start_queue(
        self, vring: VringSnapshot, features: int, inflight: QueueInflight | None = None
    ) -> int:
        """See `DataPath.start_queue`."""
        if self._memory is None:
            raise PeerError(f"queue {vring.index}: started before any memory was shared")
        counters = QueueCounters(self._page.queue(vring.index))
        queue = PythonQueue(self, vring, features, inflight, self._memory, counters)
        queue.set_log(self._log)
        self._queues[vring.index] = queue
        return queue.replays

    async def stop_queue(self, index: int, *, suspend: bool = False) -> int:
        """See `DataPath.stop_queue`."""
        queue = self._queues[index]
        if suspend and queue.inflight is not None:
            await queue.suspend()
        else:
            with self._device.parking.closed():
                await queue.stop()
        del self._queues[index]
        return queue.base

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

    async def set_log(self, log: DirtyLog | None, *, data: bool, fd: int | None) -> None:
        """See `DataPath.set_log`."""
        self._log, self._logs_data, self._log_fd = log, data, fd
        for queue in self._queues.values():
            queue.set_log(log)

    async def set_queue_log(self, index: int, gpa: int | None) -> None:
        """See `DataPath.set_queue_log`."""
        self._queues[index].set_log_gpa(gpa)

    def mark_written(self, request: BlkRequest) -> None:
        """A request's data and status are in guest memory; if it has failed, maybe a part of the data."""
        if self._log is None or not self._logs_data:
            return
        views = [request.status_byte]
        if request.status is None and request.type in _READING:
            views += request.data
        for view in views:
            self.mark(view)

    def mark(self, written: memoryview) -> None:
        """A piece of guest memory was written, and there is a log."""
        assert self._log is not None
        assert self._guard is not None
        self._log.marks.mark_at(self._guard, native.address_of(written), len(written))

    def tell_of_marks(self) -> None:
        """Whoever keeps the log hears that there may be something new in it; if it is lost, the export does."""
        if self._log is None:
            return
        if self._log_fd is not None:
            self.notifier.signal(self._log_fd)
        if self._log.lost:
            self._events.log_lost()

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
        guards = [self._guard, *(queue.inflight for queue in self._queues.values())]
        if not any(guard is not None and guard.faulted for guard in guards):
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
