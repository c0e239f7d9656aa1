"""Where checks run: one back-end's socket, what it offers, and what may be done to its disk.

Theory of operation. Every check makes its own connections through `guest` or `dial`. A back-end may
still be seeing off the last front-end, and refuse the next one meanwhile (it serves one at a time):
so a connection that is refused or hung up on is tried again for a while.
"""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vhostblk.client.client import FEATURES, Client
from vhostblk.client.conformance.guest import Guest
from vhostblk.client.conformance.offer import Offer
from vhostblk.client.control import Control
from vhostblk.client.shared_memory import SharedMemory
from vhostblk.errors import SessionError
from vhostblk.virtio.blk import SECTOR

__all__ = ["SPAN", "Rig"]

SPAN = 16 << 20
"""Bytes at the disk's start that destructive checks overwrite; besides, they do its last sectors."""

_RETRY_SECONDS = 3.0
_RETRY_DELAY = 0.02


@dataclass(slots=True)
class Rig:
    """What a check is given.

    Context: one thread. Owns: nothing; connections belong to who makes them.
    """

    path: str
    """Of the back-end's socket."""
    offer: Offer
    timeout: float = 5.0
    """Seconds for every wait."""
    destructive: bool = False
    hostile: bool = False
    chance: random.Random = field(default_factory=lambda: random.Random(1))

    @property
    def capacity(self) -> int:
        """Bytes of the disk."""
        return self.offer.capacity

    @property
    def block(self) -> int:
        """Bytes of the smallest request that has to be served."""
        return self.offer.block

    @property
    def span(self) -> int:
        """Bytes at the disk's start that may be overwritten, and that are read."""
        return min(self.capacity, SPAN) // self.block * self.block

    def guest(
        self,
        *,
        without: int = 0,
        memory: Callable[[], SharedMemory] | None = None,
        **options: Any,
    ) -> Guest:
        """Connect, negotiate everything that is offered, start the queues.

        Args:
            without: virtio features not to use.
            memory: makes the guest's memory.
            options: as `Client.connect`, which also says what is raised; not strict.
        """
        options.setdefault("features", FEATURES)
        options["features"] &= ~without
        options.setdefault("strict", False)
        deadline = time.monotonic() + min(_RETRY_SECONDS, self.timeout)
        while True:
            shared = memory() if memory else None
            try:
                client = Client.connect(self.path, timeout=self.timeout, memory=shared, **options)
            except (ConnectionRefusedError, SessionError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_DELAY)
            else:
                return Guest(client)

    def control(self) -> Control:
        """Connect and say nothing but GET_FEATURES, which is answered."""
        deadline = time.monotonic() + min(_RETRY_SECONDS, self.timeout)
        while True:
            control = Control(self.path, timeout=self.timeout, strict=False)
            try:
                control.ask(control.frontend.get_features())
            except SessionError:
                control.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_DELAY)
            else:
                return control

    def dial(self) -> socket.socket:
        """Connect and say nothing at all."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # The kernel's own time limit: one of Python's makes a full backlog an error at once.
            seconds = int(self.timeout)
            limit = struct.pack("@ll", seconds, int((self.timeout - seconds) * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            sock.connect(self.path)
            sock.settimeout(self.timeout)
        except BlockingIOError:
            sock.close()
            raise TimeoutError("nobody accepts connections") from None
        except BaseException:
            sock.close()
            raise
        return sock

    def still_serves(self) -> None:
        """See whether a new connection is accepted and a read served.

        Raises:
            VhostBlkError, OSError: it is not; TimeoutError too.
        """
        with self.guest() as guest:
            if self.capacity:
                guest.read(0, self.block)
            else:
                guest.client.get_id()

    def pattern(self, length: int) -> bytes:
        """Give data that never comes again."""
        return self.chance.randbytes(length)

    def fill(self) -> None:
        """Give the first MiB, and the last block, contents of their own; for destructive runs."""
        with self.guest() as guest:
            for offset in range(0, min(self.span, 1 << 20), 128 << 10):
                length = min(128 << 10, self.span - offset)
                guest.write(offset, self.pattern(length))
            guest.write(self.capacity - self.block, self.pattern(self.block))

    @property
    def last_sector(self) -> int:
        """Number of the last sector."""
        return self.capacity // SECTOR - 1
