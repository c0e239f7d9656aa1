"""Connections that mean no good: half messages, garbage, wrong descriptors, broken rings, memory that goes away.

Those that get far do so on a disk of their own, because what they write there nobody can know. Disks in use get
strangers that crowd in and talk nonsense.

Context: one thread.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable, Sequence

from tests.soak.daemons import Disk
from vhostblk.client.client import FEATURES, Client
from vhostblk.client.shared_memory import SharedMemory
from vhostblk.errors import PeerError, StateError
from vhostblk.vhost.message import Request
from vhostblk.virtio.blk import RequestType
from vhostblk.virtio.features import Feature

__all__ = ["Intruder"]

_SECONDS = 20.0
_LAST_REQUEST = 45
_FDS = 4
_MEMORY = 1 << 20
# What the stranger may meet: refused, hung up on, or not listened to any more.
_REBUFFS = (PeerError, StateError, TimeoutError, OSError)


class Intruder:
    """Does one nasty thing at a time.

    Args:
        prey: a disk that nobody else uses.
        crowded: disks that guests use.
        seed: of the choices.
    """

    def __init__(self, prey: Disk, crowded: Sequence[Disk], seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self._prey = prey
        self._crowded = crowded
        self._choice = random.Random(seed)
        self._kinds: dict[str, Callable[[], None]] = {
            "garbage": self._garbage,
            "strangers at disks in use": self._crowd_in,
            "senseless messages": self._talk_nonsense,
            "broken rings": self._break_rings,
            "memory taken away": self._truncate,
            "left at once": self._leave,
        }

    def act(self) -> None:
        """Do one of them."""
        name = self._choice.choice(list(self._kinds))
        with contextlib.suppress(*_REBUFFS):
            self._kinds[name]()
        self.counts[f"hostile: {name}"] += 1

    def _dial(self, disk: Disk) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(_SECONDS)
            sock.connect(os.fspath(disk.socket))
        except BaseException:
            sock.close()
            raise
        return sock

    def _bytes(self) -> bytes:
        """A message that is cut, too long, of an unknown kind, or none at all."""
        choose = self._choice
        size = choose.choice([0, 4, 8, 20, 40, 4096, 4097, 1 << 31])
        payload = choose.randbytes(min(size, 4096))
        message = struct.pack("=III", choose.randrange(_LAST_REQUEST), choose.randrange(16), size)
        message += payload
        return choose.choice([message, message[: choose.randrange(len(message))], payload])

    def _garbage(self) -> None:
        with self._dial(self._prey) as sock:
            sock.sendall(self._bytes())
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass

    def _crowd_in(self) -> None:
        with self._dial(self._choice.choice(self._crowded)) as sock:
            sock.sendall(self._bytes())

    def _connect(self) -> Client:
        packed = self._choice.random() < 0.5
        return Client.connect(
            self._prey.socket,
            queues=2,
            queue_size=64,
            features=FEATURES | (Feature.VIRTIO_F_RING_PACKED if packed else 0),
            memory=SharedMemory([_MEMORY] * 2),
            timeout=_SECONDS,
            strict=False,
        )

    def _talk_nonsense(self) -> None:
        """Requests that there are, with payloads and descriptors that make no sense."""
        choose = self._choice
        with self._connect() as client:
            for _ in range(choose.randrange(1, 12)):
                request = choose.randrange(1, _LAST_REQUEST)
                data = choose.randbytes(choose.choice([0, 8, 8, 16, 20, 40]))
                fds = [self._some_fd() for _ in range(choose.choice([0, 0, 1, 1, _FDS]))]
                try:
                    client.control.send_raw(request, data, tuple(fds), flags=9)
                finally:
                    for fd in fds:
                        os.close(fd)
                if request != Request.SET_BACKEND_REQ_FD:
                    for fd in client.control.receive().fds:
                        os.close(fd)
            client.abandon()

    def _some_fd(self) -> int:
        match self._choice.randrange(3):
            case 0:
                return os.eventfd(0)
            case 1:
                return os.memfd_create("hostile")
            case _:
                return socket.socket(socket.AF_UNIX).detach()

    def _break_rings(self) -> None:
        """Descriptors, indices and event suppression of random bytes."""
        with self._connect() as client:
            queue = self._choice.choice(client.queues)
            (view,) = client.memory.views(queue._area)
            for _ in range(self._choice.randrange(1, 200)):
                position = self._choice.randrange(len(view) - 8)
                view[position : position + 8] = self._choice.randbytes(8)
            view.release()
            queue.kick()
            client.control.is_alive()
            client.abandon()

    def _truncate(self) -> None:
        """Nobody here may touch that memory any more."""
        with self._connect() as client:
            for _ in range(8):
                client.submit(RequestType.IN, 0, room=32 << 10, notify=False)
            client.queues[0].notify()
            client.memory.regions[self._choice.randrange(2)].truncate(0)
            client.queues[0].kick()
            client.control.is_alive()
            client.abandon()

    def _leave(self) -> None:
        with self._connect() as client:
            for _ in range(8):
                client.submit(RequestType.OUT, 0, out=bytes(16 << 10), queue=1)
            client.abandon()
