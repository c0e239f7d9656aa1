"""The engine as Python sees it: the only importer of the compiled extension.

`engine.h` is the contract; names here are its names. Handles are objects that own what C gave them
and end with `close()`. Messages are plain tuples in the order of `struct vb_message`, because
hundreds of thousands of them go by in a second.

Knows nothing of vhost-user, of virtio, of block nodes, nor of asyncio.

Where the extension was not built (`available` is False) everything that needs it raises
`StateError`; the rest of vhostblk then moves data in Python.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

from vhostblk.errors import StateError
from vhostblk.native.constants import (
    FLUSH_MISS,
    FLUSH_NOTHING,
    LATENCY_BUCKETS,
    Broken,
    ExtentFlag,
    IOOp,
    MessageType,
    QueueFd,
    RequestFlag,
)

try:
    from vhostblk.native._engine import ffi as _ffi
    from vhostblk.native._engine import lib as _lib
except ImportError as error:
    _ffi = _lib = None
    _why = str(error)

__all__ = [
    "Broken",
    "Disk",
    "EngineThread",
    "ExtentFlag",
    "FLUSH_MISS",
    "FLUSH_NOTHING",
    "HostIO",
    "IOOp",
    "LATENCY_BUCKETS",
    "Memory",
    "Message",
    "MessageType",
    "QueueConfig",
    "QueueFd",
    "QueueStats",
    "RequestFlag",
    "Region",
    "Extents",
    "address_of",
    "available",
    "extents",
    "io_uring_error",
    "iov_views",
    "latency_bound",
    "queue_config",
    "segments",
]

available: bool = _lib is not None
"""Whether the extension was built and could be loaded."""

Message = tuple[int, int, int, int, int, int, int, int, int, int, int]
"""type, flags, queue, cookie, disk, offset, length, pointer, count, result, aux."""

_MESSAGE = struct.Struct("=HHIQQQQQIiQ")
_EXTENT = struct.Struct("=QQQiIII4x")
_IOV = struct.Struct("=QQ")
_SEGMENT = struct.Struct("=QQQ")
_IO_REQUEST = struct.Struct("=QQQQIiII")
_IO_RESULT = struct.Struct("=Qq")

_IO_KINDS = {"auto": 0, "io_uring": 1, "threads": 2}
_IO_KIND_NAMES = {number: name for name, number in _IO_KINDS.items()}


class Region(Protocol):
    """A piece of guest memory: where it is for the guest, in the front-end, and here."""

    @property
    def gpa(self) -> int: ...
    @property
    def uva(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def hva(self) -> int: ...


def _engine() -> Any:
    if _lib is None:
        raise StateError(f"the C engine is not available: {_why}")
    return _lib


def _check(result: int, what: str) -> int:
    """Raise for the -errno of a C function."""
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


def io_uring_error() -> int:
    """Why io_uring cannot be used: 0 if it can, else an errno, positive."""
    return -int(_engine().vb_io_uring_error())


def address_of(buffer: Any) -> int:
    """Where a buffer is in this process; it must be contiguous, and stay alive for the address to mean something.

    Works without the extension too.
    """
    view = memoryview(buffer)
    if not view.nbytes:
        return 0
    if _ffi is not None:
        return int(_ffi.cast("uintptr_t", _ffi.from_buffer(view)))
    if view.readonly:
        raise StateError("the address of a read-only buffer needs the C engine")
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def latency_bound(bucket: int) -> int:
    """Lower bound of a bucket of a latency histogram, in ns."""
    return int(_engine().vb_latency_bound(bucket))


def iov_views(pointer: int, count: int) -> list[memoryview]:
    """The data of a VB_REQUEST as writable views; valid until the request is given back."""
    ffi = _ffi
    raw = ffi.buffer(ffi.cast("char *", pointer), count * _IOV.size) if count else b""
    return [
        memoryview(ffi.buffer(ffi.cast("char *", address), length)).cast("B")
        for address, length in _IOV.iter_unpack(raw)
    ]


def segments(pointer: int, count: int) -> list[tuple[int, int, bool]]:
    """The segments of a DISCARD or WRITE_ZEROES: offset, length, and whether it may unmap."""
    if not count:
        return []
    raw = _ffi.buffer(_ffi.cast("char *", pointer), count * _SEGMENT.size)
    return [
        (offset, length, bool(flags & 1)) for offset, length, flags in _SEGMENT.iter_unpack(raw)
    ]


class Memory:
    """A snapshot of guest memory.

    Args:
        regions: what to put into it: mapped in this process, disjoint in guest addresses.

    Raises:
        OSError: EINVAL: regions overlap, wrap or are empty.

    Context: the control thread. Owns: one reference; engine threads hold others.
    """

    def __init__(self, regions: Iterable[Region]) -> None:
        lib = _engine()
        table = [(r.gpa, r.uva, r.size, r.hva) for r in regions]
        ret = _ffi.new("struct vb_memory **")
        _check(
            lib.vb_memory_create(_ffi.new("struct vb_region[]", table), len(table), ret),
            "guest memory",
        )
        self._memory = ret[0]

    @property
    def pointer(self) -> int:
        """For VB_MEMORY_SET."""
        return int(_ffi.cast("uintptr_t", self._memory))

    @property
    def references(self) -> int:
        """How many hold it; 1 when only this object does."""
        return int(_lib.vb_memory_refs(self._memory))

    @property
    def faulted(self) -> bool:
        """Whether the front-end has truncated memory that was used since."""
        return bool(_lib.vb_memory_faulted(self._memory))

    def close(self) -> None:
        """Give up the reference. Idempotent."""
        memory, self._memory = self._memory, _ffi.NULL
        _lib.vb_memory_unref(memory)


class Disk:
    """What engine threads know of an export.

    Args:
        disk_id: echoed in messages.
        capacity: bytes, a multiple of 512.
        read_only: requests that modify fail.
        max_segments: of a DISCARD or WRITE_ZEROES.
        serial: at most 20 bytes, for GET_ID.
        max_extents: bound of each thread's extent map (48 bytes an entry).

    Context: the control thread. Owns: one reference; threads it is attached to hold others.
    """

    def __init__(
        self,
        *,
        disk_id: int,
        capacity: int,
        read_only: bool = False,
        max_segments: int = 1,
        serial: bytes = b"",
        max_extents: int = 65536,
    ) -> None:
        lib = _engine()
        if len(serial) > 20:
            raise ValueError(f"a serial has at most 20 bytes, not {len(serial)}")
        config = _ffi.new("struct vb_disk_config *")
        config.id = disk_id
        config.capacity = capacity
        config.read_only = read_only
        config.max_segments = max_segments
        config.max_extents = max_extents
        _ffi.memmove(config.serial, serial, len(serial))
        ret = _ffi.new("struct vb_disk **")
        _check(lib.vb_disk_create(config, ret), f"disk of {capacity} bytes")
        self._disk = ret[0]
        self.id = disk_id

    @property
    def pointer(self) -> int:
        """For messages."""
        return int(_ffi.cast("uintptr_t", self._disk))

    @property
    def write_gen(self) -> int:
        """How many writes the engine has completed by itself."""
        return int(_lib.vb_disk_write_gen(self._disk))

    def set_capacity(self, capacity: int) -> None:
        """Bytes; requests that start later see it. Shrinking: then revoke what is gone."""
        _lib.vb_disk_set_capacity(self._disk, capacity)

    def set_write_through(self, write_through: bool) -> None:
        """Whether every write that starts later is durable when it completes."""
        _lib.vb_disk_set_write_through(self._disk, write_through)

    def close(self) -> None:
        """Give up the reference. Idempotent."""
        disk, self._disk = self._disk, _ffi.NULL
        _lib.vb_disk_unref(disk)


class _Operation(Protocol):
    requests: int
    bytes: int
    errors: int
    latency_ns: int
    latency_max_ns: int
    latency: list[int]


class _Statistics(Protocol):
    operations: dict[str, Any]
    kicks: int
    calls: int
    calls_suppressed: int
    hits: int
    misses: int
    in_flight: int


S = TypeVar("S", bound=_Statistics)


class QueueStats:
    """Counters that one queue's engine thread writes, in memory of ours.

    Args:
        buffer: where they are, `SIZE` zeroed bytes, aligned to 8, for instance in shared memory; None: own memory.
            It must outlive the queue.
    """

    SIZE = 8 * (7 * (5 + LATENCY_BUCKETS) + 6)
    """Bytes of `struct vb_queue_stats`."""

    def __init__(self, buffer: Any = None) -> None:
        _engine()
        self._buffer = buffer if buffer is not None else _ffi.new("struct vb_queue_stats *")
        self._stats = (
            self._buffer
            if buffer is None
            else _ffi.from_buffer("struct vb_queue_stats *", buffer, require_writable=True)
        )

    @property
    def pointer(self) -> int:
        """For `queue_config`."""
        return int(_ffi.cast("uintptr_t", self._stats))

    def read(self, kind: type[S]) -> S:
        """Copy them out.

        Args:
            kind: makes an object with the counters as attributes and `operations`, by name in the order of
                `enum vb_op`.
        """
        result = kind()
        stats = self._stats
        for number, operation in enumerate(result.operations.values()):
            source = stats.op[number]
            operation.requests = source.requests
            operation.bytes = source.bytes
            operation.errors = source.errors
            operation.latency_ns = source.latency_ns
            operation.latency_max_ns = source.latency_max_ns
            operation.latency = list(source.latency)
        result.kicks = stats.kicks
        result.calls = stats.calls
        result.calls_suppressed = stats.calls_suppressed
        result.hits = stats.hits
        result.misses = stats.misses
        result.in_flight = stats.in_flight
        return result


class QueueConfig:
    """A `struct vb_queue_config`; keep it until VB_QUEUE_START is acknowledged."""

    def __init__(self, struct_: Any, keep: tuple[object, ...]) -> None:
        self._struct = struct_
        self._keep = keep

    @property
    def pointer(self) -> int:
        """For VB_QUEUE_START."""
        return int(_ffi.cast("uintptr_t", self._struct))


def queue_config(
    *,
    disk: Disk,
    stats: QueueStats,
    desc_uva: int,
    avail_uva: int,
    used_uva: int,
    size: int,
    index: int,
    base: int = 0,
    enabled: bool = True,
    event_idx: bool = False,
    indirect: bool = False,
    kick_fd: int = -1,
    call_fd: int = -1,
    err_fd: int = -1,
) -> QueueConfig:
    """Build the argument of VB_QUEUE_START; see `struct vb_queue_config`."""
    _engine()
    config = _ffi.new("struct vb_queue_config *")
    config.disk = _ffi.cast("struct vb_disk *", disk.pointer)
    config.stats = _ffi.cast("struct vb_queue_stats *", stats.pointer)
    config.desc_uva, config.avail_uva, config.used_uva = desc_uva, avail_uva, used_uva
    config.size, config.index, config.base = size, index, base
    config.enabled, config.event_idx, config.indirect = enabled, event_idx, indirect
    config.kick_fd, config.call_fd, config.err_fd = kick_fd, call_fd, err_fd
    return QueueConfig(config, (disk, stats))


class Extents:
    """A `struct vb_extent` array; keep it until VB_MAP is acknowledged."""

    def __init__(self, buffer: bytes, count: int) -> None:
        self._buffer = buffer
        self.count = count
        self.pointer = address_of(buffer)
        """For VB_MAP."""


def extents(entries: Iterable[tuple[int, int, int, int, int, int, int]]) -> Extents:
    """Build the argument of VB_MAP.

    Args:
        entries: offset, length, host offset, fd, flags, request alignment, memory alignment.
    """
    _engine()
    packed = [_EXTENT.pack(*entry) for entry in entries]
    return Extents(b"".join(packed), len(packed))


class EngineThread:
    """A thread of the engine and the two message rings to it.

    Args:
        name: what `ps` shows, the first 15 characters.
        poll_max_ns: how long it may look for work before it sleeps.
        io: "auto", "io_uring" or "threads".
        workers: threads of its pool at most; 0: a sensible number.

    Raises:
        OSError: threads or fds ran out, or io_uring was demanded and is forbidden.

    Context: the control thread. Owns: the thread, its eventfd.
    """

    BATCH = 64
    """Messages one `receive` returns at most."""

    def __init__(
        self,
        name: str = "vhostblk",
        *,
        poll_max_ns: int = 32768,
        io: str = "auto",
        workers: int = 0,
    ) -> None:
        lib = _engine()
        options = _ffi.new("struct vb_thread_options *")
        encoded = _ffi.new("char[]", name.encode())
        options.name = encoded
        options.poll_max_ns = poll_max_ns
        options.io_kind = _IO_KINDS[io]
        options.workers = workers
        ret = _ffi.new("struct vb_thread **")
        _check(lib.vb_thread_create(options, ret), f"engine thread {name}")
        self._thread = ret[0]
        self._in = _ffi.new("struct vb_message[]", self.BATCH)
        self._in_buffer = _ffi.buffer(self._in)
        # Slices of the buffer are made once, not per batch.
        self._batches = [memoryview(self._in_buffer)[: 64 * n] for n in range(self.BATCH + 1)]
        self._out = _ffi.new("struct vb_message[]", self.BATCH)
        self._out_buffer = memoryview(_ffi.buffer(self._out)).cast("B")
        self.fd: int = lib.vb_thread_fd(self._thread)
        """Becomes readable when messages wait; `receive` until it returns nothing."""
        self.io_kind: str = _IO_KIND_NAMES[lib.vb_thread_io_kind(self._thread)]
        """"io_uring" or "threads": what it ended up with."""

    def send(self, messages: Sequence[Message]) -> int:
        """Send messages, in order.

        Returns:
            How many were taken: all, unless the ring is full; then send the rest after a `receive`.
        """
        pack, buffer, size = _MESSAGE.pack_into, self._out_buffer, _MESSAGE.size
        sent = 0
        while sent < len(messages):
            batch = messages[sent : sent + self.BATCH]
            for index, message in enumerate(batch):
                pack(buffer, index * size, *message)
            taken: int = _lib.vb_thread_send(self._thread, self._out, len(batch))
            sent += taken
            if taken < len(batch):
                break
        return sent

    def receive(self) -> list[Message]:
        """Take the messages that wait, a batch at most.

        Returns:
            Nothing, when there are none: only then will `fd` become readable for the next one.
        """
        count = _lib.vb_thread_receive(self._thread, self._in, self.BATCH)
        return list(_MESSAGE.iter_unpack(self._batches[count]))

    def close(self) -> None:
        """End the thread and wait for it. Idempotent.

        Raises:
            StateError: a disk is still attached; nothing has happened.
        """
        if not self._thread:
            return
        if _lib.vb_thread_destroy(self._thread) < 0:
            raise StateError("an engine thread with disks cannot end")
        self._thread = _ffi.NULL
        self.fd = -1


class HostIO:
    """File I/O without waiting, on io_uring or a pool of threads.

    Args:
        kind: "auto", "io_uring" or "threads".
        depth: operations at once.
        workers: threads of the pool at most; 0: a sensible number.

    Raises:
        OSError: io_uring was demanded and is forbidden, or fds ran out.

    Context: one thread. Owns: the ring or the threads, and until `reap` the buffers of what is in flight.
    """

    _BATCH = 64

    def __init__(self, kind: str = "auto", *, depth: int = 1024, workers: int = 0) -> None:
        lib = _engine()
        ret = _ffi.new("struct vb_io **")
        _check(lib.vb_io_create(_IO_KINDS[kind], depth, workers, ret), "file I/O")
        self._io = ret[0]
        self._results = _ffi.new("struct vb_io_result[]", self._BATCH)
        self._results_buffer = memoryview(_ffi.buffer(self._results)).cast("B")
        self._in_flight: dict[int, tuple[Any, Any]] = {}
        self.fd: int = lib.vb_io_fd(self._io)
        """Readable when `reap` has something."""
        self.kind: str = _IO_KIND_NAMES[lib.vb_io_kind(self._io)]
        """"io_uring" or "threads"."""

    def submit(
        self,
        cookie: int,
        op: IOOp,
        fd: int,
        offset: int = 0,
        buffers: Sequence[Any] = (),
        *,
        length: int = 0,
        flags: int = 0,
    ) -> bool:
        """Begin one operation.

        Args:
            cookie: names it in `reap`; unique among those in flight.
            op: what to do.
            fd: of the file; must stay open.
            offset: bytes.
            buffers: READ, WRITE: contiguous; READ: writable. Kept alive here.
            length: FALLOCATE: bytes.
            flags: WRITE: 1 for a durable write. FALLOCATE: the mode.

        Returns:
            Whether it was taken: False when `depth` are in flight.
        """
        table = b"".join([_IOV.pack(address_of(b), memoryview(b).nbytes) for b in buffers])
        # Copied into memory of its own: the engine moves along the vector while it works.
        vector = _ffi.new("char[]", table) if table else _ffi.NULL
        request = _ffi.new("struct vb_io_request *")
        _IO_REQUEST.pack_into(
            _ffi.buffer(request),
            0,
            cookie,
            offset,
            length,
            int(_ffi.cast("uintptr_t", vector)),
            len(buffers),
            fd,
            op,
            flags,
        )
        if not _lib.vb_io_submit(self._io, request, 1):
            return False
        self._in_flight[cookie] = (buffers, vector)
        return True

    def reap(self) -> list[tuple[int, int]]:
        """Take what has finished.

        Returns:
            Cookie and result of each: bytes, fewer than asked for only at the end of the file, or -errno.
        """
        done: list[tuple[int, int]] = []
        while True:
            count = _lib.vb_io_reap(self._io, self._results, self._BATCH)
            batch = self._results_buffer[: count * _IO_RESULT.size]
            done += _IO_RESULT.iter_unpack(batch)
            if count < self._BATCH:
                break
        for cookie, _ in done:
            del self._in_flight[cookie]
        return done

    def close(self) -> None:
        """Wait for what is in flight, and end. Idempotent."""
        io, self._io = self._io, _ffi.NULL
        _lib.vb_io_destroy(io)
        self._in_flight.clear()
        self.fd = -1
