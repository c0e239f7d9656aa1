"""Daemons that are started in no time, so that they can be killed often, and a guest without a VM that outlives them.

Starting Python takes longer than most lives here: so one process imports everything, and forks a daemon whenever one is
asked for. The guest is the built-in client; it connects again as a VMM does.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vhostblk.client.client import Client
from vhostblk.client.queue import Pending
from vhostblk.errors import SessionError

__all__ = ["ForkServer", "SurvivingClient"]

# Everything a daemon imports.
_MODULES = (
    *("vhostblk.cli.serve", "vhostblk.cli.storage_daemon"),
    *("vhostblk.block.drivers.file", "vhostblk.block.drivers.raw"),
    "vhostblk.block.drivers.qcow2.node",
)
_CONNECT_SECONDS = 30.0
_MOST_REQUESTS = 150
_LONGEST_WAIT = 0.002


def serve_forks() -> None:
    """The fork server's whole life: lines of JSON come in, and go out."""
    for module in _MODULES:
        importlib.import_module(module)
    from vhostblk.cli.main import main

    log = int(sys.argv[1])
    for line in sys.stdin:
        order = json.loads(line)
        if isinstance(order, int):
            status = os.waitstatus_to_exitcode(os.waitpid(order, 0)[1])
            print(json.dumps(status), flush=True)
            continue
        pid = os.fork()
        if pid:
            print(json.dumps(pid), flush=True)
            continue
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 70
        try:
            status = main(order)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        finally:
            sys.stderr.flush()
            os._exit(status)


class ForkServer:
    """Starts the same daemon again and again; one at a time.

    Args:
        words: the daemon's command line, behind the program's name.
        pass_fds: descriptors the daemons inherit.

    Owns: the processes.
    """

    def __init__(self, words: Sequence[str | Path], *, pass_fds: Sequence[int] = ()) -> None:
        self.words = [os.fspath(word) for word in words]
        self.pid = 0
        self.started = 0
        self._log = os.memfd_create("daemons")
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import tests.restarts as r; r.serve_forks()", str(self._log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(self._log, *pass_fds),
            cwd=Path(__file__).parents[1],
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self.pid and kind is None:
                assert self.stop() == 0, self.output
            elif self.pid:
                self.kill()
        finally:
            self.close()

    def close(self) -> None:
        """End the server; its daemon has ended before."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)
        os.close(self._log)

    @property
    def output(self) -> str:
        """The last that the daemons have said."""
        size = os.fstat(self._log).st_size
        start = max(0, size - 8000)
        return os.pread(self._log, size - start, start).decode("utf-8", "replace")

    def start(self) -> None:
        """Start one, and do not wait."""
        self.pid = self._ask(self.words)
        self.started += 1

    def kill(self) -> None:
        """End it as a crash would; its process is gone when this returns."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """End it in order; its exit status."""
        return self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> int:
        pid, self.pid = self.pid, 0
        os.kill(pid, number)
        return self._ask(pid)

    def _ask(self, order: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert isinstance(answer, int)
        return answer


class ReturningClient(Client):
    """A client that goes on with the next daemon when one has gone."""

    _latest: Pending

    def submit(self, *arguments: Any, **options: Any) -> Pending:
        """As `Client.submit`."""
        self._latest = super().submit(*arguments, **options)
        return self._latest

    def wait_until(
        self, condition: Callable[[], bool], timeout: float | None = None
    ) -> list[Pending]:
        """As `Client.wait_until`, with whichever daemon; never returns nothing."""
        while True:
            try:
                # Some may have finished before the end of a connection.
                return super().wait_until(condition, timeout) or [self._latest]
            except SessionError:
                self.come_back()

    def come_back(self) -> None:
        """Connect to the next daemon."""
        raise NotImplementedError


class SurvivingClient(ReturningClient):
    """A client that goes on with the next daemon when one has gone, and that makes daemons go.

    Set `replace` when it is connected: what ends a daemon and starts the next. It is called at random moments,
    with requests in flight.
    """

    path: str
    replace: Callable[[], None]
    choice: random.Random
    replacements = 0
    left = 0
    """How many more there are to be."""
    _until_next = 1

    def begin(self, path: str, replace: Callable[[], None], count: int, seed: int) -> None:
        """Begin to replace daemons."""
        self.path, self.replace, self.left = path, replace, count
        self.choice = random.Random(seed)

    def submit(self, *arguments: Any, **options: Any) -> Pending:
        """As `Client.submit`; the daemon may be replaced before or after it sees the request."""
        is_time = self.left and not self._is_waiting()
        early = is_time and self.choice.random() < 0.2
        if early:
            self._replace()
        pending = super().submit(*arguments, **options)
        if is_time and not early:
            # The daemon is anywhere between the kick and the completion.
            end = time.monotonic() + self.choice.random() * _LONGEST_WAIT
            while time.monotonic() < end:
                pass
            self._replace()
        return pending

    def _is_waiting(self) -> bool:
        self._until_next -= 1
        return self._until_next > 0

    def _replace(self) -> None:
        self._until_next = self.choice.randint(1, _MOST_REQUESTS)
        self.left -= 1
        self.replacements += 1
        self.replace()

    def come_back(self) -> None:
        """Connect to the next daemon."""
        deadline = time.monotonic() + _CONNECT_SECONDS
        while True:
            try:
                self.reconnect(self.path)
                return
            except (FileNotFoundError, ConnectionRefusedError, SessionError):
                # Not there yet, or already gone again.
                assert time.monotonic() < deadline, "no daemon"
                time.sleep(0.001)
