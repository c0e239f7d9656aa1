"""Run a coroutine without a task for as long as it does not wait; see `block/eager.py`."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from vhostblk.block.eager import DONE, begin, rest


def run_eagerly(coro: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
    """Run `coro`, if it waits in a task.

    Args:
        coro: must not raise: an exception is a bug and goes to the loop's exception handler.
        tasks: holds the task while the coroutine waits; the caller can see, and await, what is left.

    Context: the control loop.
    """
    waits_for = begin(coro)
    if waits_for is not DONE:
        task = asyncio.get_running_loop().create_task(_finish(coro, waits_for))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _finish(coro: Coroutine[Any, Any, None], waits_for: Any) -> None:
    await rest(coro, waits_for)
