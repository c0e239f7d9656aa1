"""Who may connect: the owner and mode of a socket file, and the credentials of whoever has connected.

unix(7), SO_PEERCRED; socket(7), SO_PEERGROUPS. Two fences, one behind the other: the kernel lets nobody connect who may
not write the socket file; and of those who have connected, a `PeerRule` says who is served. Credentials are those that
the process had when it called connect(2), whoever uses the connection now.

Knows nothing about names of users, nor about messages.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from collections.abc import Set
from dataclasses import dataclass

from vhostblk.errors import ConfigError

__all__ = ["Peer", "PeerRule", "SocketAccess", "peer_of"]

_UCRED = struct.Struct("=iII")
# asm-generic/socket.h; Python has no name for it.
_SO_PEERGROUPS = 59
# What getsockopt() of Python's can return at most.
_MAX_BYTES = 1024


@dataclass(frozen=True, slots=True)
class SocketAccess:
    """What a socket file is to be like; None: as it comes (the umask, and who the daemon runs as)."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None

    def __bool__(self) -> bool:
        return (self.mode, self.uid, self.gid) != (None, None, None)

    @property
    def gives_away(self) -> bool:
        """Whether the file gets another owner, which takes a privilege."""
        return (self.uid, self.gid) != (None, None)

    def prepare(self, sock: socket.socket) -> None:
        """See that the file which bind(2) makes, with the mode of the socket, is never more open than asked for."""
        if self.mode is not None:
            os.fchmod(sock.fileno(), 0)

    def grant(self, path: str) -> None:
        """Give the file, which `prepare` was for, its mode and owner; nobody listens on it yet.

        Raises:
            ConfigError: this process may not give it away.
            OSError: it is gone.
        """
        if not self:
            return
        # By descriptor: whoever may write the directory could put a symbolic link into its place.
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            file = f"/proc/self/fd/{fd}"
            # The mode first: who has given a file away may not change it any more.
            if self.mode is not None:
                os.chmod(file, self.mode)
            if self.gives_away:
                self._give_away(path, file)
        finally:
            os.close(fd)

    def _give_away(self, path: str, file: str) -> None:
        uid = -1 if self.uid is None else self.uid
        gid = -1 if self.gid is None else self.gid
        try:
            os.chown(file, uid, gid)
        except PermissionError:
            wanted = [f"user {uid}"] * (uid >= 0) + [f"group {gid}"] * (gid >= 0)
            raise ConfigError(
                f"socket path {path}: cannot be given to {' and '.join(wanted)}: {os.strerror(errno.EPERM)}"
            ) from None


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that has connected."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int] = frozenset()
    """Supplementary ones."""


@dataclass(frozen=True, slots=True)
class PeerRule:
    """Who is served: these users, and the members of these groups; nobody else, root included."""

    uids: Set[int] = frozenset()
    gids: Set[int] = frozenset()

    def allows(self, peer: Peer) -> bool:
        """Whether this one is served."""
        return peer.uid in self.uids or not self.gids.isdisjoint({peer.gid, *peer.groups})


def peer_of(sock: socket.socket) -> Peer:
    """Who is at the other end of a connected Unix socket.

    Supplementary groups are left out where there are more than 256, or the kernel does not tell them (before Linux
    4.13): then a rule that names one of them does not find it.

    Raises:
        OSError: it is no such socket.
    """
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    try:
        groups = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_BYTES)
    except OSError:
        groups = b""
    pid, uid, gid = _UCRED.unpack(credentials)
    return Peer(pid, uid, gid, frozenset(memoryview(groups).cast("I")))
