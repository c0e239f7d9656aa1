"""What the kernel tells of the host's block devices: which of them changed, came or went.

netlink(7), NETLINK_KOBJECT_UEVENT. Anybody may listen, without privileges. Each message is a hint, and nothing else: it
says which device to look at, and what is true is asked of the device. So messages that make no sense, or come for no
reason, cost a look; when some were lost (ENOBUFS: more came than the socket holds) each device is looked at. Only what
the kernel itself has sent is heard: group 1, port 0. (udev repeats everything in group 2, when it is done with it.)

The kernel sends to network namespaces that belong to the initial user namespace, as those of most containers do. Those
of other user namespaces hear nothing (Linux 4.18).

pyroute2 knows what messages look like. The socket is our own: pyroute2's do not say who has sent a message, differ from
version to version in the loops and threads that they make, and one of 0.9 is of no use after ENOBUFS.

Knows nothing about nodes.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

log = logging.getLogger(__name__)

_KERNEL_GROUP = 1
_KERNEL_PORT = 0
# The kernel's own limit is 2 KiB of variables, and a path.
_LONGEST = 16384
# Messages that are read before the loop does something else.
_AT_ONCE = 64

Changed = Callable[[int | None], None]


class Uevents:
    """Hears of block devices.

    Args:
        changed: called with the number (dev_t) of a device; None: it may have been any. From the loop.

    Raises:
        ImportError: pyroute2 is not installed.
        OSError: the kernel does not let us listen.

    Context: the control loop, which runs.
    Owns: the socket, until `close`.
    """

    def __init__(self, changed: Changed) -> None:
        # Here, because it takes longer to import than a daemon to start, and most have no block device.
        from pyroute2.netlink import NETLINK_KOBJECT_UEVENT
        from pyroute2.netlink.uevent import MarshalUevent

        self._changed = changed
        self._parse: Callable[[bytes], Iterable[Any]] = MarshalUevent().parse
        self._loop = asyncio.get_running_loop()
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, kind, NETLINK_KOBJECT_UEVENT)
        try:
            self._socket.bind((0, _KERNEL_GROUP))  # 0: any port
            self._loop.add_reader(self._socket, self._read)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Hear no more. Idempotent."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()

    def _read(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                message, sender = self._socket.recvfrom(_LONGEST)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._changed(None)
                if error.errno == errno.ENOBUFS:
                    continue
                log.error("uevents are not heard any more: %s", error.strerror)
                self.close()
                return
            if sender[0] == _KERNEL_PORT:
                self._hear(message)

    def _hear(self, message: bytes) -> None:
        # Network interfaces, memory, processors: their events are not worth being parsed.
        if b"\0SUBSYSTEM=block\0" not in message:
            return
        try:
            for event in self._parse(message):
                self._changed(os.makedev(int(event["MAJOR"]), int(event["MINOR"])))
        except (KeyError, ValueError, OverflowError):
            self._changed(None)
