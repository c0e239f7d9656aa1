"""The fast data path: queues live on engine threads, Python serves what the engine cannot.

Fault, fill, retry: when a request misses the extent map and the graph can map the range, the run around it is
installed on that thread and the request is given back; otherwise the device executes it here. Messages to a thread
keep their order, so the retry finds what was installed, and a revocation sent later cannot be overtaken.

Where queues and guest memory are, and how they move, is in engine_queues.py.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Iterator, Sequence
from time import monotonic

from vhostblk import native
from vhostblk.block.eager import DONE, Request
from vhostblk.block.iov import IoVec, in_one_piece
from vhostblk.block.node import ExtentFlag, HostExtent, PastWrites
from vhostblk.errors import BlockError
from vhostblk.export import offload
from vhostblk.export.blk_device import BlkDevice
from vhostblk.export.data_path import DataPathEvents
from vhostblk.export.disk_threads import DiskThreads
from vhostblk.export.eager import run_eagerly
from vhostblk.export.engine_queues import EngineQueues
from vhostblk.export.engine_terms import answered
from vhostblk.export.error_policy import ErrorPolicy, OnError
from vhostblk.export.inflight import QueueInflight
from vhostblk.export.io_thread import IOThread, SuspendedTasks
from vhostblk.export.stats_page import StatsPage
from vhostblk.export.write_record import WriteRecord
from vhostblk.native import ADDRESS_SPACE, Message, MessageType, Op, packed_completion
from vhostblk.vhost.dirty_log import DirtyLog
from vhostblk.vhost.mem_table import MemTable
from vhostblk.vhost.vring import VringFd, VringSnapshot
from vhostblk.virtio.blk import RequestType, Status
from vhostblk.virtio.blk_request import BlkRequest, Segment

log = logging.getLogger(__name__)

_IN, _OUT, _FLUSH = int(RequestType.IN), int(RequestType.OUT), int(RequestType.FLUSH)
_FAILED = int(native.RequestFlag.FAILED)
_FAULTED = int(native.RequestFlag.FAULTED)
_TRANSFERS = (_IN, _OUT)
_OK = int(Status.OK)
# It was retried already, or the map has its range but the request is not aligned enough for it, or cannot serve it.
_DO_NOT_MAP = int(native.RequestFlag.RETRIED | native.RequestFlag.UNALIGNED | _FAILED)
_NEEDS_FLUSH = int(native.RequestFlag.NEEDS_FLUSH)
_EVERYTHING = 2**63


class NativeDataPath:
    """See `DataPath`.

    Args:
        device: what the queues belong to.
        threads: what the queues run on. They may be shared with other exports.
        events: who hears of broken queues.
        page: where the engine counts.
        queue_threads: for each queue, the number of its thread; empty: queue i runs on thread i modulo their number.
        pin_memory: register guest memory as fixed buffers where those pay. What is registered stays pinned: after the
            guest has given a page back (a balloon, free page reporting, virtio-mem, postcopy) and got another for it,
            reads would still end in the old one. vhost-user has no way to tell a VMM that it must not take pages.

    Context: the control loop.
    Owns: the engine's disk and what is attached to it; not the threads.
    """

    def __init__(
        self,
        device: BlkDevice,
        threads: Sequence[IOThread],
        events: DataPathEvents,
        page: StatsPage,
        *,
        queue_threads: Sequence[int] = (),
        pin_memory: bool = False,
    ) -> None:
        self._device = device
        self._backend = device.backend
        self._events = events
        self._pin_memory = pin_memory
        self._disk = native.Disk(
            disk_id=id(self),
            capacity=device.capacity,
            read_only=device.read_only,
            max_segments=device.max_segments,
            serial=device.serial,
            ask_after_errors=_asked_about(device.policy),
        )
        self._threads = DiskThreads(self._disk, self, threads, queue_threads)
        self._record = WriteRecord(self._disk, device.capacity)
        self._queues = EngineQueues(device, self._disk, self._threads, page, events)
        self._write_through = False
        self._flush_failed = False  # of the engine, and the block layer knows
        self._has_flushed = False  # the engine had the right to flush a file, and may have it now
        self._plugged = False  # while requests that came together are looked at
        self._tasks: set[asyncio.Task[None]] = set()
        self._first_writes: list[tuple[IOThread, Message]] = []
        self._is_preparing = False
        self.description = ""
        device.memory_faulted = self._memory_faulted

    async def open(self) -> None:
        """Make the disk known to the threads. Call once, before anything else.

        Raises:
            BlockError: a thread is out of memory; no thread knows the disk then.
        """
        try:
            await self._threads.attach(self._threads.serving)
            await self._describe()
        except BaseException:
            await self._threads.detach(self._threads.attached)
            self._disk.close()
            raise

    async def _describe(self) -> None:
        threads = self._threads.serving
        kind = "threads" if await self._maps_with(ExtentFlag.POOL) else threads[0].io_kind
        self.description = f"{len(threads)} engine thread{'s' * (len(threads) > 1)} with {kind}"

    # ------------------------------------------------------------------ DataPath

    async def set_memory(self, memory: MemTable | None) -> None:
        """See `DataPath.set_memory`."""
        pins = memory is not None and self._pin_memory and await self._maps_with(ExtentFlag.FIXED)
        await self._queues.set_memory(memory, pins=pins)

    async def start_queue(
        self, vring: VringSnapshot, features: int, inflight: QueueInflight | None = None
    ) -> int:
        """See `DataPath.start_queue`."""
        return await self._queues.start(vring, features, inflight)

    async def stop_queue(self, index: int, *, suspend: bool = False) -> int:
        """See `DataPath.stop_queue`."""
        return await self._queues.stop(index, suspend=suspend)

    async def enable_queue(self, index: int, enabled: bool) -> None:
        """See `DataPath.enable_queue`."""
        await self._queues.enable(index, enabled)

    async def set_log(self, log: DirtyLog | None, *, data: bool, fd: int | None) -> None:
        """See `DataPath.set_log`."""
        await self._queues.set_log(log, data=data, fd=fd)

    async def set_queue_log(self, index: int, gpa: int | None) -> None:
        """See `DataPath.set_queue_log`."""
        await self._queues.set_queue_log(index, gpa)

    async def set_queue_fd(self, index: int, which: VringFd, fd: int | None) -> None:
        """See `DataPath.set_queue_fd`."""
        await self._queues.set_fd(index, which, fd)

    async def move(self, threads: Sequence[IOThread], queue_threads: Sequence[int] = ()) -> None:
        """See `DataPath.move`."""
        await self._queues.move(threads, queue_threads)
        await self._describe()

    def pause(self, paused: bool) -> None:
        """See `DataPath.pause`."""
        self._queues.pause(paused)

    async def set_write_through(self, write_through: bool) -> None:
        """See `DataPath.set_write_through`."""
        self._write_through = write_through
        await self.revoke(0, _EVERYTHING)

    def set_capacity(self, capacity: int) -> None:
        """See `DataPath.set_capacity`."""
        if self._record.set_length(capacity):
            self._disk.set_capacity(capacity)

    async def revoke(self, offset: int, length: int) -> None:
        """See `DataPath.revoke`. A revocation of everything includes the right to flush."""
        commands = self._threads.tell(MessageType.REVOKE, offset=offset, length=length)
        is_everything = offset == 0 and length >= self._backend.length
        if is_everything:
            # Until extents are installed again, see `_fault`.
            self._disk.set_write_through(self._write_through)
            commands += self._threads.tell(MessageType.FLUSH_SET, result=native.FLUSH_MISS)
        with self._record.revocation(is_everything):
            await answered(commands)
        self._learn_of_failed_flush()

    async def revoke_flush(self) -> None:
        """See `DataPath.revoke_flush`.

        Not remembered per thread: an answer to somebody else's FLUSH_SET may be outstanding, and must be waited for.
        """
        if self._has_flushed:
            await answered(self._threads.tell(MessageType.FLUSH_SET, result=native.FLUSH_MISS))
            self._learn_of_failed_flush()

    def take_writes(self, ranges: bool) -> PastWrites:
        """See `DataPath.take_writes`."""
        return self._record.take(ranges)

    async def close(self) -> None:
        """See `DataPath.close`."""
        await self._queues.close()
        self._disk.close()

    # ------------------------------------------------------------------ Sink: what the engine says

    def engine_requests(self, thread: IOThread, messages: Iterator[Message], until: float) -> None:
        """Requests that missed: map their ranges and give them back, or execute them."""
        backend = self._backend
        if thread.has_more and not self._plugged:
            self._plugged = True
            backend.plug()
            thread.at_end_of_turn(self._unplug)
        read, write, answer = backend.begin_preadv, backend.begin_pwritev, thread.answer
        for message in messages:
            _, flags, key, cookie, _, offset, length, pointer, count, _, kind = message
            if flags or kind > _OUT or backend.may_map:
                self._find_out(thread, message)
            else:
                # Nothing has to be found out before, as for most requests of disks that are served here.
                if count == 1:
                    data = in_one_piece(ADDRESS_SPACE[pointer : pointer + length], length)
                else:
                    data = IoVec(native.iov_views(pointer, count, length))
                try:
                    request = read(offset, data) if kind == _IN else write(offset, data)
                except Exception as exc:
                    request = _failed(exc)
                if request is DONE:
                    answer(packed_completion(cookie, length, _OK))
                else:
                    run_eagerly(self._serve(thread, message, request), thread.tasks[key])
            if monotonic() >= until:
                return

    def _find_out(self, thread: IOThread, message: Message) -> None:
        """Whether the engine can do it, or has tried."""
        flags, kind = message[1], message[10]
        if kind == _OUT and not flags and self._backend.prepares_writes:
            if not self._first_writes:
                thread.at_end_of_turn(self._begin_first_writes)
            self._first_writes.append((thread, message))
        else:
            run_eagerly(self._serve(thread, message), thread.tasks[message[2]])

    def _transfer(
        self, kind: int, flags: int, offset: int, length: int, pointer: int, count: int
    ) -> Request:
        data = IoVec(native.iov_views(pointer, count, length))
        if kind == _IN:
            return self._backend.begin_preadv(offset, data)
        if flags & _FAULTED and self._memory_faulted():
            # What was truncated reads as zeroes since the engine has touched it: they must not reach the disk.
            raise BlockError(errno.EFAULT)
        return self._backend.begin_pwritev(offset, data)

    def _begin_first_writes(self) -> None:
        """Those that came together, and while others were looked at."""
        if self._first_writes and not self._is_preparing:
            self._is_preparing = True
            batch, self._first_writes = self._first_writes, []
            run_eagerly(self._prepare(batch), self._tasks)

    async def _prepare(self, batch: list[tuple[IOThread, Message]]) -> None:
        """Let the engine do writes that missed, if the graph can be made ready for that, or else executes them."""
        try:
            ranges = [(message[5], message[5] + message[6]) for _, message in batch]
            extents = await self._backend.prepare_writes(ranges)
            for thread in {thread for thread, _ in batch} if extents else ():
                self._install(thread, extents, is_write=True)
        except BlockError:
            pass  # the requests themselves will meet the error, and tell
        except Exception:
            log.exception("a bug: first writes failed")
        finally:
            for thread in {thread for thread, _ in batch}:
                thread.retry_all(message[3] for of, message in batch if of is thread)
            self._is_preparing = False
            self._begin_first_writes()

    def _unplug(self) -> None:
        self._plugged = False
        self._backend.unplug()

    async def _serve(
        self, thread: IOThread, message: Message, transfer: Request | None = None
    ) -> None:
        _, flags, _, cookie, _, offset, length, pointer, count, error, kind = message
        retry = not flags & _DO_NOT_MAP
        try:
            if kind in _TRANSFERS:
                if transfer is not None:
                    retry = False
                elif flags & _NEEDS_FLUSH:
                    self._learn_of_failed_flush()
                    retry = retry and self._allow_flush(thread)
                elif flags & _FAILED:
                    self._learn_of_failed_flush()  # of a durable write
                elif retry:
                    retry = self._backend.may_map and await self._fault(
                        thread, offset, length, kind == _OUT
                    )
                if not retry and not error:
                    try:
                        await (
                            transfer or self._transfer(kind, flags, offset, length, pointer, count)
                        )
                        thread.complete(cookie, _OK, length if kind == _IN else 0)
                        return
                    except BlockError as exc:
                        error = -(exc.errno or errno.EIO)
                data = native.iov_views(pointer, count, length)
                request = BlkRequest(0, _NOWHERE, kind, offset, length, data)
            elif kind == _FLUSH:
                self._learn_of_failed_flush()
                retry = retry and self._allow_flush(thread)
                request = BlkRequest(0, _NOWHERE, kind)
            else:
                retry = False
                segments = [Segment(*segment) for segment in native.segments(pointer, count)]
                request = BlkRequest(0, _NOWHERE, kind, segments=segments)
            outcome = None if retry else await self._device.execute(request, -error)
        except asyncio.CancelledError:
            if isinstance(thread.tasks[message[2]], SuspendedTasks):
                outcome = native.SUSPENDED, 0
            else:
                self._device.record_io_error(kind, errno.ECANCELED, offset, length)
                outcome = int(Status.IOERR), 0
        except Exception:
            # A request without an answer would keep its queue from ever stopping.
            log.exception("a bug: a request failed")
            outcome = int(Status.IOERR), 0
        if outcome is None:
            thread.retry(cookie)
        else:
            thread.complete(cookie, *outcome)

    def engine_event(self, thread: IOThread, message: Message) -> None:
        """A broken queue, or a request that the engine failed."""
        kind, _, key, _, _, offset, length, _, _, result, aux = message
        if kind == MessageType.QUEUE_BROKEN:
            index = self._queues.broken(thread, key)
            if result == native.Broken.MEMORY_FAULT:
                self._events.memory_faulted()
            elif result == native.Broken.LOG:
                self._events.log_lost()
            elif index is not None:
                self._events.queue_broken(index, native.Broken(result).name.lower())
        elif kind == MessageType.IO_ERROR:
            self._device.engine_failed(aux, -result, offset, length)
            if aux == _FLUSH:
                # The kernel reports a lost write once: from here on the block layer answers flushes.
                self._flush_failed = True
                self._backend.flush_failed(-result)

    def _learn_of_failed_flush(self) -> None:
        """Its message may still be on the way, or dropped for want of room; the block layer must not flush before."""
        if self._disk.flush_failed and not self._flush_failed:
            self._flush_failed = True
            self._backend.flush_failed(self._disk.flush_failed)

    def _memory_faulted(self) -> bool:
        memory = self._queues.memory
        if memory is None or not memory.faulted:
            return False
        self._events.memory_faulted()
        return True

    async def _fault(self, thread: IOThread, offset: int, length: int, write: bool) -> bool:
        """Install what the graph can map around a request; says whether that serves it."""
        try:
            extents = await self._backend.extents(offset, length)
            if not offload.covers(extents, offset, length, write):
                return False
            self._install(thread, extents, is_write=write)
        except BlockError:
            return False  # the request itself will meet the error, and tell
        return True

    def _install(self, thread: IOThread, extents: Sequence[HostExtent], *, is_write: bool) -> None:
        """Map what the backend has answered.

        No wait between that and this: a revocation would come between them.

        Raises:
            BlockError: ENOMEM; nothing was mapped.
        """
        self._record.prepare(extents)
        if offload.flush_target(self._backend) == native.FLUSH_NOTHING:
            self._disk.set_write_through(False)  # cache.no-flush: nothing is ever made durable
        if is_write and self._write_through:
            self._allow_flush(thread)
        entries = native.extents([offload.entry(extent) for extent in extents])
        thread.command(
            MessageType.MAP,
            disk=self._disk.pointer,
            pointer=entries.pointer,
            count=len(extents),
            keep=entries,
            hold=True,
        )

    def _allow_flush(self, thread: IOThread) -> bool:
        """Let the engine flush by itself, where one fdatasync, or nothing, is a complete flush."""
        target = offload.flush_target(self._backend)
        if target == native.FLUSH_MISS:
            return False
        self._has_flushed |= target != native.FLUSH_NOTHING
        thread.command(MessageType.FLUSH_SET, disk=self._disk.pointer, result=target)
        return True

    async def _maps_with(self, flag: ExtentFlag) -> bool:
        extents = await self._backend.extents(0, self._backend.block_sizes.logical)
        return any(extent.flags & flag for extent in extents)


async def _failed(error: Exception) -> None:
    raise error


def _asked_about(policy: ErrorPolicy) -> list[Op]:
    """Which errors the engine does not report by itself. Policies see all of them then, also those they report."""
    asked: list[Op] = []
    if policy.of(is_read=True) is not OnError.REPORT:
        asked += [Op.READ]
    if policy.of(is_read=False) is not OnError.REPORT:
        asked += [Op.WRITE, Op.FLUSH]
    return asked


# The engine writes the status itself.
_NOWHERE = memoryview(bytearray(1))
