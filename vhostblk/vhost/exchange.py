"""One request of the front-end, from its arrival to its reply.

vhost-user, "REPLY_ACK", "Communication". A request has a reply of its own, or is acknowledged if
REPLY_ACK is negotiated and it asks to be, or is not answered at all. A refusal has to find its way
through the same three doors: where none is open, the session cannot go on.

Knows nothing about what the request means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vhostblk.errors import PeerError, SessionError
from vhostblk.vhost.message import (
    FRONTEND_TABLE,
    U64,
    ConfigSpace,
    Empty,
    InflightDescription,
    Message,
    Payload,
)
from vhostblk.vhost.vring import Vring

__all__ = ["Exchange"]


@dataclass
class Exchange:
    """The message whose actions are being performed."""

    message: Message
    own_reply: Callable[[Any], Payload] | None = None
    """Makes the reply's payload out of the last action's result."""
    gives_fd: bool = False
    """The last action's result is an fd that goes with the reply."""
    starting: Vring | None = None
    """The vring that is started once the actions have succeeded."""
    refusal: PeerError | None = None

    def answer(self, result: int | bytes | None, *, acks: bool) -> Message | None:
        """Give the reply to a request that succeeded, or None.

        Args:
            result: the last action's.
            acks: REPLY_ACK is negotiated.
        """
        if self.own_reply is not None:
            fds = (result,) if self.gives_fd and isinstance(result, int) else ()
            return self.message.reply(self.own_reply(result), fds)
        # "REPLY_ACK": messages that have a reply of their own get no other.
        if acks and self.message.needs_reply:
            return self.message.reply(U64(0))
        return None

    def refuse(self, error: PeerError, *, acks: bool) -> Message:
        """Give the reply that says no.

        Args:
            acks: REPLY_ACK is negotiated.

        Raises:
            SessionError: there is no way to say so, or `error` is one that ends the session.
        """
        if isinstance(error, SessionError):
            raise error
        row = FRONTEND_TABLE.get(self.message.request)
        if row is not None and row.reply is ConfigSpace:
            # GET_CONFIG: a payload of zero length indicates an error.
            return self.message.reply(Empty())
        if row is not None and row.refusal is not None:
            return self.message.reply(U64(row.refusal))
        asked = self.message.payload
        if row is not None and row.reply is InflightDescription is type(asked):
            # GET_INFLIGHT_FD: front-ends take a size of zero for "not tracked".
            return self.message.reply(replace(asked, mmap_size=0, mmap_offset=0))
        # A non-zero u64 in the place of another reply would be taken for that reply.
        if (row is None or row.reply is None) and acks and self.message.needs_reply:
            return self.message.reply(U64(1))
        raise SessionError(str(error)) from error
