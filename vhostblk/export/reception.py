"""Who is let in to an export: its listening socket, and the one front-end at a time that has the disk.

Of those who may, whoever connects and speaks first has it (lobby.py). Who comes meanwhile is accepted and hung up on at
once, with a log line; who comes while a predecessor is still being drained waits for that.

Knows nothing about the disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from vhostblk.errors import StateError
from vhostblk.export.error_log import ErrorLog
from vhostblk.export.front_end import FrontEnd, Log
from vhostblk.export.lobby import Lobby
from vhostblk.export.options import ExportConfig
from vhostblk.vhost.transport import Connection, Listener

# How long to let things be when a client cannot be accepted for want of fds or memory, seconds.
_ACCEPT_RETRY = 0.2


class Visitors(Protocol):
    """Who counts front-ends."""

    def front_end_came(self) -> None: ...

    def front_end_left(self) -> None: ...


class Reception:
    """See the module. `listen`, `start`, `stop`, once each.

    Args:
        config: where to listen, and for how long to be patient.
        make: the session of a connection.
        visitors: is told who comes and goes.
        errors: where it is counted that nobody could be accepted.
        offences: where it is counted what front-ends do wrong; told of for each session.

    Context: the control loop.
    Owns: the listener and the connections.
    """

    def __init__(
        self,
        config: ExportConfig,
        make: Callable[[Connection], FrontEnd],
        visitors: Visitors,
        log: Log,
        errors: ErrorLog,
        offences: ErrorLog,
    ) -> None:
        self._config = config
        self._make = make
        self._visitors = visitors
        self._log = log
        self._errors = errors
        self._offences = offences
        # Who may not connect, and tries: could do so all day as well.
        self._strangers = ErrorLog(log)
        self.front_end: FrontEnd | None = None
        """Who has the disk; it may be leaving."""
        self._listener: Listener | None = None
        self._lobby = Lobby(config.handshake_timeout, self._spoke, offences)
        self._next: Connection | None = None  # has spoken, and waits for its predecessor
        self._accepting: asyncio.Task[None] | None = None
        self._serving: asyncio.Task[None] | None = None

    def listen(self) -> None:
        """Open the socket; whoever connects waits for `start`.

        Raises:
            ConfigError: it cannot be listened on.
        """
        config = self._config
        if config.socket_path is not None:
            self._listener = Listener.bind(config.socket_path, config.socket_access)
        else:
            assert config.fd is not None
            self._listener = Listener.adopt(config.fd)

    def start(self) -> None:
        """Let them in. `listen` comes first."""
        assert self._listener is not None
        self._accepting = asyncio.create_task(self._accept(self._listener))

    async def stop(self) -> None:
        """No more clients; the one there is is hung up on, once what it asked for has completed."""
        if self._listener is not None:
            self._listener.close()
        self._lobby.clear()
        if self._next is not None:
            self._next.close()
        if self.front_end is not None:
            self.front_end.disconnect()
        for task in (self._accepting, self._serving):
            if task is not None:
                await task
        self._strangers.summarize()

    async def _accept(self, listener: Listener) -> None:
        while True:
            try:
                connection = await listener.accept()
            except StateError:
                return
            except OSError as exc:
                self._errors.record(f"cannot accept a client: {exc.strerror}")
                await asyncio.sleep(_ACCEPT_RETRY)
                continue
            connection.message_timeout = self._config.message_timeout
            if self._is_stranger(connection):
                connection.close()
            elif self._is_taken():
                self._refuse(connection)
            else:
                self._lobby.admit(connection)
            # Others have their turn, also if somebody connects all the time.
            await asyncio.sleep(0)

    def _is_stranger(self, connection: Connection) -> bool:
        """Whether this is somebody who is not served; nothing has been read yet."""
        if self._config.peers is None:
            return False
        peer = connection.peer()
        if self._config.peers.allows(peer):
            return False
        self._strangers.record(
            f"refused a front-end of user {peer.uid}, group {peer.gid}: not allowed",
            f", process {peer.pid}",
        )
        return True

    def _is_taken(self) -> bool:
        """Whether somebody has the disk, or will have it as soon as it is free."""
        if self._next is not None:
            return not self._next.has_hung_up()
        return self.front_end is not None and not self.front_end.is_leaving

    def _refuse(self, connection: Connection) -> None:
        connection.close()
        self._offences.record("refused a second front-end: one is connected")

    def _spoke(self, connection: Connection) -> None:
        if self._is_taken():
            self._refuse(connection)
            return
        if self._next is not None:
            self._next.close()  # it has hung up
        self._next = connection
        self._lobby.clear()
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve_all())

    async def _serve_all(self) -> None:
        """Whoever has spoken, until nobody waits."""
        while self._next is not None:
            connection, self._next = self._next, None
            if not connection.is_closed:
                await self._serve(self._make(connection))

    async def _serve(self, front_end: FrontEnd) -> None:
        self.front_end = front_end
        self._log.info("a front-end has connected")
        self._visitors.front_end_came()
        try:
            await front_end.run()
        except Exception:
            self._log.exception("a bug: the session died")
        finally:
            self.front_end = None
            self._visitors.front_end_left()
            self._offences.summarize()
        self._log.info("the front-end has left")
