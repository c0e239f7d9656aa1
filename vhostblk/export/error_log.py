"""What happens to one export too often to log it each time: each kind is logged once and then counted.

A disk that fails fails thousands of times a second; the log must say so once, and how often it was in the end. The same
goes for whatever a guest can do as often as it likes.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter


class ErrorLog:
    """Args:
    log: where to; its name or prefix says which export.
    """

    def __init__(self, log: logging.LoggerAdapter[logging.Logger]) -> None:
        self._log = log
        self._seen: Counter[tuple[int, str]] = Counter()

    def record(self, kind: str, detail: str = "", *, level: int = logging.WARNING) -> None:
        """Count one occurrence; the first of its kind is logged with its detail.

        Args:
            kind: what failed and how, without offsets: what makes two failures the same.
            detail: where it happened, shown the first time only, directly behind `kind`.
            level: of both lines.
        """
        self._seen[level, kind] += 1
        if self._seen[level, kind] == 1:
            self._log.log(level, "%s%s (logged once, counted from now on)", kind, detail)

    def record_io_error(self, operation: str, error: int, offset: int, length: int) -> None:
        """Count a request that the block layer or the kernel failed.

        Args:
            error: positive errno.
            offset, length: bytes on the disk.
        """
        name = errno.errorcode.get(error, str(error))
        self.record(
            f"{operation} failed: {os.strerror(error)} ({name})",
            f" at offset {offset}, {length} bytes",
        )

    def summarize(self) -> None:
        """Say how often each repeated kind occurred, and start anew."""
        for (level, kind), count in self._seen.items():
            if count > 1:
                self._log.log(level, "%s: %d times in all", kind, count)
        self._seen.clear()
