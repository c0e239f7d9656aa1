"""What the block layer has to say while an image tool runs: as QEMU's tools say it, or not at all.

A record may have a text of its own for tools: `extra={"qemu_says": text}` is what QEMU prints of the same event, as it
is, None that it prints nothing; `"qemu_warns"` is a warning that begins with the program's name, `"qemu_reports"` are
lines that do. Other records are for daemons, and only errors
among them are shown, unless somebody wants to see more.
"""

from __future__ import annotations

import logging
import sys


class ToolFormatter(logging.Formatter):
    """Lines without what daemons put before them.

    Args:
        program: its name.
    """

    def __init__(self, program: str) -> None:
        super().__init__(f"{program}: %(levelname)s: %(message)s")
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        """The text for tools, or the usual one."""
        if says := getattr(record, "qemu_says", None):
            return str(says)
        if warns := getattr(record, "qemu_warns", None):
            return f"{self._program}: warning: {warns}"
        if reports := getattr(record, "qemu_reports", None):
            return "\n".join(f"{self._program}: {line}" for line in reports)
        return super().format(record)


class ToolLog:
    """Shows records inside `with`.

    Args:
        program: its name.
    """

    def __init__(self, program: str) -> None:
        self._level = logging.ERROR
        self._handler = logging.StreamHandler(sys.stderr)
        self._handler.setFormatter(ToolFormatter(program))
        self._handler.addFilter(self._is_wanted)
        self._logger = logging.getLogger("vhostblk")

    def _is_wanted(self, record: logging.LogRecord) -> bool:
        for name in ("qemu_says", "qemu_warns", "qemu_reports"):
            if hasattr(record, name):
                return bool(getattr(record, name))
        return record.levelno >= self._level

    def show(self, level: str) -> None:
        """Show records for daemons, too, from "error" (which are shown anyway), "warning", "info" or "debug" on."""
        self._level = logging.getLevelNamesMapping()[level.upper()]
        self._logger.setLevel(min(logging.INFO, self._level))

    def __enter__(self) -> ToolLog:
        self._before = self._logger.level
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self._handler)
        return self

    def __exit__(self, *exc: object) -> None:
        self._logger.removeHandler(self._handler)
        self._logger.setLevel(self._before)
