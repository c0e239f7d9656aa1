"""What the back-end says of its own accord, and when it may.

vhost-user, "Back-end communication", CONFIG_CHANGE_MSG, "Suspended device state".

Nothing is sent while all vrings are stopped. QEMU drops such messages, too; so a change is kept until
a ring runs.

Knows nothing about the channel but whether there is one.
"""

from __future__ import annotations

from vhostblk.vhost.message import BackendRequest, Message, ProtocolFeature
from vhostblk.vhost.negotiation import Negotiation

__all__ = ["BackendMessages"]


class BackendMessages:
    """Those that are due.

    Context: the session.
    """

    def __init__(self) -> None:
        self.has_channel = False
        """SET_BACKEND_REQ_FD has come."""
        self._config_change_due = False

    def config_changed(self) -> None:
        """The configuration space has changed."""
        self._config_change_due = True

    def take(self, agreed: Negotiation, *, is_running: bool) -> Message | None:
        """Give the next message that is due and allowed now.

        Args:
            is_running: a vring is started.
        """
        may_tell = agreed.has(ProtocolFeature.CONFIG | ProtocolFeature.BACKEND_REQ)
        if not (may_tell and self.has_channel and is_running):
            return None
        is_due, self._config_change_due = self._config_change_due, False
        return Message(BackendRequest.CONFIG_CHANGE_MSG) if is_due else None
