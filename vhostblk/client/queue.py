"""One request queue of a guest without a VM: requests in, finished requests out.

VIRTIO 1.2 §5.2.6. A request takes one piece of guest memory, laid out so that it can be cut into
descriptors in any way::

    padding | header 16 | data the device reads | data it writes | status 1
                        ^ aligned

Header and what is read are contiguous, and so are what is written and the status.

Knows nothing of vhost-user; `client` tells the back-end where the ring is.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vhostblk.client.shared_memory import SharedMemory
from vhostblk.errors import BlockError, StateError
from vhostblk.virtio.blk import HEADER, RequestType, Status
from vhostblk.virtio.driver import Buffer, DriverQueue, DriverRing, Used
from vhostblk.virtio.packed_driver import PackedDriverQueue

__all__ = ["ClientQueue", "Framing", "Pending", "whole"]

Framing = Callable[[int], Sequence[int]]
"""Cuts so many bytes into descriptors: gives lengths, 0 allowed, whose sum is its argument."""

_UNWRITTEN = 0xFF
"""What the status byte holds before the device writes it; no status of VIRTIO 1.3."""

_ERRNO: dict[int, int] = {Status.IOERR: errno.EIO, Status.UNSUPP: errno.EOPNOTSUPP}


def whole(length: int) -> Sequence[int]:
    """Do not cut."""
    return (length,)


@dataclass(slots=True, eq=False)
class Pending:
    """A request on its way, or finished."""

    type: int
    sector: int
    buffer: Buffer
    """Its memory; free again when finished."""
    data: Buffer
    """The part the device writes."""
    status: int | None = None
    """None until finished; a `Status`, or 255 if the device wrote none."""
    written: int = 0
    """Bytes, as the device says."""
    content: bytes = b""
    """What the device wrote, of requests that have a status of OK."""

    @property
    def is_done(self) -> bool:
        """Whether the device is done with it."""
        return self.status is not None

    def result(self) -> bytes:
        """Give the content of a request that succeeded.

        Raises:
            StateError: it is not finished.
            BlockError: it failed: EIO, EOPNOTSUPP, or EPROTO for a status that does not exist.
        """
        if self.status is None:
            raise StateError("the request is not finished")
        if self.status != Status.OK:
            try:
                name = RequestType(self.type).name
            except ValueError:
                name = f"type {self.type}"
            code = _ERRNO.get(self.status, errno.EPROTO)
            raise BlockError(code, f"{name} at sector {self.sector}: status {self.status}")
        return self.content


class ClientQueue:
    """A queue in shared memory with its eventfds.

    Args:
        index: the queue's number.
        memory: where the ring and all requests are.
        size: entries.
        event_idx: VIRTIO_F_EVENT_IDX was negotiated.
        indirect_entries: of a table of indirect descriptors; 0: chains are direct.
        packed: VIRTIO_F_RING_PACKED was negotiated.
        alignment: of the data, in the guest's address space.

    Context: one thread. Owns: three eventfds, the ring's memory.
    """

    def __init__(
        self,
        index: int,
        memory: SharedMemory,
        size: int,
        *,
        event_idx: bool,
        indirect_entries: int,
        packed: bool = False,
        alignment: int = 4096,
    ) -> None:
        self.index = index
        self.alignment = max(alignment, HEADER.size)
        self._memory = memory
        kind = PackedDriverQueue if packed else DriverQueue
        length = kind.area_size(size, indirect_entries)
        self._area = memory.allocate(length, alignment=4096, contiguous=True)
        (view,) = memory.views(self._area)
        self.driver: DriverRing = kind(
            view, self._area.gpa, size, event_idx=event_idx, indirect_entries=indirect_entries
        )
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        self.kick_fd, self.call_fd, self.err_fd = (os.eventfd(0, flags) for _ in range(3))
        self.foreign: list[Used] = []
        """Finished chains that were not made by `submit` but with `driver.add`."""
        self.is_polled = False
        """The back-end was given no call fd: nothing will wake the driver."""
        self.kicks = 0
        """Notifications sent."""
        self.calls = 0
        """Times a wait was ended by a notification."""

    def close(self) -> None:
        """Give back memory and eventfds; requests in flight stay where they are. Idempotent."""
        if self.kick_fd < 0:
            return
        self.driver.close()
        self._memory.free(self._area)
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)
        self.kick_fd = self.call_fd = self.err_fd = -1

    def submit(
        self,
        kind: int,
        sector: int = 0,
        *,
        out: bytes = b"",
        room: int = 0,
        framing: Framing | None = None,
        indirect: bool | None = None,
    ) -> Pending:
        """Put a request into the ring; `notify` shows it to the device.

        Args:
            kind: a `RequestType`, or any other number.
            sector: of 512 bytes.
            out: what the device shall read after the header.
            room: bytes the device may write before the status.
            framing: how to cut the bytes into descriptors; None: header, data and status apart.
            indirect: use a table of indirect descriptors; None: if the queue has them.

        Raises:
            StateError: the ring or the memory is full, or there are too many descriptors.
        """
        start = self.alignment
        buffer = self._memory.allocate(
            start + len(out) + room + 1, alignment=self.alignment, contiguous=False
        )
        header = buffer.gpa + start - HEADER.size
        data = Buffer(buffer.gpa + start + len(out), room)
        self._memory.write(header, HEADER.pack(kind, 0, sector) + out)
        self._memory.write(data.gpa + room, bytes([_UNWRITTEN]))
        if framing is None:
            readable = _cut(header, (HEADER.size, len(out)))
            writable = _cut(data.gpa, (room, 1))
        else:
            readable = _cut(header, framing(HEADER.size + len(out)), keep_empty=True)
            writable = _cut(data.gpa, framing(room + 1), keep_empty=True)
        if indirect is None:
            indirect = len(readable) + len(writable) <= self.driver.indirect_entries
        pending = Pending(kind, sector, buffer, data)
        try:
            self.driver.add(readable, writable, token=pending, indirect=indirect)
        except StateError:
            self._memory.free(buffer)
            raise
        return pending

    def notify(self) -> None:
        """Publish what was submitted, and kick if the device asked for it."""
        self.driver.publish()
        if self.driver.kick_needed():
            self.kick()

    def kick(self) -> None:
        """Kick, needed or not."""
        self.kicks += 1
        os.eventfd_write(self.kick_fd, 1)

    def reap(self) -> list[Pending]:
        """Take back what the device has finished, without waiting.

        Raises:
            PeerError: the device broke the ring's rules.
        """
        finished = []
        for used in self.driver.reap():
            pending = used.token
            if not isinstance(pending, Pending):
                self.foreign.append(used)
                continue
            room = pending.data.length
            status = self._memory.read(Buffer(pending.data.gpa + room, 1))[0]
            if room and status == Status.OK:
                pending.content = self._memory.read(pending.data)
            pending.status = status
            pending.written = used.written
            self._memory.free(pending.buffer)
            finished.append(pending)
        return finished


def _cut(gpa: int, lengths: Sequence[int], *, keep_empty: bool = False) -> list[Buffer]:
    buffers = []
    for length in lengths:
        if length or keep_empty:
            buffers.append(Buffer(gpa, length))
        gpa += length
    return buffers
