"""Run a daemon from a command: in the foreground, or detached; with the process's signals."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from vhostblk.daemon import Daemon, DaemonConfig


def run_daemon(config: DaemonConfig, *, detach: bool = False) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP looks at the disks again: their sizes, and what has paused on an
    error.

    Args:
        detach: go to the background once everything listens; the caller's process ends with 0 then, with 1 (and the
            reason on standard error) if it did not come that far.
    """
    # The soft limit is there for programs that use select(2); exports and guest memory take a few fds each.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # then with what we have
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    on_ready = _detach() if detach else None

    async def serve() -> None:
        daemon = Daemon(config, on_ready)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, daemon.stop)
        loop.add_signal_handler(signal.SIGINT, daemon.stop)
        loop.add_signal_handler(signal.SIGHUP, daemon.look_again)
        await daemon.run()

    asyncio.run(serve())


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
