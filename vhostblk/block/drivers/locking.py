"""Image locks between processes, byte for byte as QEMU takes them (block layer row B09.12).

Each permission in use is a shared OFD lock on byte 100 + its bit, each permission *not* shared with
others one on byte 200 + its bit. Whoever wants a permission looks whether somebody holds the
"unshared" byte of it, and the other way round. The locks belong to the open file description and go
away with it, also when the process dies.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct

from vhostblk.block.permissions import PERM_NAMES, Perm
from vhostblk.errors import ConfigError

log = logging.getLogger(__name__)

_PERM_BASE = 100
_UNSHARED_BASE = 200

# struct flock: l_type, l_whence, l_start, l_len, l_pid; l_pid must be 0 for OFD locks.
_FLOCK = struct.Struct("@hhqqi4x")

# The file system does not do locks at all.
_UNSUPPORTED = (errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


class ImageLock:
    """The locks one open file holds.

    Args:
        fd: borrowed; must stay open as long as this is used.
        filename: for messages.
        required: locks that the file system cannot do are an error rather than a warning.
    """

    def __init__(self, fd: int, filename: str, *, required: bool) -> None:
        self._fd = fd
        self._filename = filename
        self._required = required
        self._works = True
        self._perm = Perm.NONE
        self._shared = Perm.ALL
        self._held: set[int] = set()

    def prepare(self, perm: Perm, shared: Perm) -> None:
        """Take what the new permissions need on top of the old ones, then look for conflicts with that.

        Asking for less cannot fail: users must be able to leave.

        Raises:
            ConfigError: another user of the file excludes this; what was taken is given back.
        """
        if not self._works:
            return
        try:
            self._lock(_bytes(perm, shared))
            self._refuse_conflicts(perm & ~self._perm, shared | ~self._shared)
        except OSError as error:
            self.abort()
            if error.errno in _UNSUPPORTED and not self._required:
                self._works = False
                log.warning("%s: no image locking: %s", self._filename, error.strerror)
                return
            raise ConfigError(
                f"Failed to lock '{self._filename}': {error.strerror} (locking=off goes without)"
            ) from None
        except ConfigError:
            self.abort()
            raise

    def follow(self, other: ImageLock) -> None:
        """Hold what `other` holds, as its successor on another open file: it is not looked at as a stranger's.

        Raises:
            ConfigError: another process is in the way.
        """
        self._perm, self._shared, self._works = other._perm, other._shared, other._works
        if self._works:
            self._lock(other._held)

    def commit(self, perm: Perm, shared: Perm) -> None:
        """The change was made: give back what only the old permissions needed."""
        self._perm, self._shared = perm, shared
        self._unlock_except(_bytes(perm, shared))

    def abort(self) -> None:
        """The change was not made."""
        self._unlock_except(_bytes(self._perm, self._shared))

    def _lock(self, wanted: set[int]) -> None:
        for offset in sorted(wanted - self._held):
            try:
                self._control(fcntl.F_OFD_SETLK, fcntl.F_RDLCK, offset)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                # Nobody locks these bytes exclusively, except for an instant or by another
                # convention.
                raise ConfigError(
                    f"Failed to lock byte {offset} of '{self._filename}': another process holds it",
                    errno.EAGAIN,
                    qemu_text=f"Failed to lock byte {offset}",
                ) from None
            self._held.add(offset)

    def _unlock_except(self, wanted: set[int]) -> None:
        for offset in sorted(self._held - wanted):
            self._control(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, offset)
            self._held.discard(offset)

    def _refuse_conflicts(self, perm: Perm, shared: Perm) -> None:
        for asked, base, kind in ((perm, _UNSHARED_BASE, ""), (~shared, _PERM_BASE, "shared ")):
            for index, (bit, name) in enumerate(PERM_NAMES):
                # Our own locks are never in our own way, so an exclusive one would fit if nobody
                # else has any.
                if asked & bit and self._control(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, base + index):
                    raise ConfigError(
                        f'Failed to get {kind}"{name}" lock: is another process using the image '
                        f"[{self._filename}]?",
                        errno.EAGAIN,
                        qemu_text=f'Failed to get {kind}"{name}" lock\n'
                        f"Is another process using the image [{self._filename}]?",
                    )

    def _control(self, command: int, kind: int, offset: int) -> bool:
        """One fcntl on one byte; for F_OFD_GETLK, whether somebody else is in the way."""
        request = _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0)
        answer = fcntl.fcntl(self._fd, command, request)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _bytes(perm: Perm, shared: Perm) -> set[int]:
    found = set()
    for index, (bit, _) in enumerate(PERM_NAMES):
        if perm & bit:
            found.add(_PERM_BASE + index)
        if ~shared & bit:
            found.add(_UNSHARED_BASE + index)
    return found
