"""The state of a device on its way to the next back-end, or from the one before: bytes through an fd.

vhost-user, "Migrating back-end state". The state is small and has a size that is known, so it is written where there is
room for all of it, and nothing here ever waits for whoever reads. Reading goes on in the background until the end of
the file, and is bounded: an fd that never ends costs itself.

Knows nothing about what the bytes mean.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
from contextlib import suppress

from vhostblk.errors import PeerError

__all__ = ["StateTransfer"]

_SECONDS = 10.0
"""How long the end of what is read may be away when the front-end asks whether all is well."""


class StateTransfer:
    """One state at a time; the next one takes the place of the one before.

    Args:
        most: bytes of the largest state.

    Context: the control loop. Owns: the fd that is read, until its end.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._reading: asyncio.Task[bytes] | None = None
        self._problem = "there was none"

    @property
    def is_incomplete(self) -> bool:
        """Whether a state has begun to be read that nobody has asked for yet."""
        return self._reading is not None

    def save(self, fd: int, state: bytes) -> None:
        """Write a state.

        Args:
            fd: borrowed; the end is seen when all of its copies are closed.

        Raises:
            PeerError: there is no room for it, or the fd cannot be written to.
        """
        self.close()
        self._problem = "it was not written"
        try:
            written = _write_at_once(fd, state)
        except BlockingIOError:
            raise PeerError(
                "device state: there is no room for it in what the front-end gave"
            ) from None
        except OSError as error:
            raise PeerError(f"device state: cannot write it: {error.strerror}") from None
        if written != len(state):
            raise PeerError(f"device state: {written} of {len(state)} bytes were taken")
        self._problem = ""

    def load(self, fd: int) -> None:
        """Begin to read a state.

        Args:
            fd: becomes this object's.
        """
        self.close()
        self._problem = "it was not read"
        self._reading = asyncio.create_task(self._read(fd))

    async def check(self) -> bytes | None:
        """Wait for the end of the transfer, and give what was read, once; None after a save.

        Raises:
            PeerError: it failed, or its end does not come.
        """
        reading, self._reading = self._reading, None
        if reading is None:
            problem, self._problem = self._problem, "there was none"
            if problem:
                raise PeerError(f"device state: {problem}")
            return None
        try:
            return await asyncio.wait_for(reading, _SECONDS)
        except TimeoutError:
            raise PeerError("device state: its end does not come") from None

    def close(self) -> None:
        """Forget what is being read. Idempotent."""
        if self._reading is not None:
            self._reading.cancel()
            # Nobody else will ask.
            self._reading.add_done_callback(lambda task: task.cancelled() or task.exception())
            self._reading = None

    async def _read(self, fd: int) -> bytes:
        data = b""
        try:
            while len(data) <= self._most:
                await _readable(fd)
                try:
                    piece = _read_at_once(fd, self._most + 1 - len(data))
                except BlockingIOError:
                    continue  # somebody else has a copy of the fd, and was faster
                except OSError as error:
                    raise PeerError(f"device state: cannot read it: {error.strerror}") from None
                if not piece:
                    return data
                data += piece
            raise PeerError(f"device state: more than {self._most} bytes")
        finally:
            os.close(fd)


def _write_at_once(fd: int, data: bytes) -> int:
    """Give how much was taken. Raises: BlockingIOError: it would have to wait; OSError."""
    if _is_file(fd):
        return os.write(fd, data)
    try:
        return os.pwritev(fd, [data], -1, os.RWF_NOWAIT)
    except OSError as error:
        _never_wait(fd, error)
    return os.write(fd, data)


def _read_at_once(fd: int, most: int) -> bytes:
    """Give what is there, nothing at the end. Raises: BlockingIOError: it would have to wait; OSError."""
    if _is_file(fd):
        return os.read(fd, most)
    piece = bytearray(most)
    try:
        return bytes(piece[: os.preadv(fd, [piece], -1, os.RWF_NOWAIT)])
    except OSError as error:
        _never_wait(fd, error)
    return os.read(fd, most)


def _is_file(fd: int) -> bool:
    """Where RWF_NOWAIT says more often than others that it would have to wait."""
    return stat.S_ISREG(os.fstat(fd).st_mode)


def _never_wait(fd: int, error: OSError) -> None:
    """Before Linux 6.4 pipes and sockets know no RWF_NOWAIT, nor do eventfds and others today. Then the front-end's
    copies have the same O_NONBLOCK, so this is as good as can be. Raises: OSError: that is not the reason."""
    if error.errno != errno.EOPNOTSUPP:
        raise error
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_NONBLOCK)


async def _readable(fd: int) -> None:
    """Wait until a read does not wait."""
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()

    def wake() -> None:
        if not waiter.done():
            waiter.set_result(None)

    try:
        loop.add_reader(fd, wake)
    except PermissionError:
        return  # a file: always readable
    except OSError as error:
        raise PeerError(f"device state: cannot wait for it: {error.strerror}") from None
    try:
        await waiter
    finally:
        with suppress(OSError):
            loop.remove_reader(fd)
