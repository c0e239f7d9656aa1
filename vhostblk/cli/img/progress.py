"""`-p`: how far a subcommand is, as qemu-img shows it; SIGUSR1 asks for it once."""

from __future__ import annotations

import sys


class Progress:
    """Prints per cents, over and over in the same line.

    Args:
        enabled: print by itself; otherwise only `report` does.
    """

    # Per cents between two lines.
    _STEP = 1.0

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._current = 0.0
        self._shown = 0.0

    def begin(self) -> None:
        """Show that nothing is done yet."""
        if self._enabled:
            self.report()

    def update(self, fraction: float) -> None:
        """Say how much of the whole is done, from 0 to 1."""
        self._current = min(max(fraction, 0.0), 1.0) * 100
        if self._enabled and (
            self._current - self._shown >= self._STEP or self._current == 100 != self._shown
        ):
            self.report()

    def report(self) -> None:
        """Print it, in any case."""
        self._shown = self._current
        sys.stdout.write(f"    ({self._current:.2f}/100%)\r")
        sys.stdout.flush()

    def end(self) -> None:
        """Leave the line."""
        if self._enabled:
            sys.stdout.write("\n")
            sys.stdout.flush()
