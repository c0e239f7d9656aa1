"""Engine threads and the messages to and from them: `struct vb_thread`, `struct vb_message`.

Knows nothing of what the messages ask for, nor of who waits for them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial

from vhostblk.errors import StateError
from vhostblk.native.binding import IO_KIND_NAMES, IO_KINDS, check, engine, ffi, lib
from vhostblk.native.constants import MessageType

__all__ = ["EngineThread", "Message", "packed", "packed_completion", "packed_retry"]

Message = tuple[int, int, int, int, int, int, int, int, int, int, int]
"""type, flags, queue, cookie, disk, offset, length, pointer, count, result, aux."""

_MESSAGE = struct.Struct("=HHIQQQQQIiQ")
# The same, without what is 0 in a VB_COMPLETE.
_COMPLETION = struct.Struct("=H6xQ16xQ12xi8x")
_COMPLETE = int(MessageType.COMPLETE)
_COOKIE_ALONE = struct.Struct("=H6xQ48x")
_RETRY = int(MessageType.RETRY)


def packed(message: Message) -> bytes:
    """A message as `EngineThread.send` takes it."""
    return _MESSAGE.pack(*message)


packed_completion: Callable[[int, int, int], bytes] = partial(_COMPLETION.pack, _COMPLETE)
"""A VB_COMPLETE: (cookie, data bytes written to the guest, virtio-blk status)."""


def packed_retry(cookie: int) -> bytes:
    """A VB_RETRY."""
    return _COOKIE_ALONE.pack(_RETRY, cookie)


class EngineThread:
    """A thread of the engine and the two message rings to it.

    Args:
        name: what `ps` shows, the first 15 characters.
        poll_max_ns: how long it may look for work before it sleeps.
        poll_grow: by what factor that grows when it was too short; 0: 2.
        poll_shrink: by what it is divided when the wait was longer than `poll_max_ns`; 0: it is no time then.
        io: "auto", "io_uring" or "threads".
        workers: threads of its pool at most; 0: a sensible number.

    Raises:
        OSError: threads or fds ran out, or io_uring was demanded and is forbidden.

    Context: the control thread. Owns: the thread, its eventfd.
    """

    BATCH = 16
    """Messages one `receive` returns at most: so few that the engine has something to do while they are looked at."""

    def __init__(
        self,
        name: str = "vhostblk",
        *,
        poll_max_ns: int = 32768,
        poll_grow: int = 0,
        poll_shrink: int = 2,
        io: str = "auto",
        workers: int = 0,
    ) -> None:
        lib = engine()
        options = ffi.new("struct vb_thread_options *")
        encoded = ffi.new("char[]", name.encode())
        options.name = encoded
        options.poll_max_ns = poll_max_ns
        options.poll_grow = poll_grow
        options.poll_shrink = poll_shrink
        options.io_kind = IO_KINDS[io]
        options.workers = workers
        ret = ffi.new("struct vb_thread **")
        check(lib.vb_thread_create(options, ret), f"engine thread {name}")
        self._thread = ret[0]
        self._in = ffi.new("struct vb_message[]", self.BATCH)
        self._alike = ffi.new("uint32_t *")
        self.are_alike = False
        """Whether what `receive` has returned last is nothing but requests of one disk."""
        self._in_buffer = ffi.buffer(self._in)
        # Slices of the buffer are made once, not per batch.
        self._batches = [memoryview(self._in_buffer)[: 64 * n] for n in range(self.BATCH + 1)]
        self.fd: int = lib.vb_thread_fd(self._thread)
        """Becomes readable when messages wait; `receive` until it returns nothing."""
        self.io_kind: str = IO_KIND_NAMES[lib.vb_thread_io_kind(self._thread)]
        """"io_uring" or "threads": what it ended up with."""

    def send(self, messages: Sequence[bytes]) -> int:
        """Send messages, `packed`, in order.

        Returns:
            How many were taken: all, unless the ring is full; then send the rest after a `receive`.
        """
        table = ffi.from_buffer("struct vb_message[]", b"".join(messages))
        return int(lib.vb_thread_send(self._thread, table, len(messages)))

    def receive(self) -> list[Message]:
        """Take the messages that wait, a batch at most.

        Returns:
            Nothing, when there are none: only then will `fd` become readable for the next one.
        """
        count = lib.vb_thread_receive(self._thread, self._in, self.BATCH, self._alike)
        self.are_alike = self._alike[0] != 0
        return list(_MESSAGE.iter_unpack(self._batches[count]))

    def close(self) -> None:
        """End the thread and wait for it. Idempotent.

        Raises:
            StateError: a disk is still attached; nothing has happened.
        """
        if not self._thread:
            return
        if lib.vb_thread_destroy(self._thread) < 0:
            raise StateError("an engine thread with disks cannot end")
        self._thread = ffi.NULL
        self.fd = -1
