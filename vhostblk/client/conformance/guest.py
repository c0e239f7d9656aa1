"""A guest that looks closely: a client, and everything of its rings that a check wants to see.

VIRTIO 1.2 §2.7. Buffers that the device is to fill hold junk before, so that data which was not
written is not mistaken for data that was. Notifications are looked at one by one, not used to wait.

Knows nothing of which behaviour is right.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Self

from vhostblk.client.client import Client
from vhostblk.client.conformance.check import CheckFailedError, expect
from vhostblk.client.control import Control
from vhostblk.client.queue import ClientQueue, Framing, Pending
from vhostblk.errors import PeerError, SessionError
from vhostblk.vhost.message import Message
from vhostblk.vhost.vring import VringFd
from vhostblk.virtio.blk import ID_BYTES, RequestType, Status
from vhostblk.virtio.driver import Buffer, DriverQueue, Used

__all__ = ["Guest", "status_name"]

_JUNK = b"\xa5"
# How long a notification that must not come is waited for, seconds.
_GRACE = 0.03
_STATUS = {int(status): status.name for status in Status} | {0xFF: "none"}


def status_name(status: int | None) -> str:
    """Name a request's status for a detail."""
    return "unfinished" if status is None else _STATUS.get(status, str(status))


class Guest:
    """A connected client, with eyes.

    Args:
        client: becomes this object's.

    Context: one thread. Owns: the client.
    """

    def __init__(self, client: Client) -> None:
        self.client = client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.client.__exit__(kind, error, traceback)

    @property
    def control(self) -> Control:
        """The vhost-user side."""
        return self.client.control

    def ask(self, message: Message) -> None:
        """Send a request; as `Control.ask`, for those whose answer has no content."""
        self.client.control.ask(message)

    def queue(self, index: int = 0) -> ClientQueue:
        """One of the queues."""
        return self.client.queues[index]

    def driver(self, index: int = 0) -> DriverQueue:
        """The driver's half of a queue."""
        driver = self.client.queues[index].driver
        assert isinstance(driver, DriverQueue), "the ring is packed"
        return driver

    # ---------------------------------------------------------------- requests

    def submit(
        self,
        kind: int,
        offset: int = 0,
        *,
        out: bytes = b"",
        room: int = 0,
        queue: int = 0,
        framing: Framing | None = None,
        indirect: bool | None = None,
        notify: bool = True,
    ) -> Pending:
        """As `Client.submit`; what the device is to fill holds junk."""
        pending = self.client.submit(
            kind,
            offset,
            out=out,
            room=room,
            queue=queue,
            framing=framing,
            indirect=indirect,
            notify=False,
        )
        if room:
            self.client.memory.write(pending.data.gpa, _JUNK * room)
        if notify:
            self.queue(queue).notify()
        return pending

    def run(
        self,
        kind: int,
        offset: int = 0,
        *,
        out: bytes = b"",
        room: int = 0,
        queue: int = 0,
        framing: Framing | None = None,
        indirect: bool | None = None,
    ) -> Pending:
        """Make a request and wait for it."""
        pending = self.submit(
            kind, offset, out=out, room=room, queue=queue, framing=framing, indirect=indirect
        )
        self.client.wait([pending])
        return pending

    def read(self, offset: int, length: int, *, queue: int = 0) -> bytes:
        """Read as Linux does; a read that fails fails the check."""
        pending = self.run(RequestType.IN, offset, room=length, queue=queue)
        self.expect_status(pending, Status.OK)
        return pending.content

    def write(self, offset: int, data: bytes, *, queue: int = 0) -> None:
        """Write as Linux does; a write that fails fails the check."""
        pending = self.run(RequestType.OUT, offset, out=data, queue=queue)
        self.expect_status(pending, Status.OK)

    def identify(self, count: int = 1, *, queue: int = 0, notify: bool = True) -> list[Pending]:
        """Submit requests that cost next to nothing, publish them at once, and kick."""
        pending = [
            self.submit(RequestType.GET_ID, room=ID_BYTES, queue=queue, notify=False)
            for _ in range(count)
        ]
        if notify:
            self.driver(queue).publish()
            self.queue(queue).kick()
        return pending

    @staticmethod
    def expect_status(pending: Pending, *allowed: Status, what: str = "") -> None:
        """Fail the check unless a request ended with one of these."""
        names = " or ".join(status.name for status in allowed)
        expect(
            pending.status in allowed,
            f"{what or _request_name(pending.type)}: status {status_name(pending.status)}, not {names}",
        )

    def chain(
        self,
        readable: Sequence[Buffer],
        writable: Sequence[Buffer],
        *,
        indirect: bool = False,
        queue: int = 0,
    ) -> Used:
        """Run a chain made of any buffers; what the device writes there is the caller's to look at."""
        ours = self.queue(queue)
        ours.foreign.clear()
        self.driver(queue).add(readable, writable, indirect=indirect)
        ours.notify()
        self.client.wait_until(lambda: bool(ours.foreign))
        return ours.foreign.pop()

    # ---------------------------------------------------------------- waiting without being told

    def finish(self, pending: Collection[Pending], seconds: float | None = None) -> None:
        """Wait for requests without asking for, or using up, notifications.

        Raises:
            TimeoutError, SessionError, PeerError: as `Client.wait`.
        """

        def done() -> bool:
            self.client.poll()
            return all(p.is_done for p in pending)

        self.eventually(done, f"{len(pending)} requests", seconds)

    def eventually(
        self, condition: Callable[[], bool], what: str, seconds: float | None = None
    ) -> None:
        """Look again and again until `condition` holds; as `finish`."""
        connection = self.control.connection
        deadline = time.monotonic() + (connection.timeout if seconds is None else seconds)
        poller = select.poll()
        poller.register(connection.fileno(), select.POLLIN)
        errors = {queue.err_fd: queue.index for queue in self.client.queues}
        for fd in errors:
            poller.register(fd, select.POLLIN)
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not in time")
            for fd, _ in poller.poll(1):
                if fd in errors:
                    raise PeerError(f"the back-end declared queue {errors[fd]} broken")
                raise SessionError(f"the back-end left before {what}")

    def is_done_soon(self, pending: Collection[Pending]) -> bool:
        """Whether requests that should not be done are, a little later."""
        try:
            self.finish(pending, _GRACE)
        except TimeoutError:
            return False
        return True

    # ---------------------------------------------------------------- notifications

    def calls(self, queue: int = 0) -> int:
        """Count what the device has called since this was asked last, after giving it time to."""
        # Whoever handles messages and requests in one thread has called before it answers.
        for _ in range(2):
            self.ask(self.control.frontend.get_features())
        return self._read_calls(queue, _GRACE)

    def wait_told(self, pending: Collection[Pending], queue: int = 0) -> None:
        """Wait for requests of one queue as a driver does that sleeps until it is told.

        `Client.wait` looks once more when its time is over, and so forgives a call that was lost.

        Raises:
            CheckFailedError: no call came.
        """
        driver, ours = self.driver(queue), self.queue(queue)
        while not all(p.is_done for p in pending):
            if not driver.enable_interrupts() and not self.wait_call(queue):
                finished = bool(ours.reap())
                what = "finished, but no call came" if finished else "did not finish"
                raise CheckFailedError(f"of {len(pending)} requests some {what}")
            ours.calls += 1
            driver.disable_interrupts()
            ours.reap()

    def wait_call(self, queue: int = 0) -> bool:
        """Whether the device calls, within the time that there is for everything."""
        return self._read_calls(queue, self.control.connection.timeout) > 0

    def _read_calls(self, queue: int, seconds: float) -> int:
        fd = self.queue(queue).call_fd
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        if not poller.poll(seconds * 1000):
            return 0
        return os.eventfd_read(fd)

    def quiet(self, queue: int = 0) -> None:
        """Get one request through, and let the device tell all it has to tell."""
        self.finish(self.identify(queue=queue))
        while self.calls(queue):
            pass

    def exchange(self, which: VringFd, queue: int = 0) -> int:
        """Give the back-end a new kick or call fd.

        Returns:
            The old one, the caller's to close.
        """
        ours = self.queue(queue)
        new = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        if which is VringFd.CALL:
            old, ours.call_fd = ours.call_fd, new
        else:
            old, ours.kick_fd = ours.kick_fd, new
        self.ask(self.control.frontend.set_vring_fd(queue, which, new))
        return old

    # ---------------------------------------------------------------- the used ring

    def used_idx(self, queue: int = 0) -> int:
        """What the device has made of used.idx."""
        return self._used_word(2, queue)

    def used_flags(self, queue: int = 0) -> int:
        """used.flags."""
        return self._used_word(0, queue)

    def avail_event(self, queue: int = 0) -> int:
        """Which available element the device wants to be told of (VIRTIO_F_EVENT_IDX)."""
        return self._used_word(4 + 8 * self.driver(queue).size, queue)

    def _used_word(self, offset: int, queue: int) -> int:
        driver = self.driver(queue)
        word = Buffer(driver.gpa + driver.used_offset + offset, 2)
        return int.from_bytes(self.client.memory.read(word), "little")


def _request_name(kind: int) -> str:
    """Name a request type for a detail."""
    try:
        return RequestType(kind).name
    except ValueError:
        return f"type {kind}"
