"""Run a coroutine without a task for as long as it does not wait.

Most requests finish at the first `send(None)`: the data was in memory, or the request was refused. A task costs more
than such a request (`docs/` has the figures), so one is made only for a coroutine that really suspends. Until then
`asyncio.current_task()` is None, hence `asyncio.timeout` must not be entered before the first wait.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


@types.coroutine
def _rest(coro: Coroutine[Any, Any, T], waiting_for: Any) -> Generator[Any, Any, T]:
    """What remains of `coro`, which has yielded `waiting_for` already."""
    while True:
        try:
            value = yield waiting_for
        except BaseException as exc:
            step = partial(coro.throw, exc)
        else:
            step = partial(coro.send, value)
        try:
            waiting_for = step()
        except StopIteration as stop:
            result: T = stop.value
            return result


def run_eagerly(
    coro: Coroutine[Any, Any, T], done: Callable[[T], None], tasks: set[asyncio.Task[None]]
) -> None:
    """Run `coro`, then call `done` with its result.

    Args:
        coro: must not raise: an exception is a bug and goes to the loop's exception handler.
        done: called before this returns if the coroutine never waited.
        tasks: holds the task while the coroutine waits; the caller can see, and await, what is left.

    Context: the control loop.
    """
    try:
        waiting_for = coro.send(None)
    except StopIteration as stop:
        done(stop.value)
        return

    async def finish() -> None:
        done(await _rest(coro, waiting_for))

    task = asyncio.get_running_loop().create_task(finish())
    tasks.add(task)
    task.add_done_callback(tasks.discard)
