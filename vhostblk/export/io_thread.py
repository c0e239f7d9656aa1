"""An engine thread as the control loop sees it: commands become futures, requests go to the export they belong to.

Theory of operation: everything for the engine goes through one outbox and so keeps its order, which the extent map
relies on ("map, then retry"). Commands are sent at once. Completions of requests that finished inside a batch of
received messages are sent together when the batch is done, others at the end of the loop's turn. Batches are small, so
that the engine is not idle while we work, nor we while it does.

A turn ends after a while, whatever still waits: a guest decides how long its requests keep us busy, and others share
the loop. The engine's eventfd stays readable until `receive` has returned nothing, so the loop calls again by itself.

Knows nothing about vhost-user, virtio or block nodes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future as ThreadFuture
from time import monotonic
from typing import Any, Protocol

from vhostblk import native
from vhostblk.errors import StateError
from vhostblk.native import Message, MessageType, packed, packed_completion, packed_retry

log = logging.getLogger(__name__)

_REQUEST = int(MessageType.REQUEST)
_ACK = int(MessageType.ACK)

# After so many seconds other callbacks of the loop get their turn.
_TURN = 0.002


class Sink(Protocol):
    """Who takes what the engine says about one disk.

    `engine_requests` leaves those of the messages that it has not looked at `until` (`monotonic`).
    """

    def engine_requests(
        self, thread: IOThread, messages: Iterator[Message], until: float
    ) -> None: ...

    def engine_event(self, thread: IOThread, message: Message) -> None: ...


class SuspendedTasks(set["asyncio.Task[None]"]):
    """Tasks of requests that are to be left as they are."""

    def add(self, task: asyncio.Task[None]) -> None:
        """Cancel it."""
        super().add(task)
        task.cancel()


class IOThread:
    """One engine thread, shared by any number of exports.

    Context: the control loop.
    Owns: the engine thread; its eventfd is watched by the running loop until `close()`.
    """

    def __init__(
        self,
        name: str,
        *,
        poll_max_ns: int = 32768,
        poll_grow: int = 0,
        poll_shrink: int = 2,
    ) -> None:
        self.name = name
        self._loop = asyncio.get_running_loop()
        self._thread = native.EngineThread(
            name, poll_max_ns=poll_max_ns, poll_grow=poll_grow, poll_shrink=poll_shrink
        )
        self._sinks: dict[int, Sink] = {}
        self._inbox: Iterator[Message] = iter(())  # what was received and not yet looked at
        self._asked: Sink | None = None  # of whom all of that are requests
        self.has_more = False
        """Whether more than one message came at a time."""
        self._outbox: list[bytes] = []
        self.answer: Callable[[bytes], None] = self._outbox.append
        """Send a packed message; only for sinks, while they look at requests."""
        self._flush_scheduled = False
        self._receiving = False
        self._turn_ends: list[Callable[[], None]] = []
        self._next_cookie = 1
        self._last_queue_key = 0
        self.tasks: dict[int, set[asyncio.Task[None]]] = {}
        """Of requests that control serves, by the key of their queue."""
        # cookie -> who waits, and what must stay in memory until the engine has answered
        self._commands: dict[int, tuple[asyncio.Future[Message], Any]] = {}
        self._loop.add_reader(self._thread.fd, self._receive)

    @property
    def io_kind(self) -> str:
        """`io_uring` or `threads`: what it found it could use."""
        return self._thread.io_kind

    def new_queue_key(self) -> int:
        """A name for a queue on this thread."""
        self._last_queue_key += 1
        self.tasks[self._last_queue_key] = set()
        return self._last_queue_key

    def forget_queue_key(self, key: int) -> None:
        """The queue is stopped, or was not started."""
        del self.tasks[key]

    def suspend_tasks(self, key: int) -> None:
        """Cancel the tasks of a queue's requests, also of those that the engine has sent us already."""
        tasks = self.tasks[key]
        self.tasks[key] = SuspendedTasks()
        for task in tuple(tasks):
            task.cancel()

    def add_sink(self, disk_id: int, sink: Sink) -> None:
        """From now on `sink` gets what the engine says of the disk with this id."""
        self._sinks[disk_id] = sink

    def remove_sink(self, disk_id: int) -> None:
        """Undo `add_sink`. The disk must be detached."""
        del self._sinks[disk_id]

    def command(
        self,
        kind: MessageType,
        *,
        disk: int = 0,
        queue: int = 0,
        flags: int = 0,
        offset: int = 0,
        length: int = 0,
        pointer: int = 0,
        count: int = 0,
        result: int = 0,
        aux: int = 0,
        keep: Any = None,
        hold: bool = False,
    ) -> asyncio.Future[Message]:
        """Send a command; the future gives the engine's acknowledgement, whatever its result.

        Args:
            keep: what `pointer` points into; held until the acknowledgement.
            hold: more for the engine follows at once: wake it for all of that together.
        """
        cookie = self._next_cookie
        self._next_cookie += 1
        future: asyncio.Future[Message] = self._loop.create_future()
        self._commands[cookie] = (future, keep)
        message = (kind, flags, queue, cookie, disk, offset, length, pointer, count, result, aux)
        self._outbox.append(packed(message))
        if not hold:
            self._flush()
        elif not self._receiving:
            self._flush_soon()
        return future

    def complete(self, cookie: int, status: int, written: int) -> None:
        """Answer a request with its virtio-blk status and the data bytes written to the guest."""
        self._outbox.append(packed_completion(cookie, written, status))
        if not self._receiving:
            self._flush_soon()

    def retry(self, cookie: int) -> None:
        """Give a request back: the extent map can serve it now."""
        self._outbox.append(packed_retry(cookie))
        if not self._receiving:
            self._flush_soon()

    def retry_all(self, cookies: Iterable[int]) -> None:
        """The same for many, at once."""
        self._outbox += [packed_retry(cookie) for cookie in cookies]
        if not self._receiving:
            self._flush()

    def at_end_of_turn(self, function: Callable[[], None]) -> None:
        """Call `function` when this turn's messages have been looked at; for sinks."""
        self._turn_ends.append(function)

    async def close(self) -> None:
        """End and join the thread; the loop, and the ends of other threads, go on meanwhile.

        Raises:
            StateError: a disk is still attached.
        """
        self._loop.remove_reader(self._thread.fd)
        ended: ThreadFuture[None] = ThreadFuture()
        ended.set_running_or_notify_cancel()

        def close() -> None:
            try:
                self._thread.close()
            except StateError as exc:
                ended.set_exception(exc)
            else:
                ended.set_result(None)

        # One of our own: what a pool has taken and has no thread for, it may still do later.
        closer = threading.Thread(target=close, name="vhostblk-end")
        try:
            closer.start()
        except RuntimeError:
            # There may be no more threads (ulimit -u, systemd's TasksMax=): the loop waits, then.
            self._thread.close()
            return
        await asyncio.wrap_future(ended)
        closer.join()

    def _flush_soon(self) -> None:
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self._outbox:
            taken = self._thread.send(self._outbox)
            del self._outbox[:taken]
            if self._outbox:
                # The ring is full, so the engine has 4096 messages to work on: look again next turn.
                self._flush_scheduled = True
                self._loop.call_soon(self._flush)

    def _receive(self) -> None:
        until = monotonic() + _TURN
        self._receiving = True
        try:
            while True:
                if self._asked is not None:
                    self._asked.engine_requests(self, self._inbox, until)
                else:
                    self._hear_all(until)
                if monotonic() >= until:
                    return
                self._flush()
                batch = self._thread.receive()
                if not batch:
                    return
                self._inbox = iter(batch)
                self._asked = self._sinks[batch[0][4]] if self._thread.are_alike else None
                self.has_more = len(batch) > 1
        finally:
            self._receiving = False
            self._flush()
            ends, self._turn_ends = self._turn_ends, []
            for function in ends:
                function()

    def _hear_all(self, until: float) -> None:
        for message in self._inbox:
            self._hear(message, until)
            if monotonic() >= until:
                return

    def _hear(self, message: Message, until: float) -> None:
        if message[0] == _REQUEST:
            self._sinks[message[4]].engine_requests(self, iter((message,)), until)
        elif message[0] == _ACK:
            future, _ = self._commands.pop(message[3])
            if not future.cancelled():
                future.set_result(message)
        else:
            self._sinks[message[4]].engine_event(self, message)
