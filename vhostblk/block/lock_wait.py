"""Waits for images that another process is about to let go of.

A daemon that was killed still holds its image: the kernel goes on with the I/O it had begun, and the locks belong to
the open file, which lives as long as that I/O does. Whoever takes the image before may see an old write land on top of
a later one. So its successor tries until the locks are free, which is the kernel's word that nothing is in flight.

Tried again and again, in growing steps: the kernel would wake us (F_OFD_SETLKW) for a lock in our way only if we asked
for one that is in everybody else's, and QEMU takes such an instant for a refusal.

Knows nothing about what is opened.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from vhostblk.errors import ConfigError

__all__ = ["LockWait", "StoppedError"]

log = logging.getLogger(__name__)

_FIRST_PAUSE = 0.002
_LONGEST_PAUSE = 0.1

_Result = TypeVar("_Result")


class StoppedError(Exception):
    """Nobody wants the image any more."""


class LockWait:
    """The time that there is to wait for locks, of all images together.

    Args:
        seconds: how long; 0: not at all.
        stop: set when there is no use in waiting any more.

    Context: the control loop.
    """

    def __init__(self, seconds: float, stop: asyncio.Event) -> None:
        self._seconds = seconds
        self._left = seconds
        self._stop = stop

    async def attempt(self, take: Callable[[], Awaitable[_Result]]) -> _Result:
        """Call `take` until no lock is in its way.

        Args:
            take: all or nothing; what it raises with EAGAIN means that another process has a lock.

        Raises:
            ConfigError: the time is up, and another process still has it; or something else is wrong.
            StoppedError: `stop` was set meanwhile.
        """
        began = time.monotonic()
        end, pause = began + self._left, _FIRST_PAUSE
        is_told = False
        while True:
            try:
                result = await take()
            except ConfigError as error:
                now = time.monotonic()
                if error.errno != errno.EAGAIN or not self._seconds:
                    raise
                if now >= end:
                    self._left = 0.0
                    waited = f"waited {self._seconds:g} s for it"
                    raise ConfigError(f"{error} ({waited})", error.errno) from None
                if not is_told:
                    log.info("waiting for at most %.3g s: %s", end - now, error)
                    is_told = True
            else:
                self._left = max(0.0, end - time.monotonic())
                if is_told:
                    log.info("waited %.3f s for the image", time.monotonic() - began)
                return result
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), min(pause, max(end - now, 0.0)))
            if self._stop.is_set():
                raise StoppedError
            pause = min(2 * pause, _LONGEST_PAUSE)
