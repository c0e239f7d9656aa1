"""The file that says which process a daemon is, and keeps a second one from starting with the same file.

Knows nothing about daemons.
"""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path

from vhostblk.errors import ConfigError


class PidFile:
    """The file that says which process the daemon is.

    Made, and locked against other daemons, before anything listens; written when everything does. One that a killed
    daemon left behind has no lock, and is used again.

    Raises:
        ConfigError: it cannot be written, is no regular file, or belongs to a daemon that runs.

    Owns: the file, until `close()` removes it.
    """

    def __init__(self, path: Path) -> None:
        self._name = str(path)
        self._path = path.absolute()  # going to the background changes the directory
        self._fd = -1
        while self._fd < 0:
            self._take()

    def _take(self) -> None:
        try:
            # Never wait for a FIFO's other end.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            fd = os.open(self._path, flags, 0o644)
        except OSError as exc:
            raise ConfigError(f"--pidfile {self._name}: {exc.strerror}") from None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigError(f"--pidfile {self._name}: not a regular file")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(self._path)):
                    self._fd = fd
        except BlockingIOError:
            raise ConfigError(f"--pidfile {self._name}: belongs to a daemon that runs") from None
        finally:
            # Its former owner may have removed it just now: then the path needs a new file.
            if self._fd < 0:
                os.close(fd)

    def write(self) -> None:
        """Say who we are.

        Raises:
            ConfigError: the disk is full.
        """
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as exc:
            raise ConfigError(f"--pidfile {self._name}: {exc.strerror}") from None

    def close(self) -> None:
        """Remove it, unless somebody else has put another one there."""
        with suppress(OSError):
            if os.path.samestat(os.fstat(self._fd), os.stat(self._path)):
                self._path.unlink()
        os.close(self._fd)
