"""The daemon: owns the block graph, the engine threads and the exports; starts and stops them in order.

Start: block nodes, engine threads, exports (their sockets last), then "ready". Stop, on SIGTERM, SIGINT or SIGHUP's
cousin `stop()`: exports stop taking requests, drain and flush; then nodes are closed, which releases their locks.
Whatever fails at the start undoes what was done, and no socket exists before all options were found right.

Context: `run()` is the whole life, on one asyncio loop. Two daemons in one process do not know of each other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vhostblk import native
from vhostblk.block.graph import BlockGraph
from vhostblk.errors import ConfigError
from vhostblk.export.export import Export
from vhostblk.export.io_thread import IOThread
from vhostblk.export.options import ExportConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IOThreadConfig:
    """`--object iothread,id=ID,poll-max-ns=NS`."""

    name: str
    poll_max_ns: int = 32768


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """All a daemon is told at the start."""

    blockdevs: Sequence[dict[str, Any]] = ()
    io_threads: Sequence[IOThreadConfig] = ()
    exports: Sequence[ExportConfig] = ()
    pid_file: Path | None = None
    data_path: str = "auto"  # auto, native or python
    blockdev_option: str = ""  # what the user calls `blockdevs`, for messages


@dataclass(slots=True)
class _Owned:
    threads: dict[str, IOThread] = field(default_factory=dict)
    exports: dict[str, Export] = field(default_factory=dict)


class Daemon:
    """One daemon.

    Args:
        config: what to serve.
        on_ready: called once when every export listens.
    """

    def __init__(self, config: DaemonConfig, on_ready: Callable[[], None] | None = None) -> None:
        self._config = config
        self._on_ready = on_ready
        self._stop = asyncio.Event()
        self._owned = _Owned()
        self.graph = BlockGraph()

    @property
    def exports(self) -> dict[str, Export]:
        """By id."""
        return self._owned.exports

    def stop(self) -> None:
        """Make `run()` come to its orderly end."""
        self._stop.set()

    async def run(self) -> None:
        """Serve until stopped.

        Raises:
            ConfigError: an option is wrong; nothing is left behind.
            BlockError: a disk cannot be opened.
            OSError: a socket or the pid file cannot be made.
        """
        use_native = self._choose_data_path()
        async with AsyncExitStack() as stack:
            self._handle_signals(stack)
            stack.push_async_callback(self.graph.close_all)
            for options in self._config.blockdevs:
                await self._open_node(options)
            if use_native:
                stack.callback(self._close_threads)
            for config in self._config.exports:
                await self._open_export(config, stack, use_native)
            for export in self.exports.values():
                await export.listen()
            if self._config.pid_file is not None:
                self._write_pid_file(self._config.pid_file, stack)
            if self._on_ready is not None:
                self._on_ready()
            await self._stop.wait()
            log.info("stopping")
            await asyncio.gather(*(export.stop() for export in self.exports.values()))

    async def _open_node(self, options: dict[str, Any]) -> None:
        try:
            await self.graph.add(options)
        except ConfigError as exc:
            option = self._config.blockdev_option
            raise ConfigError(f"{option}: {exc}" if option else str(exc)) from None

    def _choose_data_path(self) -> bool:
        wanted = self._config.data_path
        if wanted == "native" and not native.available:
            raise ConfigError("--data-path native: the engine was not built (no C compiler)")
        if wanted == "auto" and not native.available:
            log.warning(
                "the engine was not built: serving with the Python data path; a front-end that "
                "truncates the memory it shares can end this process"
            )
        return native.available and wanted != "python"

    def _handle_signals(self, stack: AsyncExitStack) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
            stack.callback(loop.remove_signal_handler, number)
        loop.add_signal_handler(signal.SIGHUP, self._refresh_sizes)
        stack.callback(loop.remove_signal_handler, signal.SIGHUP)

    def _refresh_sizes(self) -> None:
        for export in self.exports.values():
            export.refresh_size()

    async def _open_export(
        self, config: ExportConfig, stack: AsyncExitStack, use_native: bool
    ) -> None:
        if config.id in self.exports:
            raise ConfigError(f"--export id={config.id}: this id is in use")
        threads = self._threads_for(config) if use_native else []
        node = self.graph.find(config.node_name)
        export = await Export.open(config, node, threads)
        stack.push_async_callback(export.close)
        self.exports[config.id] = export

    def _threads_for(self, config: ExportConfig) -> list[IOThread]:
        """The threads that an export names, or as many of its own as it asks for."""
        known = {thread.name: thread for thread in self._config.io_threads}
        threads = []
        for name in config.io_threads:
            if name not in known:
                raise ConfigError(f"--export id={config.id}: there is no iothread '{name}'")
            threads.append(self._thread(name, known[name].poll_max_ns))
        for number in range(config.own_threads if not threads else 0):
            threads.append(self._thread(f"{config.id}/{number}", IOThreadConfig("").poll_max_ns))
        return threads

    def _thread(self, name: str, poll_max_ns: int) -> IOThread:
        threads = self._owned.threads
        if name not in threads:
            threads[name] = IOThread(name, poll_max_ns=poll_max_ns)
        return threads[name]

    def _close_threads(self) -> None:
        for thread in self._owned.threads.values():
            thread.close()

    def _write_pid_file(self, path: Path, stack: AsyncExitStack) -> None:
        path = path.absolute()  # going to the background changes the directory
        path.write_text(f"{os.getpid()}\n")
        stack.callback(path.unlink, missing_ok=True)
