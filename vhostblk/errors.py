"""Every exception vhostblk raises on purpose.

::

    VhostBlkError
     +-- ConfigError        an option, a value or a combination of them is wrong
     +-- StateError         the object is not in a state that allows the call
     +-- PeerError          the front-end broke the vhost-user protocol
     |    +-- SessionError  ... so badly that the connection has to go
     +-- GuestError         the driver in the guest broke VIRTIO: its queue is broken
     +-- ImageError         what is in an image file is wrong
     +-- BlockError         a block-layer request failed; also an OSError, errno always set
     +-- HangError          an orderly end was given up, because something does not end

Who recovers: a `ConfigError` ends the command, with one line. A `PeerError` is answered through
REPLY_ACK where that was negotiated, a `SessionError` ends the session, a `GuestError` ends one
queue, a `BlockError` ends one request, a `HangError` the process, at once. Nothing else is
caught, because nothing else is expected.
"""

from __future__ import annotations

import errno as _errno
import os

__all__ = [
    "VhostBlkError",
    "ConfigError",
    "StateError",
    "PeerError",
    "SessionError",
    "GuestError",
    "ImageError",
    "BlockError",
    "HangError",
]


class VhostBlkError(Exception):
    """Root of the tree."""


class ConfigError(VhostBlkError):
    """A wrong option. The message names the option, the value and what is allowed.

    Args:
        errno: for callers that speak errno, as those of an image tool do; EINVAL unless something else is known.
        qemu_text: what QEMU's image tools say of the same, where scripts may look at it, in one or more lines; the
            message if absent.
    """

    def __init__(self, message: str, errno: int = _errno.EINVAL, *, qemu_text: str = "") -> None:
        super().__init__(message)
        self.errno = errno
        self.qemu_text = qemu_text or message

    def within(self, what: str) -> ConfigError:
        """The same as a part of something larger, which is named before it."""
        return ConfigError(f"{what}: {self}", self.errno, qemu_text=f"{what}: {self.qemu_text}")


class StateError(VhostBlkError):
    """A call that the object's state forbids."""


class PeerError(VhostBlkError):
    """The front-end sent something vhost-user forbids; this message is refused."""


class SessionError(PeerError):
    """The front-end broke framing or trust: the connection cannot go on."""


class GuestError(VhostBlkError):
    """The guest driver broke VIRTIO; the queue it happened on is broken until it is reset.

    Args:
        message: what the guest did.
        reason: a `vhostblk.virtio.chain.Broken`; 0 where whoever raises cannot know it.
    """

    def __init__(self, message: str, reason: int = 0) -> None:
        super().__init__(message)
        self.reason = reason


class ImageError(VhostBlkError):
    """An image file's own structure is wrong."""


class HangError(VhostBlkError):
    """What hangs was left to the kernel: nothing of it may be waited for, so the process has to end without."""


class BlockError(VhostBlkError, OSError):
    """A block request failed.

    Args:
        errno: a positive errno value, always set.
        message: what failed, with the node's name; defaults to the errno's text.
    """

    def __init__(self, errno: int, message: str | None = None) -> None:
        text = message or os.strerror(errno)
        OSError.__init__(self, errno, text)

    def __str__(self) -> str:
        name = _errno.errorcode.get(self.errno or 0, str(self.errno))
        return f"{self.strerror} ({name})"
