"""A lasting link to an NBD server: requests that wait for their turn, and for a server that comes back.

Theory of operation, as QEMU describes `reconnect-delay` and `open-timeout`:

- *connected*: requests go to the server, at most `MAX_IN_FLIGHT` at a time; the others wait.
- *lost*: the server has left. A task connects anew, at once and then after longer and longer pauses, until it succeeds.
  For `reconnect_delay` seconds from the first request that has to do without, requests wait, those that got no reply as
  well, and are made anew then. After that, or without a delay, they fail with EIO.
- *silent*: the server has not answered a request in `timeout` seconds (QEMU has no such option). It is lost, as if it
  had left; but as long as no request is answered, `reconnect_delay` is counted from then on, not anew with each
  connection: a server that shakes hands, and is silent again, would make requests wait for ever.
- *broken*: the server has lied, so nothing it says is of use. Every request fails with EIO, for good.

A server that comes back must be the one that left, as far as anybody can tell: of the same size, and able to do what
the first one could; another one is left alone and tried again.

Knows nothing about nodes.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable

from vhostblk.block.drivers.nbd_address import Address
from vhostblk.block.drivers.nbd_connection import Connection
from vhostblk.block.drivers.nbd_wire import Export, ExportFlag, Request
from vhostblk.errors import BlockError, ConfigError

log = logging.getLogger(__name__)

MAX_IN_FLIGHT = 16
_FIRST_PAUSE = 0.125
_LONGEST_PAUSE = 16.0


class Link:
    """See the module's docstring.

    Args:
        name: of the export. context: as for `handshake`. reconnect_delay: in seconds. timeout: of a request, in
            seconds; 0: none. owner: the node, for logs.

    Context: the control loop.
    Owns: the connection, and the task that makes another one.
    """

    def __init__(
        self,
        address: Address,
        name: str,
        context: str,
        reconnect_delay: int,
        timeout: float,
        owner: str,
    ) -> None:
        self.export = Export(0, ExportFlag(0))
        self._address = address
        self._name = name
        self._context = context
        self._reconnect_delay = reconnect_delay
        self._timeout = timeout
        self._owner = owner
        self._turns = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._connection: Connection | None = None
        self._why_not = BlockError(errno.EIO, f"{owner}: not connected")
        self._is_broken = False
        self._is_patient = True  # requests may wait for the server
        self._patience: asyncio.TimerHandle | None = None
        self._silent_since: float | None = None  # the first time-out behind the last reply
        self._changed: set[asyncio.Future[None]] = set()
        self._task: asyncio.Task[None] | None = None

    async def open(self, timeout: int) -> None:
        """Connect; sets `export`.

        Args:
            timeout: seconds for which to try again; 0: once.

        Raises:
            ConfigError: why it has failed the last time.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        task = loop.create_task(self._open(end if timeout else None))
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            await _stop(task)
            await self.close()
            raise
        task.result()

    async def _open(self, end: float | None) -> None:
        failure: ConfigError | None = None
        pause = _FIRST_PAUSE
        while True:
            try:
                async with asyncio.timeout_at(end):
                    # It may be lost from the next turn of the loop on: nothing may wait in between.
                    self._connection = await self._connect()
                    self.export = self._connection.export
                    return
            except ConfigError as error:
                failure = error
            except TimeoutError:
                raise failure or ConfigError(
                    f"Failed to connect to '{self._address}': Connection timed out",
                    errno.ETIMEDOUT,
                ) from None
            now = asyncio.get_running_loop().time()
            if end is None or now >= end:
                raise failure
            await asyncio.sleep(min(pause, end - now))
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _connect(self) -> Connection:
        return await Connection.open(
            self._address, self._name, self._context, self._timeout, self._has_lost
        )

    async def request(self, make: Callable[[], Request]) -> Request:
        """Make a request; `make` is called each time that it is sent.

        Raises:
            BlockError: the server's; EIO: there is no server.
        """
        async with self._turns:
            while True:
                connection = self._connection or await self._connected()
                request = make()
                await connection.send(request)
                if request.is_lost:
                    continue
                self._silent_since = None
                if request.error is not None:
                    raise request.error
                return request

    async def _connected(self) -> Connection:
        loop = asyncio.get_running_loop()
        while self._connection is None:
            if self._is_broken or not (self._reconnect_delay and self._is_patient):
                raise BlockError(errno.EIO, str(self._why_not.strerror))
            if self._patience is None:
                start = loop.time() if self._silent_since is None else self._silent_since
                self._patience = loop.call_at(start + self._reconnect_delay, self.lose_patience)
            changed: asyncio.Future[None] = loop.create_future()
            self._changed.add(changed)
            try:
                await changed
            finally:
                self._changed.discard(changed)
        return self._connection

    def lose_patience(self) -> None:
        """Requests do not wait any longer for a server that has gone."""
        if self._connection is None:
            self._is_patient = False
            self._wake()

    async def close(self) -> None:
        """Leave the server; requests that wait fail."""
        task, self._task = self._task, None
        if task is not None:
            await _stop(task)
        self._is_broken = True
        self._why_not = BlockError(errno.EIO, f"{self._owner}: closed")
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        self._wake()

    def _wake(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        for changed in self._changed:
            if not changed.done():
                changed.set_result(None)

    # ------------------------------------------------------------------ losses

    def _has_lost(self, error: BlockError) -> None:
        self._connection = None
        self._why_not = error
        if error.errno == errno.EPROTO:
            log.error("%s: %s; it is not used any more", self._owner, error.strerror)
            self._is_broken = True
            self._wake()
            return
        loop = asyncio.get_running_loop()
        if error.errno == errno.ETIMEDOUT:
            log.warning("%s: %s", self._owner, error.strerror)
            if self._silent_since is None:
                self._silent_since = loop.time()
        else:
            log.info("%s: %s", self._owner, error.strerror)
        self._is_patient = True
        self._task = loop.create_task(self._reconnect())

    async def _reconnect(self) -> None:
        pause = _FIRST_PAUSE
        said = ""
        while True:
            try:
                connection = await self._connect()
            except ConfigError as error:
                said = self._say(said, str(error))
            else:
                difference = _difference(self.export, connection.export)
                if not difference:
                    break
                connection.close()
                said = self._say(said, f"the NBD server that came back has {difference}")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        self._task = None
        self._connection = connection
        log.info("%s: the NBD server is back", self._owner)
        self._wake()

    def _say(self, before: str, now: str) -> str:
        if now != before:
            log.info("%s: %s", self._owner, now)
        return now


def _difference(old: Export, new: Export) -> str:
    """What keeps a server from taking over from another one; nothing if it can."""
    if new.size != old.size:
        return f"{new.size} bytes, not {old.size}"
    if new.flags & ExportFlag.READ_ONLY and not old.flags & ExportFlag.READ_ONLY:
        return "become read-only"
    able = old.flags & ~ExportFlag.READ_ONLY
    if missing := able & ~new.flags:
        return f"no flags {missing:#x} any more"
    if new.min_block > (old.min_block or 1):
        return f"blocks of {new.min_block} bytes"
    if new.max_block and new.max_block < (old.max_block or 1 << 32):
        return f"requests of at most {new.max_block} bytes"
    if old.context is not None and new.context is None:
        return "no block status any more"
    return ""


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # nobody else asks
