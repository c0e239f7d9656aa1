"""Begin a coroutine here and now, and learn whether it had to wait.

Most requests never wait: the data was in memory, or the request was refused. Whoever begins one with `begin` finds
out, and spares what matters only to those who run meanwhile, because nobody does: a task, a place in the list of
requests. What has to wait is finished by awaiting `rest`.

Outside of a task `asyncio.current_task()` is None until then, hence `asyncio.timeout` must not be entered before the
first wait.
"""

from __future__ import annotations

import types
from collections.abc import Coroutine, Generator
from functools import partial
from typing import Any, Final

DONE: Final = object()
"""What a coroutine waits for that waits for nothing any more."""


def begin(coro: Coroutine[Any, Any, None]) -> Any:
    """Run `coro` until it waits; gives what `rest` wants to know, or DONE. Raises what `coro` raises."""
    # Unlike send(None), this makes no exception out of a return: that would be a third of the price of a request.
    return next(coro.__await__(), DONE)


@types.coroutine
def rest(coro: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
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
