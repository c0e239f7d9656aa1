"""A pytest plugin that holds every test to the house's rules, and offers it a daemon to talk to.

Switched on by ``pytest_plugins = ["vhostblk.testing.plugin"]`` in a conftest.py. A test fails if

- it leaks a file descriptor, a shared mapping or a thread (``@pytest.mark.leaks("why")`` says that
  it does so on purpose);
- a logger of vhostblk or of asyncio says WARNING or worse that the test has not announced
  (``@pytest.mark.warns("regular expression")``, or the fixture `expect_log`), or does not say what
  has been announced. asyncio tells of tasks that nobody has waited for there; that a callback was
  slow says more about the machine, and is allowed.

Fixtures: `expect_log`, `daemon`, `storage_daemon`, `socket_directory`. Helper: `require`.

This module knows nothing of what is tested.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from vhostblk.testing.daemon_process import VHOSTBLK, DaemonProcess
from vhostblk.testing.requirements import require
from vhostblk.testing.resources import Resources, wait_until_released

__all__ = ["DaemonStarter", "ExpectedLog", "require"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("leak_seconds", "how long a test's threads and rings may take to go", default="3")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "leaks(why): this test keeps something on purpose")
    config.addinivalue_line("markers", "warns(*patterns): this test makes vhostblk log these")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for name in ("leaks", "warns"):
        for mark in item.iter_markers(name):
            if not mark.args:
                raise pytest.UsageError(f"{item.nodeid}: the marker {name} needs an argument")


_LOGGERS = ("vhostblk", "asyncio")
_SLOW = re.compile(r"Executing .* took [\d.]+ seconds", re.DOTALL)


class ExpectedLog(logging.Handler):
    """Collects what these loggers say from WARNING on, and what a test says they will."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self._required: list[str] = []
        self._allowed: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Context: any thread."""
        message = record.getMessage()
        if record.name != "asyncio" or not _SLOW.match(message):
            self.messages.append(f"{record.levelname} {record.name}: {message}")

    def expect(self, *patterns: str) -> None:
        """Announces messages: each regular expression has to be found at least once."""
        self._required += patterns

    def allow(self, *patterns: str) -> None:
        """Announces messages that may come or not, for example because of a race."""
        self._allowed += patterns

    def complaints(self) -> list[str]:
        """What was said and not announced, and what was announced and not said."""
        known = [re.compile(pattern) for pattern in self._required + self._allowed]
        lines = [
            f"not announced: {message}"
            for message in self.messages
            if not any(pattern.search(message) for pattern in known)
        ]
        lines += [
            f"announced, but never logged: {pattern}"
            for pattern in self._required
            if not any(re.search(pattern, message) for message in self.messages)
        ]
        return lines


@pytest.fixture(autouse=True)
def _nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    # Set up before and torn down after a test's own fixtures; fixtures of a wider scope are older.
    before = Resources.of()
    yield
    if request.node.get_closest_marker("leaks"):
        return
    seconds = float(request.config.getini("leak_seconds"))
    if leaks := wait_until_released(before, seconds=seconds):
        pytest.fail("leaked: " + "; ".join(leaks), pytrace=False)


@pytest.fixture(autouse=True)
def expect_log(request: pytest.FixtureRequest, _nothing_leaks: None) -> Iterator[ExpectedLog]:
    """The log of this test: `expect_log.expect(pattern)` announces a warning or an error."""
    log = ExpectedLog()
    for mark in request.node.iter_markers("warns"):
        log.expect(*mark.args)
    for name in _LOGGERS:
        logging.getLogger(name).addHandler(log)
    yield log
    for name in _LOGGERS:
        logging.getLogger(name).removeHandler(log)
    if complaints := log.complaints():
        pytest.fail("log: " + "; ".join(complaints), pytrace=False)


class DaemonStarter:
    """Starts daemons for one test; all are stopped and checked at its end.

    Args:
        command: program and first arguments of every daemon it starts.
    """

    def __init__(self, command: Sequence[str], stack: ExitStack) -> None:
        self._command = tuple(command)
        self._stack = stack

    def __call__(
        self,
        *arguments: str | Path,
        sockets: Sequence[Path | str] = (),
        pass_fds: Sequence[int] = (),
        environment: dict[str, str] | None = None,
        command: Sequence[str] | None = None,
    ) -> DaemonProcess:
        """Starts one and waits until it listens on all of `sockets`.

        Raises:
            DaemonError: it ended, or does not listen in time.
        """
        words = [*(self._command if command is None else command), *arguments]
        process = DaemonProcess(words, sockets=sockets, pass_fds=pass_fds, environment=environment)
        return self._stack.enter_context(process)


@pytest.fixture
def daemon(_nothing_leaks: None) -> Iterator[DaemonStarter]:
    """Starts ``python -m vhostblk ARGUMENTS``: see `DaemonStarter`."""
    with ExitStack() as stack:
        yield DaemonStarter(VHOSTBLK, stack)


@pytest.fixture
def storage_daemon(_nothing_leaks: None) -> Iterator[DaemonStarter]:
    """Starts ``python -m vhostblk storage-daemon ARGUMENTS``: see `DaemonStarter`."""
    with ExitStack() as stack:
        yield DaemonStarter((*VHOSTBLK, "storage-daemon"), stack)


@pytest.fixture
def socket_directory(_nothing_leaks: None) -> Iterator[Path]:
    """A folder with a path short enough for sockets: sun_path ends at 108 bytes (unix(7))."""
    path = Path(tempfile.mkdtemp(prefix="vb-"))
    yield path
    shutil.rmtree(path)
