"""Standard output and standard error of programs whose work does not end because nobody reads any more.

A reader that has left is no error: what would be written is dropped, and the work goes on. Where it cannot be written
for another reason, as on a full disk, the rest is dropped, too, and whoever runs the program learns of that at the end.

A daemon does not even wait for a reader who is slow: guests would wait with it. Lines that there is no room for are
lost, and those that come later say how many.

File names come and go as the bytes that they are, and what the encoding of the terminal has not is escaped. A standard
stream that is closed from the start is /dev/null: nothing that is opened later gets its number, and with it what is
printed, or is closed when a daemon goes to the background.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


# Codecs are known by name: what we do with characters that an encoding has not.
_ERRORS = "vhostblk.escape"


class PatientFile(io.RawIOBase):
    """Takes everything, and writes to a file descriptor for as long as that works.

    Attributes:
        error: why it does not any more; a reader that has left is none.
        is_lost: nothing is written any more, for whatever reason.

    Context: the control loop.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._waits = True
        self._notice = ""
        self._dropped = 0
        self.is_lost = False
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

    def drop_when_full(self, notice: str) -> None:
        """Wait for nobody from now on.

        Args:
            notice: printed where lines are missing, with how many for "{}".
        """
        self._waits = False
        self._notice = notice

    def write(self, data: ReadableBuffer) -> int:
        """See `io.RawIOBase`; never fails."""
        view = memoryview(data).cast("B")
        if self._waits:
            self._write(view)
            return len(view)
        rest = view
        if self._dropped and self._has_room():
            notice = self._notice.format(self._dropped)
            self._dropped = 0
            self._write(memoryview(f"{notice}\n".encode()))
        # Where there is room at all, it is for that much (pipe(7)).
        while rest and self._has_room() and self._write(rest[: select.PIPE_BUF]):
            rest = rest[select.PIPE_BUF :]
        self._dropped += bytes(rest).count(b"\n")
        return len(view)

    def _write(self, view: memoryview) -> bool:
        """Returns: nothing was dropped for want of room."""
        while view and not self.is_lost:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                if not self._waits:
                    return False
                select.select([], [self._fd], [])
            except OSError as error:
                self.is_lost = True
                if error.errno != errno.EPIPE:
                    self.error = error
        return True

    def _has_room(self) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return bool(poll.poll(0))


def run_patiently(program: str, work: Callable[[], int]) -> int:
    """Run a program with patient streams; returns its exit code, or 1 if it printed what could not be written.

    Args:
        program: its name, for the message that says so.

    Raises:
        SystemExit: `work` has raised it.
    """
    ended: SystemExit | None = None
    status = 0
    with patient_streams() as output:
        try:
            status = work()
        except SystemExit as exc:
            ended = exc
        sys.stdout.flush()
        if output.error is not None and not (ended.code if ended else status):
            sys.stderr.write(f"{program}: standard output: {output.error.strerror}\n")
            return 1
    if ended is not None:
        raise ended
    return status


def nobody_reads() -> bool:
    """Whoever read standard output has left, or it takes no more: nothing that is printed arrives."""
    file = _file(sys.stdout)
    return file is not None and file.is_lost


def log_without_waiting(program: str) -> None:
    """From now on, what is printed to standard error holds nobody up."""
    file = _file(sys.stderr)
    if file is not None:
        file.drop_when_full(f"{program}: WARNING: {{}} lines are missing here: nobody read the log")


def _file(stream: TextIO) -> PatientFile | None:
    file = getattr(getattr(stream, "buffer", None), "raw", None)
    return file if isinstance(file, PatientFile) else None


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


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    character = error.object[error.start]
    if 0xDC80 <= ord(character) <= 0xDCFF:  # a byte of a file name
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return ascii(character)[1:-1], error.start + 1


codecs.register_error(_ERRORS, _escape)


def _text(file: PatientFile, *, eager: bool = False) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=sys.getfilesystemencoding(),
        errors=_ERRORS,
        line_buffering=eager or file.isatty(),
    )


def _occupy() -> None:
    """No standard stream is closed when this returns."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
