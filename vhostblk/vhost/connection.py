"""vhost-user over connected Unix stream sockets.

vhost-user, "Communication". A message is read in two steps, header and payload, never more: so the
fds that a recvmsg returns belong to the message it began with. What a front-end sends and we have
not read waits in the kernel; what it does not read makes `send` wait: nothing is buffered here.

Silence between messages is legal, however long: a guest that is paused says nothing. Half a message is not, nor is a
front-end that asks and does not read: `message_timeout` bounds both.

File descriptors arrive close-on-exec. The kernel passes at most 253 at once and there is room for
all, so MSG_CTRUNC can only mean that this process may not have more of them: the session ends.

Knows nothing about what messages mean.
"""

from __future__ import annotations

import array
import asyncio
import os
import select
import socket
import struct
import time
from collections.abc import Mapping

from vhostblk.errors import SessionError
from vhostblk.vhost.access import Peer, peer_of
from vhostblk.vhost.message import FRONTEND_TABLE, Decoder, Message, Row

__all__ = ["BackendChannel", "BlockingConnection", "Connection"]

_MAX_FDS = 253  # Linux: SCM_MAX_FD
_ANCILLARY = socket.CMSG_SPACE(_MAX_FDS * 4)


def _receive(sock: socket.socket, wanted: int) -> tuple[bytes, list[int]]:
    """One recvmsg. Raises: SessionError: fds were lost, those that came are closed."""
    data, ancillary, flags, _ = sock.recvmsg(wanted, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if flags & socket.MSG_CTRUNC:
        _close_all(fds)
        raise SessionError(f"file descriptors were lost, {len(fds)} came: the limit is reached?")
    return data, list(fds)


def _rights(fds: tuple[int, ...]) -> list[tuple[int, int, bytes]]:
    content = array.array("i", fds).tobytes()
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, content)] if fds else []


def _close_all(fds: array.array[int] | list[int] | tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)


class _Stream:
    """What both kinds of connections have in common: a socket, a decoder, and an end."""

    def __init__(self, sock: socket.socket, table: Mapping[int, Row]) -> None:
        self._socket = sock
        self._decoder = Decoder(table)
        self.is_closed = False

    def fileno(self) -> int:
        """The socket, to look at; -1 once closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket and the fds of an unfinished message. Idempotent."""
        self.is_closed = True
        _close_all(self._decoder.close())
        self._socket.close()

    def _take(self) -> tuple[bool, Message | None]:
        """One step of reading: whether the stream goes on, and a message if one is complete."""
        try:
            data, fds = _receive(self._socket, self._decoder.wanted)
        except (BlockingIOError, TimeoutError):
            raise
        except ConnectionResetError:
            return False, None
        except OSError as error:
            raise SessionError(f"cannot receive: {error}") from error
        if not data:
            _close_all(fds)
            if not self._decoder.is_between_messages:
                raise SessionError("the connection ended inside a message")
            return False, None
        messages = self._decoder.feed(data, fds)
        return True, messages[0] if messages else None


class Connection(_Stream):
    """A connection served by the event loop.

    Args:
        sock: connected; becomes this object's and non-blocking.
        table: rows of the messages that are received.

    Attributes:
        message_timeout: seconds that a message may take once its first byte has come, and that may pass until the peer
            has read one; 0: for ever.

    Context: one task reads, one task writes; `close` from anywhere on the loop.
    Owns: the socket, and the fds of a message until it is handed out.
    """

    def __init__(self, sock: socket.socket, table: Mapping[int, Row] = FRONTEND_TABLE) -> None:
        super().__init__(sock, table)
        sock.setblocking(False)
        self.message_timeout = 0.0
        self._unread: Message | None = None
        self._finished = False
        self._waiters: set[asyncio.Future[bool]] = set()

    async def first_message(self, timeout: float) -> bool:
        """Wait until a message is whole, which `receive` gives then; whether there is one.

        Args:
            timeout: seconds from now; 0: for ever.

        Raises:
            SessionError: the stream is broken, or the time is over.
        """
        self._unread = await self._next(self._deadline(timeout), timeout)
        return self._unread is not None

    async def receive(self) -> Message | None:
        """Give the next message; its fds are the caller's.

        The loop turns once for each, so that a peer that talks without a pause holds nobody else up.

        Returns:
            None at the end of the stream, or once `finish` or `close` was called.

        Raises:
            SessionError: the stream is broken, or a message takes too long; see `Decoder` and the module.
        """
        await asyncio.sleep(0)
        message, self._unread = self._unread, None
        if message is not None and not self._finished:
            return message
        if message is not None:
            _close_all(message.fds)
        return await self._next(None, self.message_timeout)

    async def _next(self, until: float | None, timeout: float) -> Message | None:
        """The next message; `until`: when it has to be there (the loop's time), None: `timeout` from its first byte."""
        while not self.is_closed and not self._finished:
            try:
                goes_on, message = self._take()
            except BlockingIOError:
                if until is None and not self._decoder.is_between_messages:
                    until = self._deadline(timeout)
                if await self._wait(write=False, until=until):
                    continue
                if self._decoder.is_between_messages:
                    raise SessionError(f"nothing was said in {timeout:g} s") from None
                raise SessionError(f"a message is not whole after {timeout:g} s") from None
            if message is not None:
                return message
            if not goes_on:
                break
        return None

    def peer(self) -> Peer:
        """Who has connected. Raises: OSError: it is not connected."""
        return peer_of(self._socket)

    @staticmethod
    def _deadline(timeout: float) -> float | None:
        return asyncio.get_running_loop().time() + timeout if timeout else None

    def has_hung_up(self) -> bool:
        """Whether the peer has closed its end; what it sent before may still be unread."""
        if self.is_closed:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    async def send(self, message: Message) -> None:
        """Send a message; its fds stay the caller's. Waits while the peer does not read.

        Raises:
            SessionError: the peer is gone, does not read for too long, or `close` was called; or `finish` was, and the
                peer does not read now.
        """
        data = memoryview(message.encode())
        fds = message.fds
        until: float | None = None
        while data:
            if self.is_closed:
                raise SessionError("the connection is closed")
            try:
                sent = self._socket.sendmsg([data], _rights(fds), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                if self._finished:
                    raise SessionError(f"cannot send {message.name()}: nobody reads it") from None
                until = until or self._deadline(self.message_timeout)
                if await self._wait(write=True, until=until):
                    continue
                raise SessionError(
                    f"cannot send {message.name()}: nobody has read for {self.message_timeout:g} s"
                ) from None
            except OSError as error:
                raise SessionError(f"cannot send {message.name()}: {error}") from error
            data, fds = data[sent:], ()

    def finish(self) -> None:
        """Hand out no more messages and wait for nothing any more; the peer does not notice until `close`."""
        self._finished = True
        for waiter in self._waiters:
            _settle(waiter, True)

    def close(self) -> None:
        """Close the socket; a `receive` or `send` that waits ends. Idempotent."""
        if self.is_closed:
            return
        self.finish()
        if self._unread is not None:
            _close_all(self._unread.fds)
            self._unread = None
        if self._waiters:
            # Before the descriptor is closed, and its number perhaps used again.
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._socket)
            loop.remove_writer(self._socket)
        super().close()

    async def _wait(self, *, write: bool, until: float | None) -> bool:
        """Wait for the socket; False: it is not ready, and the time is over."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[bool] = loop.create_future()
        self._waiters.add(waiter)
        # The loop looks at sockets before it looks at the clock: after a stop of this process, what has come counts.
        timer = loop.call_at(until, _settle, waiter, False) if until is not None else None
        if write:
            loop.add_writer(self._socket, _settle, waiter, True)
        else:
            loop.add_reader(self._socket, _settle, waiter, True)
        try:
            return await waiter
        finally:
            if timer is not None:
                timer.cancel()
            self._waiters.discard(waiter)
            if not self.is_closed:
                if write:
                    loop.remove_writer(self._socket)
                else:
                    loop.remove_reader(self._socket)


def wake(waiter: asyncio.Future[None]) -> None:
    """End a wait, once. Context: the event loop."""
    if not waiter.done():
        waiter.set_result(None)


def _settle(waiter: asyncio.Future[bool], ready: bool) -> None:
    if not waiter.done():
        waiter.set_result(ready)


class BlockingConnection(_Stream):
    """A connection for programs without an event loop, every wait with a deadline.

    Args:
        sock: connected; becomes this object's.
        table: rows of the messages that are received.
        timeout: seconds for each `receive` and `send`.

    Context: one thread. Owns: as `Connection`.
    """

    def __init__(
        self,
        sock: socket.socket,
        table: Mapping[int, Row] = FRONTEND_TABLE,
        *,
        timeout: float = 10.0,
    ) -> None:
        super().__init__(sock, table)
        self.timeout = timeout

    @classmethod
    def connect(cls, path: str, *, timeout: float = 10.0) -> BlockingConnection:
        """Connect to a listening socket.

        Raises:
            OSError: nobody listens there.
            TimeoutError: its backlog stays full.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # Python's own timeout makes the socket non-blocking, and then a full backlog is an error at once.
            microseconds = int(timeout * 1_000_000)
            limit = struct.pack("@ll", *divmod(microseconds, 1_000_000))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            sock.connect(path)
        except BlockingIOError:
            sock.close()
            raise TimeoutError(f"{path}: nobody accepts connections") from None
        except BaseException:
            sock.close()
            raise
        return cls(sock, timeout=timeout)

    def receive(self) -> Message | None:
        """Give the next message, its fds being the caller's, or None at the end of the stream.

        Raises:
            SessionError: the stream is broken.
            TimeoutError: nothing came in time; what came of a message is kept.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            self._set_deadline(deadline)
            goes_on, message = self._take()
            if message is not None or not goes_on:
                return message

    def send(self, message: Message) -> None:
        """Send a message; its fds stay the caller's.

        Raises:
            SessionError: the peer is gone.
            TimeoutError: it does not read.
        """
        self.send_bytes(message.encode(), message.fds)

    def send_bytes(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Send bytes that need not be a message, with fds beside the first one; as `send`."""
        deadline = time.monotonic() + self.timeout
        rest = memoryview(data)
        while rest:
            self._set_deadline(deadline)
            try:
                sent = self._socket.sendmsg([rest], _rights(fds), socket.MSG_NOSIGNAL)
            except TimeoutError:
                raise
            except OSError as error:
                raise SessionError(f"cannot send: {error}") from error
            rest, fds = rest[sent:], ()

    def _set_deadline(self, deadline: float) -> None:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(remaining)


class BackendChannel:
    """The socket on which a back-end sends messages of its own.

    Its open file description is shared with the front-end, so it is never made non-blocking; and
    as it is no concern of the daemon whether a front-end reads it, nothing here ever waits.

    Args:
        fd: becomes this object's, also if the constructor fails.

    Raises:
        SessionError: it is not a Unix stream socket.

    Owns: the socket.
    """

    def __init__(self, fd: int) -> None:
        try:
            self._socket = socket.socket(fileno=fd)
        except OSError as error:
            os.close(fd)
            raise SessionError(f"the back-end channel is not a socket: {error}") from error
        if (self._socket.family, self._socket.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            self._socket.close()
            raise SessionError("the back-end channel is not a Unix stream socket")

    def send(self, message: Message) -> bool:
        """Send at once or not at all.

        Returns:
            False if the front-end is gone or does not read.
        """
        data = message.encode()
        try:
            sent = self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return False
        if sent != len(data):
            self.close()  # what follows would be read as the rest of this message
        return sent == len(data)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()
