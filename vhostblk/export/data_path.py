"""What both ways of moving data between a guest's queues and a disk have in common.

`NativeDataPath` hands queues to engine threads and serves what they cannot; `PythonDataPath` does everything on the
control loop and is the reference the engine is measured against. The same contract tests run on both.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Protocol

from vhostblk import native
from vhostblk.block.extent import PastWrites
from vhostblk.errors import PeerError
from vhostblk.export.inflight import QueueInflight
from vhostblk.export.io_thread import IOThread
from vhostblk.vhost.dirty_log import DirtyLog
from vhostblk.vhost.mem_table import MemTable
from vhostblk.vhost.vring import VringFd, VringSnapshot


class DataPath(Protocol):
    """Moves requests. Fds are borrowed: each stays open until the call that replaces it, or the stop, has returned.

    Context: the control loop.
    """

    description: str
    """How data is moved, for people; known once `open` has returned."""

    async def set_memory(self, memory: MemTable | None) -> None:
        """Use this map for what comes; returns when nothing in flight uses the one before.

        Raises:
            PeerError: there is no room for it; the one before stays in use. Never when memory is taken away (None).
        """

    async def open(self) -> None:
        """Get ready; call once, first."""

    async def start_queue(
        self, vring: VringSnapshot, features: int, inflight: QueueInflight | None = None
    ) -> int:
        """Begin to process a queue.

        Args:
            features: what the driver acknowledged.
            inflight: where its requests are tracked, and what is in flight is found.

        Returns:
            How many requests somebody else has left in flight: they are served again, before all others.

        Raises:
            PeerError: its rings are not in guest memory, or `inflight` is not about them.
        """

    async def stop_queue(self, index: int, *, suspend: bool = False) -> int:
        """Take no more requests, wait for those in flight, give the next available index.

        In flight are also those that somebody else has left so, even if the queue was never enabled. Requests that the
        disk has failed, and that are parked, are reported.

        Args:
            suspend: if the queue's requests are tracked, wait only for those that cannot be undone: the others, and
                those that are parked, stay in flight. When this returns nothing touches guest memory for them.
        """

    async def enable_queue(self, index: int, enabled: bool) -> None:
        """Whether a started queue takes requests."""

    async def move(self, threads: Sequence[IOThread], queue_threads: Sequence[int] = ()) -> None:
        """Have other threads serve the queues, also while they are busy; returns when they do (row B27).

        Waits for requests that are in flight, one queue after the other. Those that the disk fails meanwhile, and that
        are parked, keep it waiting until a resume, or until the front-end wants anything of the queues, which reports
        them.

        Args:
            queue_threads: for each queue, the number of its thread; empty: they take turns.

        Raises:
            ConfigError: there are no threads here, or not enough room on these; or EBUSY: requests are parked. All is
                as before.
        """

    def pause(self, paused: bool) -> None:
        """Whether queues take requests at all; those that have been taken are still served."""

    async def set_queue_fd(self, index: int, which: VringFd, fd: int | None) -> None:
        """Exchange a running queue's fd; returns when the old one is out of use.

        Raises:
            PeerError: nobody can wait for such a kick fd; the queue has none now, and is polled.
        """

    async def set_log(self, log: DirtyLog | None, *, data: bool, fd: int | None) -> None:
        """Mark in this log what is written to guest memory; returns when all do, and nobody uses what was before.

        Args:
            data: also what is written to buffers, not only to those rings that `set_queue_log` names.
            fd: signalled after marks were made.
        """

    async def set_queue_log(self, index: int, gpa: int | None) -> None:
        """Where a started queue's used ring is for the log; None: it is not marked. Returns when that is so."""

    async def set_write_through(self, write_through: bool) -> None:
        """Whether writes must be durable when they complete; returns when no write is in flight that began under the
        other rule."""

    def set_capacity(self, capacity: int) -> None:
        """The disk's length changed, bytes."""

    async def revoke(self, offset: int, length: int) -> None:
        """Forget what was known about this range of the disk; returns when no I/O based on it is in flight."""

    async def revoke_flush(self) -> None:
        """Leave flushes to the block layer from now on; returns when none of ours is in flight, and it was told if one
        has failed."""

    def take_writes(self, ranges: bool) -> PastWrites:
        """What was written past the block layer since this was last called.

        Args:
            ranges: also where.
        """

    async def close(self) -> None:
        """Let go of everything. All queues are stopped."""


class DataPathEvents(Protocol):
    """What a data path tells the export."""

    def queue_broken(self, index: int, reason: str) -> None:
        """The driver broke the rules of this queue; it is idle until it is stopped."""

    def queue_lost(self, reason: str) -> None:
        """No thread has room for a queue that has run; it is stopped."""

    def memory_faulted(self) -> None:
        """The front-end truncated memory it shares."""

    def log_lost(self) -> None:
        """The front-end's log of dirty memory lacks what was written."""


def guarded(memory: MemTable) -> native.Memory:
    """A snapshot of this map whose truncation does not kill us; the caller closes it.

    Raises:
        PeerError: memory, or room for more regions, has run out: front-ends decide how many there are.
    """
    try:
        return native.Memory(memory.regions)
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            raise PeerError("front-ends share too many regions with this process") from None
        raise PeerError(f"guest memory: {exc.strerror}") from None
