"""The compiled extension: the only importer of it, and the few helpers every wrapper needs.

cffi releases the GIL around each call. Knows nothing of what the calls mean.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from typing import Any

from vhostblk.errors import StateError

try:
    from vhostblk.native._engine import ffi, lib
except ImportError as error:
    ffi = lib = None
    _why = str(error)

__all__ = [
    "ADDRESS_SPACE",
    "IOV",
    "IO_KINDS",
    "IO_KIND_NAMES",
    "address_of",
    "available",
    "check",
    "engine",
    "ffi",
    "io_uring_error",
    "lib",
    "pointer_of",
]

available: bool = lib is not None
"""Whether the extension was built and could be loaded."""

IO_KINDS = {"auto": 0, "io_uring": 1, "threads": 2}
"""`enum vb_io_kind`, as options name them."""
IO_KIND_NAMES = {number: name for name, number in IO_KINDS.items()}

IOV = struct.Struct("=QQ")
"""`struct vb_iov`."""

ADDRESS_SPACE = memoryview(ffi.buffer(ffi.cast("char *", 0), sys.maxsize) if ffi else b"")
"""The memory of this process: `ADDRESS_SPACE[a : a + n]` is what the engine means by address `a` and length `n`, as a
writable view. To ask cffi for one takes several times as long."""


def engine() -> Any:
    """Give the functions of `engine.h`.

    Raises:
        StateError: the extension was not built.
    """
    if lib is None:
        raise StateError(f"the C engine is not available: {_why}")
    return lib


def check(result: int, what: str) -> int:
    """Raise OSError for the -errno of a C function."""
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


def pointer_of(handle: Any) -> int:
    """Give a C pointer as the number that messages carry."""
    return int(ffi.cast("uintptr_t", handle))


def io_uring_error() -> int:
    """Why io_uring cannot be used: 0 if it can, else an errno, positive."""
    return -int(engine().vb_io_uring_error())


def address_of(buffer: Any) -> int:
    """Where a buffer is in this process; it must be contiguous, and stay alive for the address to mean something.

    Works without the extension too.
    """
    view = memoryview(buffer)
    if not view.nbytes:
        return 0
    if ffi is not None:
        return pointer_of(ffi.from_buffer(view))
    if view.readonly:
        raise StateError("the address of a read-only buffer needs the C engine")
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
