"""How a guest without a VM waits: for its queues, and for the end of the connection.

Theory of operation. Before it sleeps, a driver asks every queue for an interrupt and looks once more;
what came in between would otherwise be slept through (VIRTIO 1.2 §2.7.14). It sleeps on the call
fds, on the error fds, and on the connection, on which nothing comes unasked but its end.

Knows nothing of what the queues carry.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Sequence

from vhostblk.client.queue import ClientQueue, Pending
from vhostblk.errors import PeerError, SessionError, StateError

__all__ = ["poll", "wait_broken", "wait_until"]

_POLLED_RING_DELAY_MS = 1


def poll(queues: Sequence[ClientQueue]) -> list[Pending]:
    """Take what has finished, without waiting."""
    return [pending for queue in queues for pending in queue.reap()]


def wait_until(
    condition: Callable[[], bool], queues: Sequence[ClientQueue], connection: int, seconds: float
) -> list[Pending]:
    """Take what finishes until `condition` holds.

    Args:
        condition: looked at after every arrival.
        queues: to be served.
        connection: fd of the session; negative if it is closed.
        seconds: give up after that.

    Returns:
        Everything that finished.

    Raises:
        TimeoutError: the condition does not hold in time.
        SessionError: the back-end is gone.
        PeerError: it declared a queue broken, or broke the ring's rules.
        StateError: the connection is closed, so there is nothing to wait for.
    """
    deadline = time.monotonic() + seconds
    finished = poll(queues)
    while not condition():
        have_work = [queue.driver.enable_interrupts() for queue in queues]
        if not any(have_work):
            _sleep(queues, connection, deadline - time.monotonic())
        for queue in queues:
            queue.driver.disable_interrupts()
        finished += poll(queues)
    return finished


def wait_broken(queue: ClientQueue, seconds: float) -> None:
    """Wait until the back-end declares a queue broken through its error fd.

    Raises:
        TimeoutError: it did not.
    """
    poller = select.poll()
    poller.register(queue.err_fd, select.POLLIN)
    if not poller.poll(seconds * 1000):
        raise TimeoutError(f"queue {queue.index} was not declared broken")
    os.eventfd_read(queue.err_fd)


def _sleep(queues: Sequence[ClientQueue], connection: int, seconds: float) -> None:
    """Sleep until something happened; raise if it is bad or the time is over."""
    in_flight = sum(queue.driver.in_flight for queue in queues)
    if connection < 0:
        raise StateError(f"the connection is closed, {in_flight} requests in flight")
    if seconds <= 0:
        raise TimeoutError(f"{in_flight} requests did not finish")
    milliseconds = seconds * 1000 + 1
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    for queue in queues:
        poller.register(queue.call_fd, select.POLLIN)
        poller.register(queue.err_fd, select.POLLIN)
        if queue.is_polled:
            milliseconds = _POLLED_RING_DELAY_MS
    ready = {fd for fd, _ in poller.poll(milliseconds)}
    for queue in queues:
        if queue.call_fd in ready:
            queue.calls += 1
            os.eventfd_read(queue.call_fd)
        if queue.err_fd in ready:
            os.eventfd_read(queue.err_fd)
            raise PeerError(f"the back-end declared queue {queue.index} broken")
    if connection in ready:
        raise SessionError(f"the back-end left with {in_flight} requests in flight")
