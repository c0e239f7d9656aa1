"""The sandbox of a daemon's process: in two steps, because capabilities and Landlock belong to threads.

1. When the images are open, and it is known what they are backed by, all helper threads are ended. The one that is left
   gives up capabilities and files; threads that it starts from now on have no more than it has.
2. When everything listens, system calls go, for all threads at once. What is only done at a start (making sockets,
   threads with rings of their own) is over then.

Context: the control loop. Owns: the loop's executor.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vhostblk.block.host_needs import HostNeeds
from vhostblk.errors import ConfigError
from vhostblk.sandbox import libraries
from vhostblk.sandbox.files import Places, restrict_files
from vhostblk.sandbox.mode import SandboxMode
from vhostblk.sandbox.privileges import drop_privileges
from vhostblk.sandbox.system_calls import restrict_system_calls

__all__ = ["Sandbox"]

log = logging.getLogger(__name__)

_TASKS = "/proc/self/task"
# Threads of the kernel's for rings: what they do was asked for by others.
_KERNELS = "iou-"
_DEADLINE = 10.0


class Sandbox:
    """Args:
        mode: what becomes of system calls that are not allowed.

    Raises:
        ConfigError: a library is missing.
    """

    def __init__(self, mode: SandboxMode) -> None:
        self._mode = mode
        self._needs = HostNeeds()
        self._executor: ThreadPoolExecutor | None = None
        for library in (libraries.seccomp, libraries.landlock, libraries.prctl):
            library()

    def enter(self) -> None:
        """Before anything is opened: have threads that can be ended."""
        self._executor = ThreadPoolExecutor(thread_name_prefix="vhostblk-aside")
        asyncio.get_running_loop().set_default_executor(self._executor)

    def restrict_files(self, needs: HostNeeds, places: Places, *, gives_away: bool) -> None:
        """The first step. The graph has no threads any more.

        Args:
            gives_away: a socket is going to get another owner.

        Raises:
            ConfigError: the kernel refuses, or there are other threads.
        """
        assert self._executor is not None
        self._executor.shutdown(wait=True)
        self.enter()
        _wait_until_alone()
        self._needs = needs
        try:
            drop_privileges(but_chown=gives_away)
            missing = restrict_files(needs, places)
        except OSError as error:
            raise ConfigError(f"--sandbox: {error.strerror or error}") from None
        if missing is not None:
            log.warning("sandbox: files are not restricted: no Landlock here: %s", missing)

    def restrict_system_calls(self) -> None:
        """The second step.

        Raises:
            ConfigError: the kernel refuses.
        """
        try:
            drop_privileges(but_chown=False)
        except OSError as error:
            raise ConfigError(f"--sandbox: {error.strerror or error}") from None
        restrict_system_calls(
            self._mode,
            unix=bool(self._needs.unix_sockets),
            tcp=bool(self._needs.tcp_ports),
        )


def _wait_until_alone() -> None:
    """Threads that have been joined are there for a moment."""
    deadline = time.monotonic() + _DEADLINE
    while others := _other_threads():
        if time.monotonic() > deadline:
            raise ConfigError(f"--sandbox: a bug: there are threads: {', '.join(others)}")
        os.sched_yield()


def _other_threads() -> list[str]:
    names = []
    for task in os.listdir(_TASKS):
        if int(task) != os.getpid():
            try:
                names.append(Path(_TASKS, task, "comm").read_text().strip())
            except OSError:
                continue  # it has gone
    return [name for name in names if not name.startswith(_KERNELS)]
