"""Run a coroutine without a task for as long as it does not wait; see `block/eager.py`."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any

from vhostblk.block.eager import DONE, begin


class _Rest(Coroutine[Any, Any, None]):
    """What remains of `coro`, which waits for `waits_for` already.

    Unlike a coroutine of its own, it is not thrown away if its task is cancelled before it has had its first turn: the
    kernel may be using the memory of what `coro` waits for (row B25).
    """

    __slots__ = ("_cancelled", "_coro", "_has_begun", "_waits_for")

    def __init__(self, coro: Coroutine[Any, Any, None], waits_for: Any) -> None:
        self._coro = coro
        self._waits_for = waits_for
        self._has_begun = False
        self._cancelled: BaseException | None = None

    def send(self, value: Any) -> Any:
        """Go on; first of all, wait."""
        if not self._has_begun:
            return self._begin()
        if self._cancelled is not None:
            cancelled, self._cancelled = self._cancelled, None
            return self._coro.throw(cancelled)
        return self._coro.send(value)

    def throw(self, error: Any, *_: Any) -> Any:
        """Cancel what it waits for, if that can be, as a task does; otherwise when the wait is over."""
        if self._has_begun:
            return self._coro.throw(error)
        waits_for = self._begin()
        if waits_for is None or not waits_for.cancel():
            self._cancelled = error
        return waits_for

    def close(self) -> None:
        """Give up."""
        self._coro.close()

    def __await__(self) -> Generator[Any, Any, None]:
        raise NotImplementedError

    def _begin(self) -> Any:
        self._has_begun = True
        waits_for, self._waits_for = self._waits_for, None
        return waits_for


def run_eagerly(coro: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
    """Run `coro`, if it waits in a task.

    Args:
        coro: must not raise: an exception is a bug and goes to the loop's exception handler. Not even when its task is
            cancelled: whoever waits for an answer gets one.
        tasks: holds the task while the coroutine waits; the caller can see, and await, what is left.

    Context: the control loop.
    """
    waits_for = begin(coro)
    if waits_for is not DONE:
        task = asyncio.get_running_loop().create_task(_Rest(coro, waits_for))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
