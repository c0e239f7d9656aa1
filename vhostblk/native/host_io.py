"""File I/O for the block layer on the engine's machinery: `struct vb_io`.

Knows nothing of event loops: whoever uses it watches `fd` and calls `reap`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

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

__all__ = ["HostIO"]

_IO_REQUEST = struct.Struct("=QQQQIiII")
_IO_RESULT = struct.Struct("=Qq")


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
        table = b"".join([IOV.pack(address_of(b), memoryview(b).nbytes) for b in buffers])
        # Copied into memory of its own: the engine moves along the vector while it works.
        vector = ffi.new("char[]", table) if table else ffi.NULL
        request = ffi.new("struct vb_io_request *")
        _IO_REQUEST.pack_into(
            ffi.buffer(request),
            0,
            cookie,
            offset,
            length,
            pointer_of(vector),
            len(buffers),
            fd,
            op,
            flags,
        )
        if not lib.vb_io_submit(self._io, request, 1):
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
