"""Begin a coroutine here and now, and learn whether it had to wait.

Most requests never wait: the data was in memory, or the request was refused. Whoever begins one with `begin` finds
out, and spares what matters only to those who run meanwhile, because nobody does: a task, a place in the list of
requests. What has to wait is finished by awaiting `rest`.

A request that may well be over at once need not be a coroutine at all: a function that does it, and returns DONE or
what is to be awaited, costs a fraction. Who calls it awaits what it gives at once, before anything else can happen.

Outside of a task `asyncio.current_task()` is None until then, hence `asyncio.timeout` must not be entered before the
first wait.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Coroutine, Generator
from functools import partial
from typing import Any, Final

Request = Coroutine[Any, Any, None]
"""What functions return that make requests: DONE, or a coroutine."""


class _Done(Request):
    """A coroutine that has ended, however often it is awaited."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, Any, None]:
        yield from ()

    def send(self, _value: Any) -> Any:
        """Ends."""
        raise StopIteration

    def throw(self, error: Any, *_: Any) -> Any:
        """Nobody is there to catch it."""
        raise error

    def close(self) -> None:
        """Is."""


DONE: Final = _Done()
"""A request that is over; and what a coroutine waits for that waits for nothing any more."""


def begin(coro: Request) -> Any:
    """Run `coro` until it waits; gives what `rest` wants to know, or DONE. Raises what `coro` raises."""
    # Unlike send(None), this makes no exception out of a return: that would be a third of the price of a request.
    return next(coro.__await__(), DONE)


@types.coroutine
def rest(coro: Request, waits_for: Any) -> Generator[Any, Any, None]:
    """What remains of `coro`, for which `begin` has given `waits_for`."""
    while True:
        try:
            value = yield waits_for
        except BaseException as exc:
            step = partial(coro.throw, exc)
        else:
            step = partial(coro.send, value)
        try:
            waits_for = step()
        except StopIteration:
            return
        finally:
            # What was thrown knows this frame by its traceback: a circle would keep the request's memory mapped.
            del step


async def to_the_end(task: asyncio.Future[None]) -> None:
    """Wait until something is done; who is cancelled meanwhile is so behind that."""
    is_cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            is_cancelled = not task.cancelled()
    if is_cancelled:
        raise asyncio.CancelledError
    await task
