"""Standard output and standard error of a tool whose work does not end because nobody reads any more.

A reader that has left is no error: what would be written is dropped, and the work goes on. Where it cannot be written
for another reason, as on a full disk, the rest is dropped, too, and whoever runs the tool learns of that at the end.

File names come and go as the bytes that they are. A standard stream that is closed from the start is /dev/null: no
image gets its number, and with it what is printed.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class PatientFile(io.RawIOBase):
    """Takes everything, and writes to a file descriptor for as long as that works.

    Attributes:
        error: why it does not any more; a reader that has left is none.

    Context: the control loop.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._is_lost = False
        self.error: OSError | None = None

    def writable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def fileno(self) -> int:
        """See `io.RawIOBase`."""
        return self._fd

    def isatty(self) -> bool:
        """See `io.RawIOBase`."""
        return os.isatty(self._fd)

    def write(self, data: ReadableBuffer) -> int:
        """See `io.RawIOBase`; never fails."""
        length = memoryview(data).nbytes
        while not self._is_lost:
            try:
                return os.write(self._fd, data)
            except BlockingIOError:
                select.select([], [self._fd], [])
            except OSError as error:
                self._is_lost = True
                if error.errno != errno.EPIPE:
                    self.error = error
        return length


@contextmanager
def patient_streams() -> Iterator[PatientFile]:
    """Standard output and standard error are patient inside `with`, unless somebody else has replaced them.

    Returns:
        standard output, for its `error`.
    """
    _occupy()
    before = sys.stdout, sys.stderr
    output = PatientFile(1)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(output)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(PatientFile(2), eager=True)
    try:
        yield output
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _text(file: PatientFile, *, eager: bool = False) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=sys.getfilesystemencoding(),
        errors="surrogateescape",
        line_buffering=eager or file.isatty(),
    )


def _occupy() -> None:
    """No standard stream is closed when this returns."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
