"""Reading and signalling eventfds that belong to somebody else, without ever waiting for them.

The front-end made them, so they may be blocking, saturated, or no eventfds at all; and O_NONBLOCK must not be set on
them, because the front-end shares the flag.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import sys
from contextlib import suppress
from typing import Any, NamedTuple

_ONE = (1).to_bytes(8, "little")


def clear(fd: int) -> bool:
    """Read a kick away; says whether there was one. Call when the fd is readable.

    Raises:
        OSError: it is ready and will stay so whatever is read: nobody can wait for such an fd.
    """
    try:
        # RWF_NOWAIT instead of O_NONBLOCK: another reader may have been faster.
        count = os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            raise
        if not _ready(fd, select.POLLIN):
            return False
        count = len(os.read(fd, 8))
    if not count:
        raise OSError(errno.EPIPE, "the other end of the kick fd is closed")
    return True


class Notifier:
    """Signals call and error fds.

    Theory of operation: a write to an eventfd without O_NONBLOCK waits while the counter is full, and the front-end can
    fill it, or clear O_NONBLOCK, at any moment. The kernel itself never waits when it signals an eventfd. So it is
    asked to: an asynchronous read (io_submit) of an empty file has ended at once, and its end signals the eventfd. The
    engine does the same (native/src/notifier.c).

    Context: the control loop.
    Owns: the file and the kernel's context, from the first signal to `close()`.
    """

    def __init__(self) -> None:
        self._file = -1
        self._context = ctypes.c_ulong(0)

    def signal(self, fd: int) -> None:
        """Signal a call or error fd. One that cannot take more is signalled already; what cannot be written to is the
        front-end's loss."""
        # The kernel would signal a full one all the same, but the counter would overflow.
        if not _ready(fd, select.POLLOUT):
            return
        self._open()
        if not self._context:
            _write(fd)  # a kernel without io_submit: the fd may have been filled since the look
        elif not self._ask_kernel(fd) and not os.get_blocking(fd):
            _write(fd)  # no eventfd

    def _open(self) -> None:
        if self._file < 0:
            self._file = os.memfd_create("vhostblk-notifier", os.MFD_CLOEXEC)
            if _CALLS is not None:
                _system_call(_CALLS.setup, _READS, ctypes.byref(self._context))

    def _ask_kernel(self, fd: int) -> bool:
        """Whether it could, which is whether this is an eventfd."""
        assert _CALLS is not None
        read = ctypes.create_string_buffer(
            _IOCB.pack(0, 0, 0, 0, 0, self._file, 0, 0, 0, 0, _FLAG_RESFD, fd), _IOCB.size
        )
        reads = (ctypes.c_void_p * 1)(ctypes.addressof(read))
        error = _system_call(_CALLS.submit, self._context, 1, reads)
        if error == errno.EAGAIN:
            # All are in use until somebody asks how they ended.
            events = ctypes.create_string_buffer(_READS * _EVENT_SIZE)
            now = (ctypes.c_long * 2)(0, 0)
            _system_call(_CALLS.getevents, self._context, 0, _READS, events, now)
            error = _system_call(_CALLS.submit, self._context, 1, reads)
        return not error

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        if self._context:
            assert _CALLS is not None
            _system_call(_CALLS.destroy, self._context)
            self._context = ctypes.c_ulong(0)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class _Calls(NamedTuple):
    """Numbers of system calls, which the C library has no functions for."""

    setup: int
    destroy: int
    getevents: int
    submit: int


# x86-64 has its own, all newer 64-bit architectures have the same.
_NUMBERS = {"x86_64": _Calls(206, 207, 208, 209)} | dict.fromkeys(
    ("aarch64", "riscv64", "loongarch64"), _Calls(0, 1, 4, 2)
)
_CALLS = _NUMBERS.get(os.uname().machine) if sys.maxsize > 2**32 else None

_LIBC = ctypes.CDLL(None, use_errno=True)
_READS = 32
# struct iocb; a read is number 0. struct io_event has four words.
_IOCB = struct.Struct("=QIIHhIQQqQII")
_FLAG_RESFD = 1
_EVENT_SIZE = 32


def _system_call(number: int, *arguments: Any) -> int:
    """0 or a positive errno."""
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    return ctypes.get_errno() if _LIBC.syscall(ctypes.c_long(number), *words) < 0 else 0


def _write(fd: int) -> None:
    with suppress(OSError):
        os.write(fd, _ONE)


def _ready(fd: int, event: int) -> bool:
    poll = select.poll()
    poll.register(fd, event)
    return any(events & event for _, events in poll.poll(0))
