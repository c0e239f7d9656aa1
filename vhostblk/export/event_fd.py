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
    """Read a kick away; says whether there was one. Call when the fd is readable.

    Raises:
        OSError: it is ready and will stay so whatever is read: nobody can wait for such an fd.
    """
    try:
        # RWF_NOWAIT instead of O_NONBLOCK: another reader may have been faster.
        count = os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            raise
        if not _ready(fd, select.POLLIN):
            return False
        count = len(os.read(fd, 8))
    if not count:
        raise OSError(errno.EPIPE, "the other end of the kick fd is closed")
    return True


def signal(fd: int) -> None:
    """Signal a call or error fd. One that cannot take more is signalled already; what cannot be written to is the
    front-end's loss."""
    # A front-end that saturates its own blocking fd between these two lines stops this loop until it reads it.
    if _ready(fd, select.POLLOUT):
        try:
            os.write(fd, _ONE)
        except OSError:
            pass


def _ready(fd: int, event: int) -> bool:
    poll = select.poll()
    poll.register(fd, event)
    return any(events & event for _, events in poll.poll(0))
