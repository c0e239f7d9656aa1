"""Finding and reading statistics pages, of any daemon, without its help.

Pages are files in /dev/shm. They are read with pread(2), not mapped: nobody can take memory away from under a reader,
and what a daemon has not touched is not allocated by looking at it.

A daemon holds an OFD lock on each of its pages for as long as it lives; the kernel drops it, however the daemon ends.
So a page without a lock is left over, whatever has become of the process id in it. A reader only asks for the lock, it
never takes it, so that nobody has to wait for readers.

Knows nothing of the engine.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import struct
import time
from dataclasses import dataclass

from vhostblk.export.statistics import QueueStatistics
from vhostblk.export.stats_layout import (
    HEADER,
    QUEUE_WORDS,
    WORD,
    PageError,
    PageFlag,
    PageHeader,
)

DIRECTORY = "/dev/shm"
"""Where Linux has POSIX shared memory: shm_overview(7)."""

_NAME = re.compile(r"vhostblk-(\d{1,10})-.+")
# struct flock: l_type, l_whence, l_start, l_len, l_pid; all of the file.
_FLOCK = struct.Struct("@hhqqi4x")


@dataclass(frozen=True, slots=True)
class PageCopy:
    """What a page said.

    Attributes:
        name: of the shared memory object, without the slash.
        is_alive: whether its daemon was there.
        time_ns: when, CLOCK_MONOTONIC.
        queues: by index; those that were ever started and could be counted in the page.
    """

    name: str
    is_alive: bool
    time_ns: int
    header: PageHeader
    queues: dict[int, QueueStatistics]

    @property
    def is_native(self) -> bool:
        """Whether the engine serves this export."""
        return bool(self.header.flags & PageFlag.NATIVE)

    @property
    def is_partial(self) -> bool:
        """Whether some queues are missing for want of shared memory."""
        return bool(self.header.flags & PageFlag.PARTIAL)


def page_names() -> list[str]:
    """The pages there are, living or left over, whoever's they are; none where there is no shared memory."""
    try:
        return sorted(name for name in os.listdir(DIRECTORY) if _NAME.fullmatch(name))
    except OSError:
        return []


def pid_in(name: str) -> int:
    """The process id in the name of a page."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else 0


def read_page(name: str) -> PageCopy:
    """Copy a page.

    Args:
        name: one of `page_names`.

    Raises:
        FileNotFoundError: its export has closed.
        OSError: for instance PermissionError.
        PageError: it is none, or of another version.
    """
    fd = open_page(name)
    try:
        now = time.monotonic_ns()
        header = PageHeader.parse(_read(fd, 0, HEADER.size))
        queues = {}
        for index in range(header.queues_started):
            raw = _read(fd, header.queue_offset(index), QUEUE_WORDS * WORD)
            if len(raw) < QUEUE_WORDS * WORD:
                raise PageError("it ends before its last queue")
            queues[index] = QueueStatistics.of(memoryview(raw).cast("Q"))
        return PageCopy(name, is_locked(fd), now, header, queues)
    finally:
        os.close(fd)


def open_page(name: str) -> int:
    """Open one for reading, whatever somebody else has put in its place.

    Raises:
        OSError: it cannot be read.
        PageError: it is no file.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = os.open(f"{DIRECTORY}/{name}", flags)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise PageError("not a file")
    return fd


def lock(fd: int) -> None:
    """Mark a page as a living daemon's, for as long as it is open.

    Args:
        fd: open for writing.

    Raises:
        OSError: somebody else holds it, or the file system has no locks.
    """
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))


def is_locked(fd: int) -> bool:
    """Whether the daemon that made a page is there."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _read(fd: int, offset: int, size: int) -> bytes:
    return os.pread(fd, size, offset)
