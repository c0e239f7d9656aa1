"""A file that hangs: a file system of its own, in this process, that answers when it is told to.

As a server of NFS that is gone: whoever has begun to read or write waits in the kernel, uninterruptibly, until the
server answers, or the mount is given up. The kernel's side of that is FUSE (linux/fuse.h); the mount is a regular file,
and nothing is cached.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import threading
from pathlib import Path
from types import TracebackType

_IN_HEADER = struct.Struct("=IIQQIIIHH")
_OUT_HEADER = struct.Struct("=IiQ")
_ATTR = struct.Struct("=6Q10I")
_MAX_WRITE = 1 << 20
_DIRECT_IO = 1
_MNT_DETACH = 2

# Requests, by number.
_FORGET, _GETATTR, _SETATTR, _OPEN, _READ, _WRITE, _STATFS = 2, 3, 4, 14, 15, 16, 17
_RELEASE, _FSYNC, _FLUSH, _INIT, _INTERRUPT, _BATCH_FORGET = 18, 20, 25, 26, 36, 42
_MAY_HANG = (_READ, _WRITE, _FSYNC)


def _libc(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


class HangingFile:
    """A file at `path`, of `size` zeroes at first; a context manager.

    Raises: OSError: this process may not mount, or there is no FUSE.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.content = bytearray(size)
        path.touch()
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._is_hanging = False
        self._kept: list[bytes] = []
        options = f"fd={self._fd},rootmode={stat.S_IFREG | 0o600:o},user_id=0,group_id=0"
        try:
            _libc("mount", b"hanging", os.fsencode(path), b"fuse", 0, options.encode())
        except BaseException:
            os.close(self._fd)
            raise
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def __enter__(self) -> HangingFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.go_on()
        # Whoever still has it open has it until it closes it; the connection ends with the last one.
        _libc("umount2", os.fsencode(self.path), _MNT_DETACH)
        self._thread.join(15)
        assert not self._thread.is_alive(), "somebody still has the file open"
        os.close(self._fd)

    def hang(self) -> None:
        """Answer no reads, writes and flushes from now on."""
        with self._lock:
            self._is_hanging = True

    @property
    def waiting(self) -> int:
        """How many wait for an answer."""
        with self._lock:
            return len(self._kept)

    def go_on(self) -> None:
        """Answer all that waits, and whatever comes."""
        with self._lock:
            self._is_hanging = False
            kept, self._kept = self._kept, []
        for request in kept:
            self._answer(request)

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._fd, _MAX_WRITE + 4096)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return  # it is not mounted any more
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                raise
            with self._lock:
                keeps = self._is_hanging and _IN_HEADER.unpack_from(request)[1] in _MAY_HANG
                if keeps:
                    self._kept.append(request)
            if not keeps:
                self._answer(request)

    def _answer(self, request: bytes) -> None:
        _, kind, unique, *_ = _IN_HEADER.unpack_from(request)
        if kind in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            return  # there is none
        answer = self._do(kind, request[_IN_HEADER.size :])
        error, data = (answer, b"") if isinstance(answer, int) else (0, answer)
        header = _OUT_HEADER.pack(_OUT_HEADER.size + len(data), -error, unique)
        try:
            os.write(self._fd, header + data)
        except OSError as problem:
            if problem.errno not in (errno.ENOENT, errno.ENODEV):  # nobody waits any more
                raise

    def _do(self, kind: int, body: bytes) -> bytes | int:
        if kind == _INIT:
            return struct.pack("=IIIIHHIIHH8I", 7, 31, 0, 0, 64, 48, _MAX_WRITE, 1, 0, 0, *[0] * 8)
        if kind in (_GETATTR, _SETATTR):
            size = len(self.content)
            mode = stat.S_IFREG | 0o600
            attributes = (1, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
            return struct.pack("=QII", 0, 0, 0) + _ATTR.pack(*attributes)
        if kind == _OPEN:
            return struct.pack("=QII", 0, _DIRECT_IO, 0)
        if kind == _READ:
            _, offset, size = struct.unpack_from("=QQI", body)
            return bytes(self.content[offset : offset + size])
        if kind == _WRITE:
            _, offset, size = struct.unpack_from("=QQI", body)
            self.content[offset : offset + size] = body[40 : 40 + size]
            return struct.pack("=II", size, 0)
        if kind == _STATFS:
            return struct.pack("=5Q10I", 1 << 20, 1 << 20, 1 << 20, 1, 1, 4096, 255, 4096, *[0] * 7)
        return b"" if kind in (_RELEASE, _FSYNC, _FLUSH) else errno.ENOSYS
