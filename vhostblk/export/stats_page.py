"""Statistics pages: the shared memory in which an export's queues are counted, for anybody who may to look at.

One POSIX shared memory object for each export, `/vhostblk-PID-EXPORT`, mode 0600, from its opening to its closing. A
queue's part is allocated when the queue first starts, and not later, because writing to a hole of a file system that is
full would end the process with SIGBUS. Where there is no room, or no shared memory at all, the counters are in private
memory; the daemon warns once, and serves.

A killed daemon leaves its pages behind. The next daemon of that user removes them: the lock that tells a living
daemon's pages (stats_reader.py) is missing.

Knows nothing of who counts, nor of what is counted.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import re
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from vhostblk.export import stats_reader
from vhostblk.export.statistics import QueueStatistics, in_flight_in
from vhostblk.export.stats_layout import (
    HEADER_FIELDS,
    MAGIC,
    QUEUE_WORDS,
    WORD,
    PageError,
    PageFlag,
    PageHeader,
    header_offset,
)

try:
    import posix_ipc
except ImportError:
    posix_ipc = None

log = logging.getLogger(__name__)

_MODE = 0o600
# Longer names of exports are cut: NAME_MAX is 255.
_MAX_NAME = 200
# Names that are tried: others may sit on ours, on purpose or from another process namespace.
_MAX_TRIES = 100
_NO_FD: dict[str, bool] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
_Warn = Callable[[str, OSError], None]


def _say_nothing(_export: str, _error: OSError) -> None:
    pass


class StatsPages:
    """Makes the pages of one daemon: removes what killed ones left, once, and complains once.

    Context: the control loop.
    """

    def __init__(self) -> None:
        self._has_removed_stale = False
        self._has_warned = False
        self._prepared: dict[str, StatsPage] = {}

    def create(self, export: str, queues: int, *, is_native: bool) -> StatsPage:
        """A page for an export, the prepared one if there is; where that cannot be, memory of our own.

        Args:
            export: its id.
            queues: how many it may have.
        """
        if export in self._prepared:
            return self._prepared.pop(export)
        if not self._has_removed_stale:
            self._has_removed_stale = True
            remove_stale()
        try:
            return StatsPage.shared(export, queues, is_native=is_native, warn=self._warn)
        except OSError as exc:
            self._warn(export, exc)
            return StatsPage.private(export, queues)

    def prepare(self, export: str, queues: int, *, is_native: bool) -> None:
        """Make what `create` is going to return, while files can be made."""
        self._prepared[export] = self.create(export, queues, is_native=is_native)

    def close(self) -> None:
        """Remove what was prepared for nobody."""
        for page in self._prepared.values():
            page.unlink()
            page.close()
        self._prepared.clear()

    def _warn(self, export: str, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "export %s: no shared memory for its statistics (%s): others cannot see them; "
                "this is not said of other exports",
                export,
                error.strerror or error,
            )


class StatsPage:
    """Where the queues of one export are counted; see `shared` and `private`.

    Args:
        header: what the page says of itself.
        memory: the page.
        name, fd: of the shared memory; empty and -1 without.
        warn: called with the export and an OSError when a queue finds no room.

    Context: the control loop; what `queue` gives belongs to whoever serves the queue.
    Owns: the mapping, the file and its name.
    """

    def __init__(
        self,
        header: PageHeader,
        memory: mmap.mmap,
        name: str = "",
        fd: int = -1,
        warn: _Warn = _say_nothing,
    ) -> None:
        self._header = header
        self._map = memory
        self._name = name
        self._fd = fd
        self._warn = warn
        self._started = 0
        self._queues: dict[int, memoryview] = {}
        self._private: list[mmap.mmap] = []

    @classmethod
    def private(cls, export: str, queues: int) -> StatsPage:
        """One that nobody else can read."""
        header = _new_header(export, queues, is_native=False)
        return cls(header, _private_memory(header.size))

    @classmethod
    def shared(
        cls, export: str, queues: int, *, is_native: bool, warn: _Warn = _say_nothing
    ) -> StatsPage:
        """One that others can read.

        Raises:
            OSError: there is no shared memory, or no room.
        """
        header = _new_header(export, queues, is_native=is_native)
        name, fd = _create(export)
        try:
            # Before anybody can take it for a page: one without a lock is one that was left over.
            stats_reader.lock(fd)
            os.ftruncate(fd, header.size)
            os.posix_fallocate(fd, 0, header.header_size)
            memory = mmap.mmap(fd, header.size, **_NO_FD)
        except BaseException:
            _unlink(name)
            os.close(fd)
            raise
        raw = header.pack()
        memory[len(MAGIC) : len(raw)] = raw[len(MAGIC) :]
        memory[: len(MAGIC)] = MAGIC
        return cls(header, memory, name, fd, warn)

    @property
    def name(self) -> str:
        """Of the file in /dev/shm; empty: others cannot see it."""
        return self._name

    def queue(self, index: int) -> memoryview:
        """The counters of a queue: `QUEUE_WORDS` 64-bit integers, the same ones every time."""
        words = self._queues.get(index)
        if words is None:
            words = self._queues[index] = self._allocate(index)
        return words

    def front_end_came(self) -> None:
        """One has connected."""
        self._count(sessions=self._header.sessions + 1, connected=self._header.connected + 1)

    def front_end_left(self) -> None:
        """It is gone."""
        self._count(connected=self._header.connected - 1)

    def read(self) -> dict[int, QueueStatistics]:
        """A copy, by the index of the queue; of those that were ever started."""
        return {index: QueueStatistics.of(words) for index, words in sorted(self._queues.items())}

    def in_flight(self) -> tuple[int, int]:
        """How many requests are, and when the oldest was taken (CLOCK_MONOTONIC, ns; 0: none is)."""
        counted = [in_flight_in(words) for words in self._queues.values()]
        return sum(count for count, _ in counted), min((at for _, at in counted if at), default=0)

    def close(self) -> None:
        """Let go of the memory, and of the name. Nobody counts any more."""
        self.unlink()
        for words in self._queues.values():
            words.release()
        self._queues.clear()
        for memory in (self._map, *self._private):
            memory.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def unlink(self) -> None:
        """Others cannot find it from now on."""
        if self._name:
            _unlink(self._name)
            self._name = ""

    def _allocate(self, index: int) -> memoryview:
        start = self._header.queue_offset(index)
        if self._fd >= 0 and index >= self._started:
            # Readers look at all queues below the highest that has started.
            first, end = self._header.queue_offset(self._started), start + self._header.queue_stride
            try:
                os.posix_fallocate(self._fd, first, end - first)
            except OSError as exc:
                self._warn(self._header.export, exc)
                self._count(flags=self._header.flags | PageFlag.PARTIAL)
                self._private.append(_private_memory(QUEUE_WORDS * WORD))
                return memoryview(self._private[-1]).cast("Q")
            self._started = index + 1
            self._count(queues_started=self._started)
        with memoryview(self._map) as whole:
            return whole[start : start + QUEUE_WORDS * WORD].cast("Q")

    def _count(self, **values: int) -> None:
        """Change fields of the header, here and for the readers."""
        self._header = replace(self._header, **values)  # type: ignore[arg-type]
        formats = dict(HEADER_FIELDS)
        with memoryview(self._map) as whole:
            for name, value in values.items():
                form, at = formats[name], header_offset(name)
                with whole[at : at + struct.calcsize(form)].cast(form) as field:  # type: ignore[call-overload]
                    field[0] = value  # one store: readers never see half of it


def remove_stale() -> None:
    """Remove the pages that killed daemons of this user have left. Never those of one that lives."""
    for name in stats_reader.page_names():
        pid = stats_reader.pid_in(name)
        # The lock alone would do. With the process gone as well, nobody can put a new page into the place of the one we
        # looked at before we remove it.
        if pid == os.getpid() or not _is_running(pid):
            remove_if_stale(name)


def remove_if_stale(name: str) -> bool:
    """Remove this page if no daemon has it, and say whether it is gone."""
    try:
        fd = stats_reader.open_page(name)
    except FileNotFoundError:
        return True
    except (OSError, PageError):
        return False
    try:
        if os.fstat(fd).st_uid != os.geteuid() or stats_reader.is_locked(fd):
            return False
        if os.pread(fd, len(MAGIC), 0) != MAGIC and _is_running(stats_reader.pid_in(name)):
            return False  # it is just being made
        os.unlink(f"{stats_reader.DIRECTORY}/{name}")
        return True
    except FileNotFoundError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _new_header(export: str, queues: int, *, is_native: bool) -> PageHeader:
    flags = PageFlag.NATIVE if is_native else PageFlag(0)
    return PageHeader(export, os.getpid(), time.time_ns(), int(flags), queues)


def _create(export: str) -> tuple[str, int]:
    """A new object: its name, and an fd."""
    if posix_ipc is None:
        raise OSError(errno.ENOSYS, "posix_ipc is not installed")
    if not os.path.isdir(stats_reader.DIRECTORY):
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), stats_reader.DIRECTORY)
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", export)[:_MAX_NAME] or "_"
    base = f"vhostblk-{os.getpid()}-{readable}"
    for number in range(1, _MAX_TRIES + 1):
        name = base if number == 1 else f"{base}~{number}"
        for _ in range(2):  # again, when what a killed daemon with our number had left is removed
            try:
                return name, posix_ipc.SharedMemory(f"/{name}", posix_ipc.O_CREX, mode=_MODE).fd
            except posix_ipc.ExistentialError:
                if not remove_if_stale(name):
                    break
            except posix_ipc.Error as exc:
                raise OSError(errno.EACCES, str(exc)) from None
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), base)


def _unlink(name: str) -> None:
    with suppress(posix_ipc.Error):
        posix_ipc.unlink_shared_memory(f"/{name}")


def _private_memory(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
