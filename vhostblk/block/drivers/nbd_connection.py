"""One connection to an NBD server: the handshake, then requests and their replies, until one of the two sides leaves.

Theory of operation: `Connection.open` does the handshake, with nothing else on the socket. From then on the loop calls
`_readable`, which fills what `nbd_wire.replies` wants next, and `_writable` while the socket takes no more; there is no
task. Small pieces come by a buffer, large ones go where they belong. Requests wait for their reply only; who makes
them bounds how many there are.

A connection ends once: when the server leaves, lies or is silent for too long, and in `close`. All requests without a
reply are lost then. All requests have the same time, so the first one without a reply is the first one that is due: one
timer is enough, and while requests are answered it costs one look in that time.

Knows nothing about reconnecting.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
from collections import deque
from collections.abc import Callable
from itertools import islice

from vhostblk.block.drivers.nbd_address import Address
from vhostblk.block.drivers.nbd_handshake import handshake
from vhostblk.block.drivers.nbd_wire import Command, Export, Request, replies
from vhostblk.block.host_io import Completion
from vhostblk.errors import BlockError, ConfigError

_BUFFER = 65536
_LARGE = 16384  # pieces from here on are not copied
_PIECES = 64  # in one system call
_TURNS = 16  # system calls before others may run
_HANDSHAKE_SECONDS = 60
_LATE = 0.5  # a look is late that comes by this part of the time-out too late
_ABORT = struct.pack("ii", 1, 0)  # struct linger


class Connection:
    """A connection in the transmission phase.

    Args:
        timeout: how long a request may take, in seconds; 0: for ever.
        lost: called when it has ended by itself, with why: EPROTO if the server has lied, ETIMEDOUT if it was silent.

    Context: the control loop.
    Owns: the socket.
    """

    def __init__(
        self,
        connection: socket.socket,
        export: Export,
        timeout: float,
        lost: Callable[[BlockError], None],
    ) -> None:
        self.export = export
        self._socket = connection
        self._timeout = timeout
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._is_open = True
        self._next_handle = 1
        self._pending: dict[int, Request] = {}
        self._waiting: dict[int, Completion] = {}
        self._out: deque[tuple[int, memoryview]] = deque()  # with handles
        self._is_writing = False  # the loop tells when the socket takes more
        self._timer: asyncio.TimerHandle | None = None
        self._buffer = memoryview(bytearray(_BUFFER))
        self._parser = replies(export, self._pending, self._finish)
        self._want = memoryview(b"")
        self._advance()
        self._loop.add_reader(connection, self._readable)

    @classmethod
    async def open(
        cls,
        address: Address,
        name: str,
        context: str,
        timeout: float,
        lost: Callable[[BlockError], None],
    ) -> Connection:
        """Connect and shake hands; has to run in a task.

        Raises:
            ConfigError: nobody is there, or not such an export; the handshake takes too long.
        """
        connection = await address.connect()
        try:
            async with asyncio.timeout(_HANDSHAKE_SECONDS):
                export = await _shake_hands(connection, name, context)
            return cls(connection, export, timeout, lost)
        except TimeoutError:
            connection.close()
            raise ConfigError(
                f"The NBD server at '{address}' has not finished its handshake in "
                f"{_HANDSHAKE_SECONDS} seconds",
                errno.ETIMEDOUT,
            ) from None
        except BaseException:
            connection.close()
            raise

    async def send(self, request: Request) -> None:
        """Make a request and wait for its reply, which is in `request` afterwards.

        It uses the request's memory until then, so whoever is cancelled meanwhile learns of that afterwards.
        """
        handle = self._next_handle
        self._next_handle += 1
        if not self._is_open:
            request.is_lost = True
            return
        completion = Completion(loop=self._loop)
        self._pending[handle] = request
        self._waiting[handle] = completion
        self._out.append((handle, memoryview(request.header(handle))))
        if request.command == Command.WRITE:
            assert request.iov is not None
            self._out.extend((handle, view) for view in request.iov.views if len(view))
        if self._timeout:
            request.due = self._loop.time() + self._timeout
            if self._timer is None:
                self._timer = self._loop.call_at(request.due, self._look)
        if not self._is_writing:
            self._writable()
        await completion

    def close(self) -> None:
        """Say goodbye, if the server listens, and leave."""
        if self._is_open and not self._out:
            with contextlib.suppress(OSError):
                self._socket.send(Request(Command.DISC).header(0))
        self._end()

    # ------------------------------------------------------------------ the loop's

    def _writable(self) -> None:
        try:
            for _ in range(_TURNS):
                if not self._out:
                    break
                pieces = [piece for _, piece in islice(self._out, _PIECES)]
                self._sent(self._socket.sendmsg(pieces))
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._fail(BlockError(errno.EIO, f"the NBD server does not listen: {error.strerror}"))
            return
        if bool(self._out) != self._is_writing:
            self._is_writing = bool(self._out)
            if self._is_writing:
                self._loop.add_writer(self._socket, self._writable)
            else:
                self._loop.remove_writer(self._socket)

    def _sent(self, count: int) -> None:
        while count:
            handle, piece = self._out.popleft()
            if len(piece) > count:
                self._out.appendleft((handle, piece[count:]))
                return
            count -= len(piece)

    def _readable(self) -> None:
        try:
            for _ in range(_TURNS):
                if not self._is_open:
                    return
                is_large = len(self._want) >= _LARGE
                target = self._want if is_large else self._buffer
                count = self._socket.recv_into(target)
                if not count:
                    raise BlockError(errno.EIO, "the NBD server has closed the connection")
                if is_large:
                    self._filled(count)
                else:
                    self._take(self._buffer[:count])
                if count < len(target):
                    return
        except (BlockingIOError, InterruptedError):
            pass
        except BlockError as error:
            self._fail(error)
        except OSError as error:
            self._fail(BlockError(errno.EIO, f"the NBD server is gone: {error.strerror}"))

    def _look(self) -> None:
        """Give the server up if it has not answered the first request in time."""
        assert self._timer is not None
        planned, self._timer = self._timer.when(), None
        request = next(iter(self._pending.values()), None)
        if request is None:
            return  # the next one starts it again
        now = self._loop.time()
        if request.due > now:
            self._timer = self._loop.call_at(request.due, self._look)
        elif now - planned > self._timeout * _LATE:
            # It was us who did not look (we were stopped, or the machine was): what has come meanwhile counts.
            self._timer = self._loop.call_at(now + self._timeout, self._look)
        else:
            # What the kernel has not sent yet it would send some day, behind what comes after it.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
            silence = f"the NBD server has not answered a request for {self._timeout:g} seconds"
            self._fail(BlockError(errno.ETIMEDOUT, silence))

    def _take(self, data: memoryview) -> None:
        while len(data):
            count = min(len(data), len(self._want))
            self._want[:count] = data[:count]
            data = data[count:]
            self._filled(count)

    def _filled(self, count: int) -> None:
        self._want = self._want[count:]
        if not len(self._want):
            self._advance()

    def _advance(self) -> None:
        while not len(self._want):
            self._want = next(self._parser)

    # ------------------------------------------------------------------ ends

    def _finish(self, handle: int) -> None:
        if any(handle == unsent for unsent, _ in self._out):
            # Its memory would be somebody else's while it is being sent.
            raise BlockError(
                errno.EPROTO, "the NBD server replied to a request before it had all of it"
            )
        # The memory is not held any longer than it may be used: a guest's is unmapped one day.
        self._pending.pop(handle).iov = None
        self._waiting.pop(handle).set_result(None)

    def _fail(self, error: BlockError) -> None:
        if self._is_open:
            self._end()
            self._lost(error)

    def _end(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._out.clear()
        # They hold memory of requests.
        self._want = memoryview(b"")
        self._parser.close()
        for request in self._pending.values():
            request.is_lost = True
            request.iov = None
        self._pending.clear()
        waiting, self._waiting = self._waiting, {}
        for completion in waiting.values():
            completion.set_result(None)


async def _shake_hands(connection: socket.socket, name: str, context: str) -> Export:
    loop = asyncio.get_running_loop()
    steps = handshake(name, context)
    try:
        step = next(steps)
        while True:
            if isinstance(step, bytes):
                await loop.sock_sendall(connection, step)
                step = next(steps)
                continue
            while len(step):
                count = await loop.sock_recv_into(connection, step)
                if not count:
                    break
                step = step[count:]
            step = steps.throw(EOFError()) if len(step) else next(steps)
    except StopIteration as end:
        export: Export = end.value
        return export
    except OSError as error:
        raise ConfigError(
            f"The NBD server has left during the handshake: {error.strerror}", errno.EIO
        ) from None
