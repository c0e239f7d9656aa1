"""File I/O for nodes: submitted from the control loop, done by the engine's io_uring or by threads.

Two implementations of one interface: `NativeHostIO` uses the C engine (`struct vb_io` in
native/engine.h), `ThreadHostIO` a pool of Python threads, where the engine is not built. Nobody
waits in the loop: a coroutine suspends once per request.

Between `plug` and `unplug` requests are kept, to be submitted together (block layer row B28).

A request that is being waited for cannot be cancelled, because the kernel may still be writing into
its buffers: the cancellation takes effect when the request is over. If that has failed, the error is
the cause of the CancelledError, for whoever must know.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, TypeVar

from vhostblk import native
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError, ConfigError
from vhostblk.native import IOOp, IOPart, IORequest

T = TypeVar("T")

# fallocate(2), from linux/falloc.h.
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

# Threads for calls that wait for one file, so that a file that does not answer is nobody else's affair; and for all.
_WORKERS = 16
_MOST_WORKERS = 1024
# Bytes of one call of a transfer; as the engine's MANY_BYTES.
_LARGEST = 1 << 20
# So many are worth a system call, whatever else may follow.
_BURST = 64


class Completion(asyncio.Future[Any]):
    """A future that cannot be cancelled: see the module's docstring."""

    def cancel(self, msg: Any | None = None) -> bool:
        """Never: the task that waits is cancelled when the request is over."""
        return False


class _Job:
    """What a thread is to do; it may be cancelled until one has begun."""

    def __init__(self, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        self._function = function
        self._arguments = arguments
        self.done: futures.Future[Any] = futures.Future()

    def __call__(self) -> None:
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            result = self._function(*self._arguments)
        except BaseException as exc:
            self.done.set_exception(exc)
        else:
            self.done.set_result(result)


class HostIO(ABC):
    """File I/O from the control loop.

    All methods raise BlockError with the kernel's errno.

    Context: the loop that was running when it was made.
    Owns: threads, and an io_uring.
    """

    kind: str  # "io_uring" or "threads"
    # There is nobody else on the loop who would have to go on meanwhile: `call` runs at once, without a thread.
    may_block = False

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._turns: dict[int, asyncio.Semaphore] = {}
        # Made when first used, which image tools never do; it starts threads as they are needed.
        self._executor: futures.ThreadPoolExecutor | None = None
        self._has_threads = False

    @abstractmethod
    async def preadv(self, fd: int, offset: int, iov: IoVec) -> int:
        """Fill the vector; returns the bytes read, fewer than asked only at the end of the file."""

    @abstractmethod
    async def pwritev(self, fd: int, offset: int, iov: IoVec, dsync: bool = False) -> None:
        """Write the whole vector; `dsync`: durable when this returns (RWF_DSYNC)."""

    @abstractmethod
    async def fdatasync(self, fd: int) -> None:
        """fdatasync(2)."""

    @abstractmethod
    async def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""

    @abstractmethod
    async def transfer(self, parts: Sequence[IOPart], *, write: bool) -> int:
        """Many reads, or writes, with one visit to a thread; returns the bytes moved: fewer than asked if a file ends.

        Once one has failed, those behind it are not done.
        """

    def plug(self) -> None:  # noqa: B027 - threads have nothing to keep
        """More requests follow at once; every call needs an `unplug`, before the caller suspends (row B28)."""

    def unplug(self) -> None:  # noqa: B027
        """Undo one `plug`; the last one submits what was kept."""

    async def call(
        self,
        function: Callable[..., T],
        *arguments: Any,
        file: int = -1,
        undo: Callable[[T], None] | None = None,
    ) -> T:
        """Run something that may block in a thread; what it raises is raised here, as it is.

        Args:
            file: the fd that it may wait for. Calls for one file wait only for each other.
            undo: called with the result if who waits for it was cancelled and will never see it.
        """
        if self.may_block:
            return function(*arguments)
        if file not in self._turns:
            self._turns[file] = asyncio.Semaphore(_WORKERS)
        async with self._turns[file]:
            return await self._call(function, arguments, undo)

    async def _call(
        self,
        function: Callable[..., T],
        arguments: Sequence[Any],
        undo: Callable[[T], None] | None,
    ) -> T:
        completion = self._start(function, *arguments)
        try:
            result: T = await completion
        except asyncio.CancelledError as cancelled:
            if completion.done():
                cancelled.__cause__ = completion.exception()
                if cancelled.__cause__ is None and undo is not None:
                    undo(completion.result())
            raise
        return result

    def _start(self, function: Callable[..., Any], *arguments: Any) -> Completion:
        completion = Completion(loop=self._loop)
        job = _Job(function, arguments)
        job.done.add_done_callback(functools.partial(self._thread_done, completion))
        try:
            self._submit_job(job)
            self._has_threads = True
        except RuntimeError as exc:
            # There may be no more threads (ulimit -u, systemd's TasksMax=). The executor has taken the job all the
            # same, for those that it has, or for the first that it will have.
            if not str(exc).startswith("can't start new thread"):
                raise
            if not self._has_threads and job.done.cancel():
                raise BlockError(errno.EAGAIN, "no thread can be started") from None
        return completion

    def _submit_job(self, job: _Job) -> None:
        if self._executor is None:
            self._executor = futures.ThreadPoolExecutor(
                _MOST_WORKERS, thread_name_prefix="vhostblk-io"
            )
        self._executor.submit(job)

    def _thread_done(self, completion: Completion, done: futures.Future[Any]) -> None:
        if not done.cancelled():
            self._loop.call_soon_threadsafe(_settle, completion, done)

    async def close(self) -> None:
        """Wait for what is in flight and end the threads."""
        if self._executor is not None:
            self._executor.shutdown(wait=True)

    async def start_anew(self) -> None:
        """End the threads, and have new ones when they are needed: these have what the loop's thread has by then.

        Nothing is in flight.
        """
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None
        self._has_threads = False


def _settle(completion: Completion, done: futures.Future[Any]) -> None:
    error = done.exception()
    if error is not None:
        completion.set_exception(error)
    else:
        completion.set_result(done.result())


class ThreadHostIO(HostIO):
    """The fallback: system calls in Python threads."""

    kind = "threads"

    async def preadv(self, fd: int, offset: int, iov: IoVec) -> int:
        """See `HostIO.preadv`."""
        return await self.call(read_all, fd, offset, iov, file=fd)

    async def pwritev(self, fd: int, offset: int, iov: IoVec, dsync: bool = False) -> None:
        """See `HostIO.pwritev`."""
        flags = os.RWF_DSYNC if dsync else 0
        await self.call(write_all, fd, offset, iov, flags, file=fd)

    async def fdatasync(self, fd: int) -> None:
        """See `HostIO.fdatasync`."""
        await self.call(_fdatasync, fd, file=fd)

    async def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """See `HostIO.fallocate`."""
        await self.call(fallocate, fd, mode, offset, length, file=fd)

    async def transfer(self, parts: Sequence[IOPart], *, write: bool) -> int:
        """See `HostIO.transfer`."""
        return await self.call(_transfer, parts, write, file=parts[0][0] if parts else -1)


class NativeHostIO(HostIO):
    """The engine's file I/O (`native.HostIO`), its completions read by the loop.

    Args:
        kind: "auto", "io_uring" or "threads".

    Raises:
        ConfigError: the kernel refuses.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        try:
            self._io = native.HostIO(kind)
        except OSError as error:
            raise ConfigError(f"Parameter 'aio': {kind}: {error.strerror}") from None
        self.kind = self._io.kind
        self._next_cookie = 0
        self._waiting: dict[int, Completion] = {}
        self._queue: list[IORequest] = []  # plugged, or the engine was full
        self._plugged = 0
        self._is_full = False
        self._loop.add_reader(self._io.fd, self._reap)

    async def preadv(self, fd: int, offset: int, iov: IoVec) -> int:
        """See `HostIO.preadv`."""
        return await self._submit(IOOp.READ, fd, offset, iov.views)

    async def pwritev(self, fd: int, offset: int, iov: IoVec, dsync: bool = False) -> None:
        """See `HostIO.pwritev`."""
        done = await self._submit(IOOp.WRITE, fd, offset, iov.views, flags=int(dsync))
        if done < iov.length:
            raise BlockError(errno.ENOSPC)

    async def fdatasync(self, fd: int) -> None:
        """See `HostIO.fdatasync`."""
        await self._submit(IOOp.FDATASYNC, fd)

    async def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """See `HostIO.fallocate`."""
        await self._submit(IOOp.FALLOCATE, fd, offset, length=length, flags=mode)

    async def transfer(self, parts: Sequence[IOPart], *, write: bool) -> int:
        """See `HostIO.transfer`."""
        return await self._submit(IOOp.WRITE_MANY if write else IOOp.READ_MANY, -1, parts=parts)

    async def close(self) -> None:
        """Wait for what is in flight and end the threads."""
        if self._io.fd >= 0:
            self._loop.remove_reader(self._io.fd)
            self._io.close()
        await super().close()

    async def start_anew(self) -> None:
        """See `HostIO.start_anew`; the ring is a new one as well, because the kernel has threads for it."""
        assert not self._waiting
        kind = self.kind
        self._loop.remove_reader(self._io.fd)
        self._io.close()
        self._io = native.HostIO(kind)
        self._loop.add_reader(self._io.fd, self._reap)
        await super().start_anew()

    async def _submit(
        self,
        op: IOOp,
        fd: int,
        offset: int = 0,
        buffers: Sequence[memoryview] = (),
        *,
        length: int = 0,
        flags: int = 0,
        parts: Sequence[IOPart] = (),
    ) -> int:
        cookie = self._next_cookie
        self._next_cookie += 1
        self._waiting[cookie] = completion = Completion(loop=self._loop)
        self._queue.append(IORequest(cookie, op, fd, offset, buffers, length, flags, parts))
        if not self._plugged or len(self._queue) >= _BURST:
            self._submit_queue()
        try:
            result: int = await completion
        except asyncio.CancelledError as cancelled:
            if completion.done() and completion.result() < 0:
                cancelled.__cause__ = BlockError(-completion.result())
            raise
        if result < 0:
            raise BlockError(-result)
        return result

    def plug(self) -> None:
        """See `HostIO.plug`."""
        self._plugged += 1

    def unplug(self) -> None:
        """See `HostIO.unplug`."""
        self._plugged -= 1
        if not self._plugged:
            self._submit_queue()

    def _submit_queue(self) -> None:
        # In bursts, and not before there is room again: there may be thousands, and most of them would come back.
        while self._queue and not self._is_full:
            burst = self._queue[:_BURST]
            taken = self._io.submit(burst)
            del self._queue[:taken]
            self._is_full = taken < len(burst)

    def _reap(self) -> None:
        for cookie, result in self._io.reap():
            self._waiting.pop(cookie).set_result(result)
            self._is_full = False
        self._submit_queue()


# ---------------------------------------------------------------------- the same, blocking


def read_all(fd: int, offset: int, iov: IoVec, flags: int = 0) -> int:
    """preadv2 until the vector is full or the file ends; returns the bytes read.

    Raises:
        BlockError: the kernel's errno.
    """
    done = 0
    try:
        while done < iov.length:
            views = iov.slice(done, iov.length - done).views if done else iov.views
            count = os.preadv(fd, views, offset + done, flags)
            if count == 0:
                break
            done += count
    except OSError as error:
        raise block_error(error) from None
    return done


def write_all(fd: int, offset: int, iov: IoVec, flags: int = 0) -> None:
    """pwritev2 until all is written.

    Raises:
        BlockError: the kernel's errno.
    """
    done = 0
    try:
        while done < iov.length:
            views = iov.slice(done, iov.length - done).views if done else iov.views
            count = os.pwritev(fd, views, offset + done, flags)
            if count == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done += count
    except OSError as error:
        raise block_error(error) from None


def _transfer(parts: Sequence[IOPart], write: bool) -> int:
    done = 0
    for fd, offset, buffer in parts:
        view = memoryview(buffer)
        for at in range(0, len(view), _LARGEST):
            iov = IoVec([view[at : at + _LARGEST]])
            if write:
                write_all(fd, offset + at, iov)
            elif (count := read_all(fd, offset + at, iov)) < iov.length:
                return done + count
            done += iov.length
    return done


def _fdatasync(fd: int) -> None:
    try:
        os.fdatasync(fd)
    except OSError as error:
        raise block_error(error) from None


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with its modes, which Python's os module lacks.

    Raises:
        BlockError: the kernel's errno.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_int64
    if libc.fallocate(fd, mode, size(offset), size(length)) < 0:
        raise BlockError(ctypes.get_errno())


def block_error(error: OSError) -> BlockError:
    """The same failure as the block layer reports it."""
    return BlockError(error.errno or errno.EIO)


def create_host_io(aio: str | None) -> HostIO:
    """The file I/O for an `aio` option: "io_uring", "threads", or None for the best there is.

    Raises:
        ConfigError: io_uring was asked for and does not work here.
    """
    if native.available:
        # Without being asked, the engine itself finds out, with the first request.
        if aio == "io_uring" and (error := native.io_uring_error()):
            raise ConfigError(
                f"Parameter 'aio' does not support value 'io_uring' here: {os.strerror(error)} "
                "(allowed: threads)"
            )
        return NativeHostIO(aio or "auto")
    if aio == "io_uring":
        raise ConfigError(
            "Parameter 'aio' does not support value 'io_uring': the engine is not built "
            "(allowed: threads)"
        )
    return ThreadHostIO()
