"""The engine threads that know one disk: attached, told of guest memory, and asked all together (row B27).

Which of them serves which queue is another matter: a thread is attached before the first queue comes to it, and
detached when the last one has gone, and in between is told whatever concerns the disk as a whole. A thread that has
just been attached knows no extent, so what was revoked before does not concern it.

Knows nothing about queues but the rule that places them, and nothing about requests.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Sequence
from typing import Any

from vhostblk import native
from vhostblk.errors import BlockError, PeerError
from vhostblk.export.engine_terms import insist
from vhostblk.export.io_thread import IOThread, Sink
from vhostblk.native import Message, MessageType


class DiskThreads:
    """See the module.

    Args:
        disk: what they know.
        sink: who takes what they say of it.
        threads: what queues are placed on. They may be shared with other exports.
        queue_threads: for each queue, the number of its thread; empty: queue i runs on thread i modulo their number.

    Context: the control loop.
    """

    def __init__(
        self,
        disk: native.Disk,
        sink: Sink,
        threads: Sequence[IOThread],
        queue_threads: Sequence[int] = (),
    ) -> None:
        self._disk = disk
        self._sink = sink
        self.serve(threads, queue_threads)
        self.attached: tuple[IOThread, ...] = ()
        """Those that know the disk, whether queues are placed on them or not."""

    def serve(self, threads: Sequence[IOThread], queue_threads: Sequence[int] = ()) -> None:
        """Place queues that are started from now on on these threads, which are attached, or will be."""
        self.serving = tuple(threads)
        self._queue_threads = tuple(queue_threads)

    def of_queue(self, index: int) -> IOThread:
        """Where this queue belongs."""
        return place(self.serving, self._queue_threads, index)

    async def attach(self, threads: Sequence[IOThread]) -> None:
        """Make the disk known to these threads, too: to all of them, or to none.

        Raises:
            BlockError: one is out of memory.
        """
        done: list[IOThread] = []
        try:
            for thread in threads:
                command = thread.command(MessageType.DISK_ATTACH, disk=self._disk.pointer)
                error = (await command)[9]
                if error < 0:
                    raise BlockError(-error, f"{thread.name}: {os.strerror(-error)}")
                thread.add_sink(self._disk.id, self._sink)
                self.attached = (*self.attached, thread)
                done.append(thread)
        except BaseException:
            await self.detach(done)
            raise

    async def detach(self, threads: Sequence[IOThread]) -> None:
        """Make these threads forget the disk; they have no queues of it any more."""
        # First: from here on nobody else sends them anything that they would have to answer.
        self.attached = tuple(thread for thread in self.attached if thread not in threads)
        for thread in threads:
            disk = self._disk.pointer
            insist(await thread.command(MessageType.MEMORY_SET, disk=disk, pointer=0))
            insist(await thread.command(MessageType.DISK_DETACH, disk=disk))
            thread.remove_sink(self._disk.id)

    def tell(self, kind: MessageType, **words: Any) -> list[asyncio.Future[Message]]:
        """Send a command to all, at once; gives their answers."""
        return self._send(self.attached, kind, **words)

    async def set_memory(
        self,
        threads: Sequence[IOThread],
        memory: native.Memory | None,
        before: native.Memory | None,
        flags: int,
    ) -> None:
        """Have these threads use another snapshot; returns when nothing in flight uses the one before.

        Args:
            flags: of VB_MEMORY_SET.

        Raises:
            PeerError: the engine is out of memory; all use the one before.
        """
        answers = await self._send_memory(threads, memory, flags)
        if any(answer[9] == -errno.ENOMEM for answer in answers):
            # Threads that have moved already go back.
            moved = [t for t, a in zip(threads, answers, strict=True) if a[9] == 0]
            for answer in await self._send_memory(moved, before, flags):
                insist(answer)
            raise PeerError("guest memory: the engine is out of memory")
        for answer in answers:
            insist(answer)

    async def _send_memory(
        self, threads: Sequence[IOThread], memory: native.Memory | None, flags: int
    ) -> list[Message]:
        pointer = memory.pointer if memory else 0
        flags = flags if memory else 0
        return await asyncio.gather(
            *self._send(threads, MessageType.MEMORY_SET, flags=flags, pointer=pointer, keep=memory)
        )

    def _send(
        self, threads: Sequence[IOThread], kind: MessageType, **words: Any
    ) -> list[asyncio.Future[Message]]:
        return [thread.command(kind, disk=self._disk.pointer, **words) for thread in threads]


def place(threads: Sequence[IOThread], queue_threads: Sequence[int], index: int) -> IOThread:
    """The thread of a queue; see `DiskThreads`."""
    return threads[queue_threads[index] if queue_threads else index % len(threads)]
