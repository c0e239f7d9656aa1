"""Who may call what from where (block layer row B01, translated).

There is one control loop. Everything that changes the graph runs there ("global state"), and so do all requests; the
engine's threads call no Python at all. So there is no graph lock between threads. Between coroutines there is one: a
change of the graph may suspend, and only one is made at a time (row B01.5; requests that run meanwhile are drained).

A node has no loop of its own that it could be moved from or to (row B27): what moves between threads are the queues of
an export, and those belong to the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from vhostblk.block.eager import DONE, begin, rest
from vhostblk.errors import StateError

T = TypeVar("T")


class ControlLoop:
    """The loop that a graph belongs to: the first one it is used on."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def check(self) -> None:
        """Refuse to go on anywhere else; whoever is refused has a bug (row B01.2).

        Raises:
            StateError: another loop, or none, is running here.
        """
        running = _running_loop()
        if self._loop is None:
            self._loop = running
        if running is None or running is not self._loop:
            raise StateError("the block graph was used outside of its control loop")

    def run_sync(self, coro: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine on the control loop from another thread, and wait for it (row B01.8).

        Args:
            timeout: seconds.

        Raises:
            StateError: the control loop would wait for itself, or is not known yet.
            TimeoutError: it took too long.
        """
        if self._loop is None or _running_loop() is self._loop:
            coro.close()
            raise StateError("waiting here for the control loop would never end")
        return asyncio.run_coroutine_threadsafe(coro, self._loop).result(timeout)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


async def to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Do what must not be left half done; who is cancelled meanwhile learns that afterwards."""
    waits_for = begin(work)
    if waits_for is DONE:
        return
    task = asyncio.get_running_loop().create_task(_finish(work, waits_for))
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # nobody else asks
        raise cancelled
    task.result()


async def _finish(work: Coroutine[Any, Any, None], waits_for: Any) -> None:
    await rest(work, waits_for)
