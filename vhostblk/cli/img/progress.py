"""`-p`: how far a subcommand is, as qemu-img shows it; without it SIGUSR1 asks for that once, on standard error."""

from __future__ import annotations

import asyncio
import signal
import sys
from types import TracebackType


class Progress:
    """Prints per cents, over and over in the same line; `with` begins and ends that.

    Args:
        enabled: print by itself; otherwise only when a signal asks for it.
        step: per cents between two lines.
        at_once: show that nothing is done yet; otherwise that is for `begin`, where it may not come to that.

    Context: the control loop.
    Owns: SIGUSR1, from when it is shown that nothing is done yet.
    """

    def __init__(self, enabled: bool, step: float = 1.0, *, at_once: bool = True) -> None:
        self._enabled = enabled
        self._step = step
        self._at_once = at_once
        self._begun = False
        self._current = 0.0
        self._shown = 0.0

    def __enter__(self) -> Progress:
        if self._at_once:
            self.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._enabled:
            sys.stdout.write("\n")  # leave the line
        else:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def begin(self) -> None:
        """Show that nothing is done yet, unless that was shown."""
        if self._begun:
            return
        self._begun = True
        if not self._enabled:
            loop = asyncio.get_running_loop()

            def ask(number: int, frame: object) -> None:
                # Not here: standard error may be in the middle of a line.
                loop.call_soon_threadsafe(self._answer)

            signal.signal(signal.SIGUSR1, ask)
        self.update(0.0)

    def update(self, fraction: float) -> None:
        """Say how much of the whole is done, from 0 to 1; the beginning and the end are always shown."""
        self._current = min(max(fraction, 0.0), 1.0) * 100
        is_far = abs(self._current - self._shown) > self._step
        if self._enabled and (is_far or self._current in (0.0, 100.0)):
            self._shown = self._current
            sys.stdout.write(f"    ({self._current:.2f}/100%)\r")
            sys.stdout.flush()

    def report(self, done: int, whole: int) -> None:
        """The same in bytes."""
        if whole:
            self.update(done / whole)

    def _answer(self) -> None:
        sys.stderr.write(f"    ({self._current:.2f}/100%)\n")
        sys.stderr.flush()
