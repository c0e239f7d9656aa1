"""Where requests wait that the disk has failed, until somebody has mended what is wrong (block layer row B39).

Theory of operation: queues are paused exactly as long as a request is parked; what had been taken from them before is
still served, and may be parked, too. A resume tries all of them again, in their order; those that fail once more pause
the queues once more.

What waits for the requests of a guest (a queue that stops, another memory map) must not wait for people. So it closes
the parking: those that are there are reported to the guest, and until it is open again so is whatever fails.

Knows neither rings nor what a request does, nor which errors lead here (error_policy.py).
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vhostblk.export.error_policy import IoStatus


class Parking:
    """Failed requests that wait to be tried again.

    Args:
        paused: called when the first request is parked (True), and when none is any more (False).

    Context: the control loop.
    """

    def __init__(self, paused: Callable[[bool], None] = lambda _: None) -> None:
        self.paused = paused
        self.status = IoStatus.OK
        self._parked: list[asyncio.Future[bool]] = []
        self._closed = 0

    @property
    def is_paused(self) -> bool:
        """Whether requests are parked, and so the queues paused."""
        return bool(self._parked)

    @property
    def is_open(self) -> bool:
        """Whether requests may be parked now."""
        return not self._closed

    def note(self, error: int) -> None:
        """Say why: the first error stays until the resume (row B39.5). `park` follows."""
        if self.status is IoStatus.OK:
            self.status = IoStatus.NOSPACE if error == errno.ENOSPC else IoStatus.FAILED

    async def park(self) -> bool:
        """Wait; says whether to try again. Requests go on in the order in which they came."""
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._parked.append(waiter)
        if len(self._parked) == 1:
            self.paused(True)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter in self._parked:
                self._parked.remove(waiter)
                if not self._parked:
                    self._leave([], again=False)
            raise

    def resume(self) -> int:
        """Let all be tried again; returns how many there were."""
        return self._release(again=True)

    @contextmanager
    def closed(self) -> Iterator[int]:
        """Nothing is parked inside `with`; gives how many requests were, which are reported to the guest now."""
        self._closed += 1
        try:
            yield self._release(again=False)
        finally:
            self._closed -= 1

    def _release(self, *, again: bool) -> int:
        parked, self._parked = self._parked, []
        if parked:
            self._leave(parked, again=again)
        return len(parked)

    def _leave(self, parked: list[asyncio.Future[bool]], *, again: bool) -> None:
        self.status = IoStatus.OK
        # First: queues that go on may fail, and pause again.
        self.paused(False)
        for waiter in parked:
            if not waiter.done():
                waiter.set_result(again)
