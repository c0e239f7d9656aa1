"""Something that takes a while, and is done once more if somebody asks for it meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from vhostblk.block.eager import to_the_end


class Again:
    """What was the case when `ask` was called is seen by a run that began behind it.

    Args:
        action: must not raise.

    Context: the control loop.
    """

    def __init__(self, action: Callable[[], Awaitable[None]]) -> None:
        self._action = action
        self._is_due = False
        self._running: asyncio.Task[None] | None = None

    @property
    def is_running(self) -> bool:
        """Whether it goes on."""
        return self._running is not None and not self._running.done()

    def ask(self) -> None:
        """Do it; if it is being done, once more behind that."""
        self._is_due = True
        if not self.is_running:
            self._running = asyncio.create_task(self._run())

    async def wait(self) -> None:
        """Return when there is nothing to do; also who is cancelled meanwhile waits for that: others do."""
        if self._running is not None:
            await to_the_end(self._running)

    async def cancel(self) -> None:
        """Do it no more, and return when nothing goes on."""
        self._is_due = False
        if self._running is not None:
            self._running.cancel()
            with suppress(asyncio.CancelledError):
                await self._running

    async def _run(self) -> None:
        while self._is_due:
            self._is_due = False
            await self._action()
