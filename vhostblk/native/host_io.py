"""File I/O for the block layer on the engine's machinery: `struct vb_io`.

Knows nothing of event loops: whoever uses it watches `fd` and calls `reap`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from vhostblk.native.binding import (
    IO_KIND_NAMES,
    IO_KINDS,
    IOV,
    address_of,
    check,
    engine,
    ffi,
    lib,
    pointer_of,
)
from vhostblk.native.constants import IOOp

__all__ = ["HostIO", "IOPart", "IORequest"]

_IO_PART = struct.Struct("=QQQiI")
_IO_REQUEST = struct.Struct("=QQQQIiII")
_IO_RESULT = struct.Struct("=Qq")


class IOPart(NamedTuple):
    """One of many transfers that are one operation."""

    fd: int
    """Of the file; must stay open."""
    offset: int
    """Bytes."""
    buffer: Any
    """Contiguous, not empty; READ_MANY: writable. `HostIO` keeps it alive."""


class IORequest(NamedTuple):
    """One operation."""

    cookie: int
    """Names it in `reap`; unique among those in flight."""
    op: IOOp
    fd: int
    """Of the file; must stay open. Not of *_MANY."""
    offset: int = 0
    """Bytes."""
    buffers: Sequence[Any] = ()
    """READ, WRITE: contiguous; READ: writable. `HostIO` keeps them alive."""
    length: int = 0
    """FALLOCATE: bytes."""
    flags: int = 0
    """WRITE: 1 for a durable write. FALLOCATE: the mode."""
    parts: Sequence[IOPart] = ()
    """READ_MANY, WRITE_MANY: a thread does them in this order, until one fails, or its file ends early."""


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
        lib = engine()
        ret = ffi.new("struct vb_io **")
        check(lib.vb_io_create(IO_KINDS[kind], depth, workers, ret), "file I/O")
        self._io = ret[0]
        self._results = ffi.new("struct vb_io_result[]", self._BATCH)
        self._results_buffer = memoryview(ffi.buffer(self._results)).cast("B")
        self._in_flight: dict[int, tuple[Any, Any]] = {}
        self.fd: int = lib.vb_io_fd(self._io)
        """Readable when `reap` has something."""
        self.kind: str = IO_KIND_NAMES[lib.vb_io_kind(self._io)]
        """"io_uring" or "threads"."""

    def submit(self, requests: Sequence[IORequest]) -> int:
        """Begin operations, in order.

        Returns:
            How many were taken: fewer when `depth` are in flight.
        """
        pieces = [
            IOV.pack(address_of(buffer), memoryview(buffer).nbytes)
            for request in requests
            for buffer in request.buffers
        ]
        parts = [
            _IO_PART.pack(offset, address_of(buffer), memoryview(buffer).nbytes, fd, 0)
            for request in requests
            for fd, offset, buffer in request.parts
        ]
        # Copied into memory of its own: the engine moves along the vectors while it works.
        vectors = ffi.new("char[]", b"".join(pieces + parts))
        vector, table = pointer_of(vectors), []
        part = vector + len(pieces) * IOV.size
        for cookie, op, fd, offset, buffers, length, flags, many in requests:
            if many:
                table.append(_IO_REQUEST.pack(cookie, 0, 0, part, len(many), -1, op, 0))
                part += len(many) * _IO_PART.size
                continue
            count = len(buffers)
            table.append(_IO_REQUEST.pack(cookie, offset, length, vector, count, fd, op, flags))
            vector += count * IOV.size
        packed = ffi.from_buffer("struct vb_io_request[]", b"".join(table))
        taken = int(lib.vb_io_submit(self._io, packed, len(requests)))
        for request in requests[:taken]:
            self._in_flight[request.cookie] = (request, vectors)
        return taken

    def reap(self) -> list[tuple[int, int]]:
        """Take what has finished.

        Returns:
            Cookie and result of each: bytes, fewer than asked for only at the end of the file, or -errno.
        """
        done: list[tuple[int, int]] = []
        while True:
            count = lib.vb_io_reap(self._io, self._results, self._BATCH)
            batch = self._results_buffer[: count * _IO_RESULT.size]
            done += _IO_RESULT.iter_unpack(batch)
            if count < self._BATCH:
                break
        for cookie, _ in done:
            del self._in_flight[cookie]
        return done

    def close(self) -> None:
        """Wait for what is in flight, and end. Idempotent."""
        io, self._io = self._io, ffi.NULL
        lib.vb_io_destroy(io)
        self._in_flight.clear()
        self.fd = -1
