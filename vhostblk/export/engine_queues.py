"""A disk's queues and the guest memory they are in, on engine threads; and how they move between threads (row B27).

A queue moves to another thread as it does to another process: it is stopped, which drains it, and started on the
other thread where it was stopped. What the driver has made available meanwhile is found at the start. One queue moves
after the other, so the others serve meanwhile; each keeps its fds, its memory and its counters, so the driver notices
nothing but a notification more. Whoever starts, stops or changes queues waits until a move is over. A move that fails
takes the queues that it has moved already back.

Knows nothing about requests.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vhostblk import native
from vhostblk.errors import BlockError, ConfigError, PeerError
from vhostblk.export.blk_device import BlkDevice
from vhostblk.export.data_path import DataPathEvents, guarded
from vhostblk.export.disk_threads import DiskThreads, place
from vhostblk.export.engine_terms import (
    answered,
    fd_or_none,
    insist,
    queue_config,
    why_not_started,
)
from vhostblk.export.inflight import QueueInflight
from vhostblk.export.io_thread import IOThread
from vhostblk.export.stats_page import StatsPage
from vhostblk.native import Message, MessageType
from vhostblk.vhost.dirty_log import DirtyLog
from vhostblk.vhost.mem_table import MemTable
from vhostblk.vhost.vring import VringFd, VringSnapshot

_QUEUE_FD = {
    VringFd.KICK: native.QueueFd.KICK,
    VringFd.CALL: native.QueueFd.CALL,
    VringFd.ERR: native.QueueFd.ERR,
}


_VRING_FD = {VringFd.KICK: "kick_fd", VringFd.CALL: "call_fd", VringFd.ERR: "err_fd"}


@dataclass(slots=True)
class _Queue:
    vring: VringSnapshot  # as it would be started now, but for its base
    features: int
    inflight: QueueInflight | None
    thread: IOThread
    key: int = 0
    is_broken: bool = False
    stopped_at: int | None = None  # no thread has it


class EngineQueues:
    """See the module, and `DataPath` for what is not said here.

    Args:
        device: whose parked requests a move waits for.
        disk: what the queues belong to.
        threads: which of them know it.
        page: where the engine counts.
        events: who hears of a queue that is lost.

    Context: the control loop.
    Owns: the queues and the memory snapshots.
    """

    def __init__(
        self,
        device: BlkDevice,
        disk: native.Disk,
        threads: DiskThreads,
        page: StatsPage,
        events: DataPathEvents,
    ) -> None:
        self._device = device
        self._disk = disk
        self._threads = threads
        self._page = page
        self._events = events
        self.memory: native.Memory | None = None
        """What requests are in."""
        self._memory_flags = 0
        self._log: dict[str, Any] = {"pointer": 0, "result": -1}  # of VB_LOG_SET
        self._queues: dict[int, _Queue] = {}  # by index, while started
        self._by_key: dict[tuple[IOThread, int], _Queue] = {}
        self._paused = False
        self._in_order = asyncio.Lock()
        self._is_closed = False

    @asynccontextmanager
    async def _in_place(self) -> AsyncIterator[None]:
        """Inside, queues do not move. A move that waits for parked requests is not waited for: see parking.py."""
        if self._in_order.locked():
            with self._device.parking.closed():
                await self._in_order.acquire()
        else:
            await self._in_order.acquire()
        try:
            yield
        finally:
            self._in_order.release()

    async def set_memory(self, memory: MemTable | None, *, pins: bool) -> None:
        """See `DataPath.set_memory`.

        Args:
            pins: register it as fixed buffers.
        """
        async with self._in_place():
            fresh = guarded(memory) if memory is not None else None
            self._memory_flags = int(pins)
            try:
                await self._send_memory(self._threads.attached, fresh)
            except BaseException:
                if fresh is not None:
                    fresh.close()
                raise
            if self.memory is not None:
                self.memory.close()
            self.memory = fresh

    async def _send_memory(self, threads: Sequence[IOThread], memory: native.Memory | None) -> None:
        await self._threads.set_memory(threads, memory, self.memory, self._memory_flags)

    async def set_log(self, log: DirtyLog | None, *, data: bool, fd: int | None) -> None:
        """See `DataPath.set_log`."""
        async with self._in_place():
            self._log = {
                "pointer": log.marks.pointer if log is not None else 0,
                "flags": int(data),
                "result": fd_or_none(fd),
            }
            await answered(self._threads.tell(MessageType.LOG_SET, **self._log))

    async def set_queue_log(self, index: int, gpa: int | None) -> None:
        """See `DataPath.set_queue_log`."""
        async with self._in_place():
            queue = self._queues[index]
            queue.vring = replace(queue.vring, log_gpa=gpa)
            if queue.stopped_at is None:
                command = queue.thread.command(
                    MessageType.QUEUE_LOG,
                    queue=queue.key,
                    flags=int(gpa is not None),
                    offset=gpa or 0,
                )
                insist(await command)

    async def start(
        self, vring: VringSnapshot, features: int, inflight: QueueInflight | None
    ) -> int:
        """See `DataPath.start_queue`."""
        async with self._in_place():
            queue = _Queue(vring, features, inflight, self._threads.of_queue(vring.index))
            replays = await self._start(queue, queue.thread)
            self._queues[vring.index] = queue
            return replays

    async def _start(self, queue: _Queue, thread: IOThread) -> int:
        vring = queue.vring
        queue.thread, queue.key = thread, thread.new_queue_key()
        stats = native.QueueStats(self._page.queue(vring.index))
        enabled = vring.enabled and not self._paused
        config = queue_config(
            vring, queue.features, self._disk, stats, queue.inflight, enabled=enabled
        )
        self._by_key[thread, queue.key] = queue
        answer = await thread.command(
            MessageType.QUEUE_START,
            disk=self._disk.pointer,
            queue=queue.key,
            pointer=config.pointer,
            keep=config,
        )
        if answer[9] < 0:
            del self._by_key[thread, queue.key]
            thread.forget_queue_key(queue.key)
            del (
                config,
                stats,
            )  # whoever keeps the exception keeps this frame, and must not keep the page
            raise PeerError(f"queue {vring.index}: {why_not_started(-answer[9])}")
        return answer[10]

    async def stop(self, index: int, *, suspend: bool) -> int:
        """See `DataPath.stop_queue`."""
        async with self._in_place():
            queue = self._queues.pop(index)
            if suspend and queue.inflight is not None:
                return await self._stop(queue, suspend=True)
            with self._device.parking.closed():
                return await self._stop(queue)

    async def _stop(self, queue: _Queue, *, suspend: bool = False) -> int:
        if queue.stopped_at is not None:
            return queue.stopped_at
        thread, key = queue.thread, queue.key
        stopped = thread.command(MessageType.QUEUE_STOP, queue=key, flags=int(suspend))
        if suspend:
            thread.suspend_tasks(key)
        answer = insist(await stopped)
        del self._by_key[thread, key]
        thread.forget_queue_key(key)
        return answer[10]

    async def enable(self, index: int, enabled: bool) -> None:
        """See `DataPath.enable_queue`."""
        async with self._in_place():
            queue = self._queues[index]
            queue.vring = replace(queue.vring, enabled=enabled)
            if queue.stopped_at is None:
                insist(await self._tell_enabled(queue))

    async def move(self, threads: Sequence[IOThread], queue_threads: Sequence[int] = ()) -> None:
        """See `DataPath.move`."""
        async with self._in_place():
            if self._is_closed:
                raise ConfigError("it is being closed", errno.ESHUTDOWN)
            if self._device.parking.is_paused:
                raise ConfigError("it is paused by an error of its disk: resume first", errno.EBUSY)
            fresh = [thread for thread in threads if thread not in self._threads.attached]
            moved: list[tuple[_Queue, IOThread]] = []
            try:
                await self._threads.attach(fresh)
                await self._send_memory(fresh, self.memory)
                await answered(self._threads.tell(MessageType.LOG_SET, **self._log))
                for queue in self._queues.values():
                    before = queue.thread
                    await self._move(queue, place(threads, queue_threads, queue.vring.index))
                    moved.append((queue, before))
            except (BlockError, PeerError) as exc:
                for queue, before in moved:
                    with suppress(PeerError):
                        await self._move(queue, before)
                await self._threads.detach([t for t in fresh if t in self._threads.attached])
                raise ConfigError(str(exc), errno.ENOMEM) from None
            self._threads.serve(threads, queue_threads)
            await self._threads.detach([t for t in self._threads.attached if t not in threads])

    async def _move(self, queue: _Queue, thread: IOThread) -> None:
        if queue.thread is thread or queue.stopped_at is not None:
            return
        before, base = queue.thread, await self._stop(queue)
        queue.vring = replace(queue.vring, base=base)
        if queue.is_broken:
            # Started again it would be broken again, or not, which is worse: it is idle until it is stopped.
            queue.stopped_at = base
            return
        try:
            await self._start(queue, thread)
        except PeerError:
            try:
                await self._start(queue, before)
            except PeerError as exc:
                queue.stopped_at = base
                self._events.queue_lost(str(exc))
            raise

    def pause(self, paused: bool) -> None:
        """See `DataPath.pause`."""
        self._paused = paused
        for queue in self._by_key.values():  # also those that are just being started
            self._tell_enabled(queue)

    def _tell_enabled(self, queue: _Queue) -> asyncio.Future[Message]:
        flags = int(queue.vring.enabled and not self._paused)
        return queue.thread.command(MessageType.QUEUE_ENABLE, queue=queue.key, flags=flags)

    async def set_fd(self, index: int, which: VringFd, fd: int | None) -> None:
        """See `DataPath.set_queue_fd`."""
        async with self._in_place():
            queue = self._queues[index]
            new_fd: dict[str, Any] = {_VRING_FD[which]: fd}
            no_fd: dict[str, Any] = {_VRING_FD[which]: None}
            if queue.stopped_at is None:
                set_fd = partial(
                    queue.thread.command,
                    MessageType.QUEUE_FD,
                    queue=queue.key,
                    aux=_QUEUE_FD[which],
                )
                answer = await set_fd(result=fd_or_none(fd))
                if answer[9] < 0:
                    # The old one is closed whatever happens, so it must be out of use: the ring is polled from here on.
                    insist(await set_fd(result=fd_or_none(None)))
                    queue.vring = replace(queue.vring, **no_fd)
                    raise PeerError(f"queue {index}: {why_not_started(-answer[9])}")
            queue.vring = replace(queue.vring, **new_fd)

    async def close(self) -> None:
        """Give memory and threads up. All queues are stopped."""
        await self.set_memory(None, pins=False)
        async with self._in_place():
            self._is_closed = True
            await self._threads.detach(self._threads.attached)

    def broken(self, thread: IOThread, key: int) -> int | None:
        """Note that a queue is broken; gives its index, None if it was stopped meanwhile."""
        queue = self._by_key.get((thread, key))
        if queue is None:
            return None
        queue.is_broken = True
        return queue.vring.index
