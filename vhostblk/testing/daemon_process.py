"""Runs a vhost-user-blk daemon as a process of its own, and looks at how it ends.

Readiness is seen in /proc/net/unix: a connection made to find out would be the daemon's first
client. This module knows nothing of the daemon but its command line and its sockets.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from vhostblk.errors import VhostBlkError

__all__ = ["DaemonError", "DaemonProcess", "VHOSTBLK", "is_listening"]

VHOSTBLK = (sys.executable, "-m", "vhostblk")

#: __SO_ACCEPTCON in the flags column of /proc/net/unix (include/linux/net.h).
_ACCEPTS = 0x10000

TRACEBACK = "Traceback (most recent call last)"


class DaemonError(VhostBlkError):
    """A daemon did not come up, did not stop, or ended in a way it must not."""


class DaemonProcess:
    """A daemon under test; a context manager that stops it and checks its end.

    Args:
        command: program and arguments.
        sockets: paths it is going to listen on; `start` waits for all of them.
        pass_fds: descriptors it inherits, under the same numbers.
        environment: added to this process's.

    Owns: the process, a file in memory with what it says on stdout and stderr.
    """

    def __init__(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        sockets: Sequence[Path | str] = (),
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.command = [os.fspath(word) for word in command]
        self.sockets = [os.fspath(path) for path in sockets]
        self._pass_fds = tuple(pass_fds)
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._said: int | None = None
        self._text = ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The first failure is the one to tell of.
        self.close(check=kind is None)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._running().pid

    @property
    def output(self) -> str:
        """What it has said on stdout and stderr so far."""
        if self._said is not None:
            size = os.fstat(self._said).st_size
            self._text = os.pread(self._said, size, 0).decode("utf-8", "replace")
        return self._text

    @property
    def status(self) -> int | None:
        """Exit status (negative: the signal that ended it); None while it runs."""
        return self._running().poll()

    def start(self, timeout: float = 15.0) -> None:
        """Starts it and waits until it listens.

        Raises:
            DaemonError: it ended, or was not ready within `timeout` seconds.
        """
        self._said = os.memfd_create("daemon-output")
        try:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=self._said,
                pass_fds=self._pass_fds,
                env=self._environment,
            )
            deadline = time.monotonic() + timeout
            for path in self.sockets:
                self._wait_for_socket(path, deadline)
        except BaseException:
            self.close(check=False)
            raise

    def wait(self, timeout: float = 15.0) -> int:
        """Waits for its end.

        Returns:
            its exit status.

        Raises:
            DaemonError: it still runs after `timeout` seconds.
        """
        try:
            return self._running().wait(timeout)
        except subprocess.TimeoutExpired:
            raise DaemonError(self._tell(f"still runs after {timeout:g} s")) from None

    def stop(self, timeout: float = 15.0, *, number: signal.Signals = signal.SIGTERM) -> int:
        """Asks it to stop, as an operator does, and waits for its end; returns the status."""
        self._running().send_signal(number)
        return self.wait(timeout)

    def kill(self) -> None:
        """Ends it as a crash would; the end is not held against it."""
        self._running().kill()
        self._running().wait()

    def close(self, *, check: bool = True) -> None:
        """Stops it if it runs, and checks that it ended well. Idempotent.

        Raises:
            DaemonError: with `check`, if SIGTERM did not end it with status 0, if it ended by
                itself with another status, or if anything it said contains a traceback.
        """
        process = self._process
        if process is None:
            self._forget_output()
            return
        try:
            killed = process.poll() == -signal.SIGKILL
            status = process.returncode if process.returncode is not None else self.stop()
            if check and status != 0 and not killed:
                raise DaemonError(self._tell(f"ended with status {status}"))
            if check and TRACEBACK in self.output:
                raise DaemonError(self._tell("showed a traceback"))
        finally:
            process.kill()
            process.wait()
            self._process = None
            self._forget_output()

    def expect_end(self, status: int, timeout: float = 15.0) -> str:
        """Waits for an end with this status that is the test's own wish; returns what it said.

        Raises:
            DaemonError: it did not end, ended otherwise, or showed a traceback.
        """
        ended = self.wait(timeout)
        said = self.output
        self._process = None
        self._forget_output()
        if ended != status:
            raise DaemonError(self._tell(f"ended with status {ended}, not {status}"))
        if TRACEBACK in said:
            raise DaemonError(self._tell("showed a traceback"))
        return said

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise DaemonError(f"{' '.join(self.command)}: has not been started")
        return self._process

    def _wait_for_socket(self, path: str, deadline: float) -> None:
        # A relative path may be that of somebody else's socket, too, in another folder.
        while not (Path(path).is_socket() and is_listening(path)):
            if self.status is not None:
                raise DaemonError(self._tell(f"ended with status {self.status}"))
            if time.monotonic() > deadline:
                raise DaemonError(self._tell(f"does not listen on {path}"))
            time.sleep(0.005)

    def _forget_output(self) -> None:
        if self._said is not None:
            self._text = self.output
            os.close(self._said)
            self._said = None

    def _tell(self, what: str) -> str:
        tail = "\n".join(f"  | {line}" for line in self.output.splitlines()[-25:])
        return f"{' '.join(self.command)}: {what}" + (f"\n{tail}" if tail else "")


def is_listening(path: Path | str) -> bool:
    """Whether some process listens on the Unix socket bound to `path`, as it wrote the path."""
    wanted = os.fspath(path)
    with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            fields = line.rstrip("\n").split(maxsplit=7)
            if len(fields) == 8 and fields[7] == wanted and int(fields[3], 16) & _ACCEPTS:
                return True
    return False
