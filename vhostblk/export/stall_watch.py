"""Says in the log that a disk does not answer, once, and when it does again.

Theory of operation: while a front-end is there, and until its last request has ended, the statistics of its queues are
looked at from time to time, which disturbs nobody who counts there. A request that is in flight for too long makes a
line, and the next look that finds none another one. Requests that wait for people (error_policy.py) are not late: the
log has said so.

Knows nothing about disks, nor why they hang.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from vhostblk.export.front_end import Log

# Looks in the time after which there is something to say; seconds between two of them, at most.
_LOOKS = 4
_LONGEST_PAUSE = 10.0


class StallWatch:
    """See the module.

    Args:
        after: how long a request may take before that is worth a line, seconds; 0: never.
        look: gives how many requests are in flight, and when the oldest was taken (CLOCK_MONOTONIC, ns; 0: none is).
        is_excused: whether requests wait because somebody has to do something about them.

    Context: the control loop.
    """

    def __init__(
        self,
        after: float,
        look: Callable[[], tuple[int, int]],
        is_excused: Callable[[], bool],
        log: Log,
    ) -> None:
        self._after = after
        self._look = look
        self._is_excused = is_excused
        self._log = log
        self._timer: asyncio.TimerHandle | None = None
        self._stalled_since = 0  # what the log was told; 0: it was not

    def start(self) -> None:
        """Look from now on."""
        if self._after and self._timer is None:
            self._wait()

    def stop(self) -> None:
        """Nothing is in flight any more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            if self._stalled_since:
                self._look_once()

    def _wait(self) -> None:
        pause = min(self._after / _LOOKS, _LONGEST_PAUSE)
        self._timer = asyncio.get_running_loop().call_later(pause, self._again)

    def _again(self) -> None:
        self._wait()
        self._look_once()

    def _look_once(self) -> None:
        in_flight, oldest = self._look()
        now = time.monotonic_ns()
        is_late = oldest and now - oldest >= self._after * 1e9 and not self._is_excused()
        if is_late and not self._stalled_since:
            self._stalled_since = oldest
            self._log.warning(
                "the disk does not answer: %d requests in flight, one for %.1f s",
                in_flight,
                (now - oldest) / 1e9,
            )
        elif self._stalled_since and not is_late:
            duration = (now - self._stalled_since) / 1e9
            self._stalled_since = 0
            self._log.warning("the disk answers again, after %.1f s", duration)
