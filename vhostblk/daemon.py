"""The daemon: owns the block graph, the engine threads and the exports; starts and stops them in order.

Start: block nodes, engine threads, exports, the pid file's lock, all sockets, then "ready". Stop, at `stop()`: exports
stop taking requests, drain and flush; then nodes are closed, which releases their locks. Whatever fails at the start
undoes what was done, and no socket exists before all options were found right. A last flush that fails makes the end a
failure, once everything has been put away: whoever stops the daemon takes a good end to mean that all is on the disk.

Context: `run()` is the whole life, on one asyncio loop, in any thread. Two daemons in one process do not know of each
other; signals belong to the process, hence to whoever made the daemons (`cli.run`).
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vhostblk import native
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.graph import BlockGraph
from vhostblk.block.leaky_bucket import ThrottleLimits
from vhostblk.block.node import BlockNode
from vhostblk.block.reopen import acquire_write
from vhostblk.block.throttle_group import ThrottleGroup
from vhostblk.errors import BlockError, ConfigError, StateError
from vhostblk.export.events import OnEvent
from vhostblk.export.export import Export
from vhostblk.export.io_thread import IOThread
from vhostblk.export.options import ExportConfig
from vhostblk.export.stats_page import StatsPages
from vhostblk.export.vq_mapping import VqMapping, assign

log = logging.getLogger(__name__)

# qemu-storage-daemon's
DEFAULT_POLL_MAX_NS = 32768
MAX_OWN_THREADS = 64
"""Engine threads of exports that name no iothread: each costs fds, memory, and time at the end."""


@dataclass(frozen=True, slots=True)
class IOThreadConfig:
    """`--object iothread,id=ID`; the others are those of `native.EngineThread`."""

    name: str
    poll_max_ns: int = DEFAULT_POLL_MAX_NS
    poll_grow: int = 0
    poll_shrink: int = 2


@dataclass(frozen=True, slots=True)
class ThrottleGroupConfig:
    """`--object throttle-group,id=ID`: a budget that nodes of the `throttle` driver share."""

    name: str
    limits: ThrottleLimits


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """All a daemon is told at the start."""

    blockdevs: Sequence[dict[str, Any]] = ()
    io_threads: Sequence[IOThreadConfig] = ()
    throttle_groups: Sequence[ThrottleGroupConfig] = ()
    exports: Sequence[ExportConfig] = ()
    pid_file: Path | None = None
    data_path: str = "auto"  # auto, native or python
    drivers: Mapping[str, type[BlockNode]] = field(default_factory=lambda: DRIVERS)
    # What the user calls these, for messages; empty where the message says enough.
    blockdev_option: str = ""
    export_option: str = ""
    listen_option: str = ""


class Daemon:
    """One daemon.

    Args:
        config: what to serve.
        on_ready: called once when every export listens.
        on_event: hears of what happens to the disks of exports; called from the loop, must not raise.
    """

    def __init__(
        self,
        config: DaemonConfig,
        on_ready: Callable[[], None] | None = None,
        on_event: OnEvent = lambda _event: None,
    ) -> None:
        self._config = config
        self._on_ready = on_ready
        self._on_event = on_event
        self._stop = asyncio.Event()
        self._threads: dict[str, IOThread] = {}
        self._own: list[IOThreadConfig] = []  # for those that name none
        self._own_of: dict[str, list[IOThreadConfig]] = {}  # by id of the export
        self._next_shared = 0
        self._use_native = False
        self._pages = StatsPages()
        self._is_durable = True
        self.graph = BlockGraph(config.drivers)
        self.exports: dict[str, Export] = {}
        """By id."""

    def stop(self) -> None:
        """Make `run()` come to its orderly end."""
        self._stop.set()

    async def run(self) -> None:
        """Serve until stopped.

        Raises:
            ConfigError: an option is wrong; nothing is left behind.
            BlockError: a disk cannot be opened, or, after an orderly end, a last flush failed.
            OSError: a socket or the pid file cannot be made.
        """
        self._use_native = self._choose_data_path()
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._close_nodes)
            for group in self._config.throttle_groups:
                self.graph.throttle_groups[group.name] = ThrottleGroup(group.name, group.limits)
            for options in self._config.blockdevs:
                await self._open_node(options)
            if self._use_native:
                stack.push_async_callback(self._close_threads)
            for config in self._config.exports:
                with _told_by(self._export_option(config)):
                    await self._open_export(config, stack)
            pid_file = None
            if self._config.pid_file is not None:
                pid_file = _PidFile(self._config.pid_file)
                stack.callback(pid_file.close)
            for export in self.exports.values():
                with _told_by(self._config.listen_option or self._export_option(export.config)):
                    export.listen()
            for export in self.exports.values():
                export.start()
            if pid_file is not None:
                pid_file.write()
            if self._on_ready is not None:
                self._on_ready()
            await self._stop.wait()
            log.info("stopping")
            await asyncio.gather(*(export.stop() for export in self.exports.values()))
        if not self._is_durable:
            raise BlockError(errno.EIO, "what was written last may be lost: a flush failed")

    async def _open_node(self, options: dict[str, Any]) -> None:
        with _told_by(self._config.blockdev_option):
            await self.graph.add(options)

    def _export_option(self, config: ExportConfig) -> str:
        option = self._config.export_option
        return f"{option} id={config.id}" if option else ""

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

    def look_again(self) -> None:
        """Look at the disks again: guests are told of sizes that changed; what has paused on an error is resumed."""
        for export in self.exports.values():
            export.refresh_size()
            export.resume()

    async def remove_medium(self, export: str, *, force: bool = False) -> None:
        """Take the disk out of an export; `force`: also while its guest uses it.

        Raises:
            ConfigError: see `Medium.remove`; or there is no such export.
        """
        await self._find_export(export).medium.remove(self.graph, force=force)

    async def insert_medium(self, export: str, node_name: str) -> None:
        """Put a node into an export that has none.

        Raises:
            ConfigError: see `Medium.insert`; or there is no such export or node.
        """
        await self._find_export(export).medium.insert(self.graph, self.graph.find(node_name))

    async def change_medium(self, export: str, node_name: str, *, force: bool = False) -> None:
        """Exchange what an export shows; `force`: also while its guest uses it.

        Raises:
            ConfigError: see `Medium.change`; or there is no such export or node.
        """
        medium = self._find_export(export).medium
        await medium.change(self.graph, self.graph.find(node_name), force=force)

    async def inactivate(self, export: str) -> None:
        """Give the image of an export up to another process; the next queue that starts takes it back.

        Raises:
            ConfigError: see `Export.inactivate`; or there is no such export.
        """
        await self._find_export(export).inactivate(self.graph)

    async def activate(self, export: str) -> None:
        """Take the image of an export back.

        Raises:
            ConfigError: see `Export.activate`; or there is no such export.
        """
        await self._find_export(export).activate(self.graph)

    async def move(self, export: str, mapping: Sequence[VqMapping] = ()) -> None:
        """Have other iothreads serve an export, also while it is used; its front-end notices nothing.

        Args:
            mapping: as `iothread-vq-mapping`; empty: threads of its own.

        Raises:
            ConfigError: see `Export.move`; there is no such export or iothread, or the mapping is wrong.
        """
        found = self._find_export(export)
        if self._stop.is_set():
            raise ConfigError("the daemon is being stopped", errno.ESHUTDOWN)
        io_threads, queue_threads = assign(tuple(mapping), found.config.num_queues)
        config = replace(found.config, io_threads=io_threads, queue_threads=queue_threads)
        threads = self._threads_for(config) if self._use_native else []
        await found.move(threads, queue_threads)

    def _find_export(self, name: str) -> Export:
        if name not in self.exports:
            raise ConfigError(f"Export '{name}' does not exist", errno.ENODEV)
        return self.exports[name]

    async def _open_export(self, config: ExportConfig, stack: AsyncExitStack) -> None:
        if config.id in self.exports:
            raise ConfigError("this id is in use")
        for other in self.exports.values():
            if config.fd is not None and config.fd == other.config.fd:
                raise ConfigError(f"fd {config.fd} is used by export '{other.config.id}'")
        threads = self._threads_for(config) if self._use_native else []
        node = self.graph.find(config.node_name)
        if config.writable:
            await acquire_write(self.graph, node)
        export = await Export.open(config, node, threads, self._pages, self._on_event)
        stack.push_async_callback(self._close_export, export)
        self.exports[config.id] = export

    def _threads_for(self, config: ExportConfig) -> list[IOThread]:
        """The threads that an export names, or as many of its own as it asks for and there may be."""
        known = {thread.name: thread for thread in self._config.io_threads}
        for name in config.io_threads:
            if name not in known:
                raise ConfigError(f'IOThread "{name}" object does not exist')
        wanted = [known[name] for name in config.io_threads] or self._own_threads(config)
        return [self._thread(thread) for thread in wanted]

    def _own_threads(self, config: ExportConfig) -> list[IOThreadConfig]:
        """New ones; from `MAX_OWN_THREADS` on those of the exports before, in turn. The same, if it had some."""
        if config.id not in self._own_of:
            self._own_of[config.id] = self._choose_own_threads(config)
        return self._own_of[config.id]

    def _choose_own_threads(self, config: ExportConfig) -> list[IOThreadConfig]:
        count = config.own_threads
        if not self._own or len(self._own) + count <= MAX_OWN_THREADS:
            fresh = [IOThreadConfig(f"{config.id}/{number}") for number in range(count)]
            self._own += fresh
            return fresh
        if not self._next_shared:
            log.info("export %s and later ones share %d engine threads", config.id, len(self._own))
        first, self._next_shared = self._next_shared, self._next_shared + count
        count = min(count, len(self._own))
        return [self._own[(first + number) % len(self._own)] for number in range(count)]

    def _thread(self, config: IOThreadConfig) -> IOThread:
        if config.name not in self._threads:
            self._threads[config.name] = IOThread(
                config.name,
                poll_max_ns=config.poll_max_ns,
                poll_grow=config.poll_grow,
                poll_shrink=config.poll_shrink,
            )
        return self._threads[config.name]

    async def _close_export(self, export: Export) -> None:
        self._is_durable &= await export.close()

    async def _close_nodes(self) -> None:
        self._is_durable &= await self.graph.close_all()

    async def _close_threads(self) -> None:
        # Side by side: the kernel makes each wait for a while, and could do so for all of them together.
        await asyncio.gather(*(self._close_thread(thread) for thread in self._threads.values()))

    async def _close_thread(self, thread: IOThread) -> None:
        try:
            await thread.close()
        except StateError:
            # A bug, but not the one that brought us here: that one is to be told.
            log.exception("a bug: %s", thread.name)


@contextmanager
def _told_by(option: str) -> Iterator[None]:
    """A wrong option is told of together with the option it came by."""
    try:
        yield
    except ConfigError as exc:
        raise ConfigError(f"{option}: {exc}" if option else str(exc)) from None
    except OSError as exc:
        # Out of descriptors, or of memory: that it happened here says how many there can be.
        if not option or exc.errno is None:
            raise
        raise BlockError(exc.errno, f"{option}: {exc.strerror}") from None


class _PidFile:
    """The file that says which process the daemon is.

    Made, and locked against other daemons, before anything listens; written when everything does. One that a killed
    daemon left behind has no lock, and is used again.

    Raises:
        ConfigError: it cannot be written, is no regular file, or belongs to a daemon that runs.

    Owns: the file, until `close()` removes it.
    """

    def __init__(self, path: Path) -> None:
        self._name = str(path)
        self._path = path.absolute()  # going to the background changes the directory
        self._fd = -1
        while self._fd < 0:
            self._take()

    def _take(self) -> None:
        try:
            # Never wait for a FIFO's other end.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            fd = os.open(self._path, flags, 0o644)
        except OSError as exc:
            raise ConfigError(f"--pidfile {self._name}: {exc.strerror}") from None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigError(f"--pidfile {self._name}: not a regular file")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(self._path)):
                    self._fd = fd
        except BlockingIOError:
            raise ConfigError(f"--pidfile {self._name}: belongs to a daemon that runs") from None
        finally:
            # Its former owner may have removed it just now: then the path needs a new file.
            if self._fd < 0:
                os.close(fd)

    def write(self) -> None:
        """Say who we are.

        Raises:
            ConfigError: the disk is full.
        """
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as exc:
            raise ConfigError(f"--pidfile {self._name}: {exc.strerror}") from None

    def close(self) -> None:
        """Remove it, unless somebody else has put another one there."""
        with suppress(OSError):
            if os.path.samestat(os.fstat(self._fd), os.stat(self._path)):
                self._path.unlink()
        os.close(self._fd)
