"""Breakpoints: requests that stop at an event until somebody lets them go (block layer row B43.3).

A breakpoint is good for one request, the next one that comes to its event. Several of the same event stop it together;
it goes on when all of them have let it go. Tags need not be unique.

Knows nothing about nodes.
"""

from __future__ import annotations

import asyncio
import logging

log = logging.getLogger(__name__)

_Stop = tuple[str, "asyncio.Future[None]"]


class Breakpoints:
    """Those of one node, and who is suspended there.

    Context: the control loop.
    """

    def __init__(self) -> None:
        self._set: list[tuple[str, str]] = []  # (event, tag), the latest first, as in QEMU
        self._suspended: list[_Stop] = []  # (tag, who waits), the latest first

    def __bool__(self) -> bool:
        return bool(self._set or self._suspended)

    def add(self, event: str, tag: str) -> None:
        """Suspend the next request that comes to an event."""
        self._set.insert(0, (event, tag))

    async def reach(self, event: str) -> None:
        """A request comes to an event; returns when it may go on."""
        here = [tag for at, tag in self._set if at == event]
        if not here:
            return
        self._set = [point for point in self._set if point[0] != event]
        stops = [(tag, asyncio.get_running_loop().create_future()) for tag in here]
        for stop in stops:
            self._suspended.insert(0, stop)
            log.info("blkdebug: Suspended request '%s'", stop[0])
        try:
            for _, waiter in stops:
                await waiter
        finally:
            self._suspended = [stop for stop in self._suspended if stop not in stops]

    def resume(self, tag: str) -> bool:
        """Let the request go that was suspended last with this tag; says whether there was one."""
        for stop in self._suspended:
            if stop[0] == tag:
                self._suspended.remove(stop)
                log.info("blkdebug: Resuming request '%s'", tag)
                if not stop[1].done():
                    stop[1].set_result(None)
                return True
        return False

    def remove(self, tag: str) -> bool:
        """Forget the breakpoints with this tag, let go who is suspended there; says whether there was anything."""
        left = [point for point in self._set if point[1] != tag]
        found = len(left) != len(self._set)
        self._set = left
        while self.resume(tag):
            found = True
        return found

    def is_suspended(self, tag: str) -> bool:
        """Whether a request is suspended with this tag."""
        return any(at == tag for at, _ in self._suspended)
