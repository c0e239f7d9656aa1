"""The way in: listening Unix sockets, on a path of our own or opened by somebody else.

vhost-user, "Backend program conventions" (`--socket-path`, `--fd`).

A socket file outlives the process that made it. So a path is bound only where nothing answers: a
file that refuses connections is stale, and replaced; anything else at that path stays.

Connections have a module of their own, `connection`; users get them here. Whose the socket file is, and who has
connected, is `access`. With these two, this is the only code of the package that touches sockets.

Knows nothing about messages, nor about who may connect when: `Listener.accept` hands out one
connection at a time, and a caller that is busy closes it, or does not ask.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from vhostblk.errors import ConfigError, StateError
from vhostblk.vhost.access import SocketAccess
from vhostblk.vhost.connection import BackendChannel, BlockingConnection, Connection, wake

__all__ = ["BackendChannel", "BlockingConnection", "Connection", "Listener"]

_STANDARD_STREAMS = range(3)
_BACKLOG = 16
_AS_IT_COMES = SocketAccess()


class Listener:
    """A listening Unix stream socket.

    Make one with `bind` or `adopt`.

    Context: the control loop, one `accept` at a time.
    Owns: the socket, and the path if it was bound here.
    """

    def __init__(self, sock: socket.socket, path: str | None = None) -> None:
        sock.setblocking(False)
        self._socket = sock
        self.path = path
        """Where it was bound, or None for an inherited socket."""
        # A daemon that goes to the background changes its directory.
        self._absolute = os.path.abspath(path) if path is not None else None
        self._identity = _identity(path) if path is not None else None
        self._waiter: asyncio.Future[None] | None = None

    @classmethod
    def bind(cls, path: str, access: SocketAccess = _AS_IT_COMES) -> Listener:
        """Listen on a path; a socket file that nobody listens on is replaced.

        Args:
            access: mode and owner of the socket file, which it has before anybody can connect.

        Raises:
            ConfigError: somebody listens there, it is another kind of file, it cannot be bound, or not be given to
                that owner.
        """
        if not path or "\0" in path:
            raise ConfigError(f"socket path {path!r}: not a path")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with _directory_lock(os.path.dirname(path) or "."):
                _remove_stale(path)
                access.prepare(sock)
                sock.bind(path)
                try:
                    access.grant(path)
                    sock.listen(_BACKLOG)
                    return cls(sock, path)
                except (OSError, ConfigError):
                    os.unlink(path)
                    raise
        except OSError as error:
            sock.close()
            reason = error.strerror or str(error)
            raise ConfigError(f"socket path {path}: {reason}") from error
        except ConfigError:
            sock.close()
            raise

    @classmethod
    def adopt(cls, fd: int) -> Listener:
        """Take over an inherited listening socket.

        Args:
            fd: becomes this object's if this succeeds. A standard stream, as of inetd's, is /dev/null then, which
                a daemon that goes to the background makes of it.

        Raises:
            ConfigError: it is not a listening Unix stream socket.
        """
        try:
            sock = socket.socket(fileno=fd)
        except (OSError, ValueError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"fd {fd} is not a socket: {reason}") from error
        problem = None
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            problem = "not a Unix stream socket"
        elif not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            problem = "not listening"
        if problem:
            sock.detach()
            raise ConfigError(f"fd {fd} is {problem}")
        if fd in _STANDARD_STREAMS:
            sock = _moved(sock)
        sock.set_inheritable(False)
        return cls(sock)

    def fileno(self) -> int:
        """The socket, to look at; -1 once closed."""
        return self._socket.fileno()

    async def accept(self) -> Connection:
        """Wait for a client and give its connection.

        Raises:
            StateError: `close` was called.
            OSError: no more file descriptors, or memory; the client still waits.
        """
        while self._socket.fileno() >= 0:
            try:
                sock, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                await self._wait()
                continue
            return Connection(sock)
        raise StateError("the listener is closed")

    def close(self) -> None:
        """Stop listening, and remove the path if it is still this socket's. Idempotent."""
        if self._waiter is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            wake(self._waiter)
        self._socket.close()
        if self._absolute is not None and self._identity is not None:
            # Another daemon may have replaced the file: that one is not ours to remove.
            with suppress(OSError):
                if _identity(self._absolute) == self._identity:
                    os.unlink(self._absolute)
            self._identity = None

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = waiter = loop.create_future()
        loop.add_reader(self._socket, wake, waiter)
        try:
            await waiter
        finally:
            self._waiter = None
            if self._socket.fileno() >= 0:
                loop.remove_reader(self._socket)


def _moved(sock: socket.socket) -> socket.socket:
    """The same socket with a number that is no standard stream's."""
    copy = fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, len(_STANDARD_STREAMS))
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, sock.detach())
    os.close(null)
    return socket.socket(fileno=copy)


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


@contextmanager
def _directory_lock(directory: str) -> Iterator[None]:
    """Keep two daemons from finding the same stale socket at once, as far as flock works here."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        yield  # it may be searched but not read, which is enough to bind
        return
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"socket path {path}: exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # its backlog is full, so somebody listens
    raise ConfigError(f"socket path {path}: somebody listens there")
