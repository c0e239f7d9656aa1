"""Connections that have not said anything yet, on their way to an export that takes one front-end at a time.

Theory of operation: to be connected is not to have the disk. Whoever connects while nobody has it waits here; the
first whose message is whole gets it, and the others are hung up on. So a connection on which nothing is said, or half
a message, keeps nobody out. It costs an fd, for a bounded time, and there is a bounded number: with one more the oldest
is hung up on, which the loop has looked at before, so it had said nothing then.

Knows nothing about what is said, nor about what becomes of a front-end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vhostblk.errors import SessionError
from vhostblk.export.error_log import ErrorLog
from vhostblk.vhost.connection import Connection

MAX_WAITING = 16


class Lobby:
    """See the module.

    Args:
        timeout: how long a connection may wait for its first message to be whole, seconds; 0: for ever.
        spoke: gets each connection whose first message is whole; it is whoever's this is then.
        offences: where those are counted that do not come that far.

    Context: the control loop.
    Owns: the connections, until they have spoken.
    """

    def __init__(
        self, timeout: float, spoke: Callable[[Connection], None], offences: ErrorLog
    ) -> None:
        self._timeout = timeout
        self._spoke = spoke
        self._offences = offences
        self._waiting: dict[asyncio.Task[None], Connection] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._waiting)

    def admit(self, connection: Connection) -> None:
        """Listen to one more."""
        if len(self._waiting) >= MAX_WAITING:
            oldest = next(iter(self._waiting))
            self._waiting.pop(oldest).close()
            self._offences.record(
                "hung up on a connection that had said nothing",
                f": there were {MAX_WAITING} of them, and one more came",
            )
        self._waiting[asyncio.create_task(self._listen_to(connection))] = connection

    def clear(self) -> None:
        """Hang up on all of them."""
        waiting, self._waiting = self._waiting, {}
        for connection in waiting.values():
            connection.close()

    async def _listen_to(self, connection: Connection) -> None:
        has_spoken = False
        try:
            has_spoken = await connection.first_message(self._timeout)
        except SessionError as exc:
            self._offences.record("hung up on a connection before its first message", f": {exc}")
        finally:
            task = asyncio.current_task()
            assert task is not None
            self._waiting.pop(task, None)
            if not has_spoken:
                connection.close()
        if has_spoken:
            self._spoke(connection)
