"""Reading and signalling eventfds that belong to somebody else, without ever waiting for them.

The front-end made them, so they may be blocking, saturated, or no eventfds at all; and O_NONBLOCK must not be set on
them, because the front-end shares the flag.
"""

from __future__ import annotations

import errno
import os
import select

_ONE = (1).to_bytes(8, "little")


def clear(fd: int) -> bool:
    """Read a kick away; says whether there was one. Call when the fd is readable."""
    try:
        # RWF_NOWAIT instead of O_NONBLOCK: another reader may have been faster.
        return os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            raise
    return bool(_ready(fd, select.POLLIN) and os.read(fd, 8))


def signal(fd: int) -> None:
    """Signal a call or error fd. One that cannot take more is signalled already."""
    # A front-end that saturates its own blocking fd between these two lines stops this loop until it reads it.
    if _ready(fd, select.POLLOUT):
        try:
            os.write(fd, _ONE)
        except (BlockingIOError, BrokenPipeError):
            pass


def _ready(fd: int, event: int) -> bool:
    poll = select.poll()
    poll.register(fd, event)
    return any(events & event for _, events in poll.poll(0))
