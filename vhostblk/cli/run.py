"""Run a daemon from a command: in the foreground, or detached; with the process's signals."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import resource
import select
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from vhostblk.cli.signals import signals_handled
from vhostblk.cli.streams import log_without_waiting
from vhostblk.daemon import Daemon, DaemonConfig
from vhostblk.errors import ConfigError, HangError
from vhostblk.sandbox.mode import SandboxMode
from vhostblk.sandbox.sandbox import Sandbox

log = logging.getLogger(__name__)

_OFF = "off"
_VARIABLE = "VHOSTBLK_SANDBOX"


def add_sandbox_option(parser: argparse.ArgumentParser) -> None:
    """`--sandbox`, which both serving commands have."""
    parser.add_argument(
        "--sandbox",
        choices=(_OFF, *(mode.value for mode in SandboxMode)),
        help="once it serves, give up privileges, files and system calls that it does not need; a "
        "system call that is not allowed fails, and the kernel logs it (on), ends the daemon (kill), "
        f"or is only logged (log) (default: ${_VARIABLE}, or off)",
    )


def sandbox_mode(option: str | None) -> SandboxMode | None:
    """What the option or, without it, the environment says.

    Raises:
        ConfigError: the environment says something else.
    """
    word = option or os.environ.get(_VARIABLE) or _OFF
    if word == _OFF:
        return None
    try:
        return SandboxMode(word)
    except ValueError:
        raise ConfigError(f"{_VARIABLE}={word}: must be off, on, kill or log") from None


def run_daemon(
    config: DaemonConfig, *, detach: bool = False, sandbox: SandboxMode | None = None
) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP looks at the disks again: their sizes, and what has paused on an
    error.

    Args:
        detach: go to the background once everything listens; the caller's process ends with 0 then, with 1 (and the
            reason on standard error) if it did not come that far.
        sandbox: give up, for good, what serving does not need; this process is the daemon's alone.
    """
    # Guests wait for us, and we for nobody who reads the log.
    log_without_waiting("vhostblk")
    # The soft limit is there for programs that use select(2); exports and guest memory take a few fds each.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # then with what we have
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    box = Sandbox(sandbox) if sandbox is not None else None
    on_ready = _detach() if detach else None

    async def serve() -> None:
        daemon = Daemon(config, on_ready, sandbox=box)
        with _Backstop(2 * config.shutdown_timeout + 1) as backstop:

            def stop() -> None:
                daemon.stop()
                if config.shutdown_timeout:
                    backstop.arm()

            handlers = {
                signal.SIGTERM: stop,
                signal.SIGINT: stop,
                signal.SIGHUP: daemon.look_again,
            }
            try:
                with signals_handled(handlers):
                    await daemon.run()
            except HangError as exc:
                # Nothing is left to be done in order: not by the loop, nor by threads that are joined at the end.
                _leave(str(exc))

    asyncio.run(serve())


class _Backstop:
    """Ends the process if the loop itself hangs, in a system call, while the daemon is being stopped.

    A daemon that gives up by itself has needed half of the time, and what does not hang as much again.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timer: threading.Timer | None = None

    def __enter__(self) -> _Backstop:
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()

    def arm(self) -> None:
        """From now on."""
        if self._timer is None:
            reason = "given up: the daemon itself hangs in a system call"
            self._timer = threading.Timer(self._seconds, _leave, [reason])
            self._timer.daemon = True
            try:
                self._timer.start()
            except RuntimeError as exc:  # no thread can be started: then the end is not bounded
                self._timer = None
                log.warning("the end may take longer than --shutdown-timeout: %s", exc)


def _leave(reason: str) -> NoReturn:
    # Whoever does not read what we say must not hold us up, either.
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    with suppress(OSError):
        if poll.poll(0):
            os.write(2, f"vhostblk: {reason}\n".encode())
    os._exit(1)


def _detach() -> Callable[[], None]:
    """Fork before any thread or loop exists; the parent leaves when the child is ready or dead."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child:
        os.close(write_end)
        if os.read(read_end, 1):
            os._exit(0)
        os.waitpid(child, 0)
        os._exit(1)
    os.close(read_end)
    os.setsid()

    def ready() -> None:
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        sys.stdout.flush()
        sys.stderr.flush()
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        os.write(write_end, b"1")
        os.close(write_end)

    return ready
