"""The daemon: owns the block graph, the engine threads and the exports; starts and stops them in order.

Start: block nodes, engine threads, exports, the pid file's lock, all sockets, then "ready"; with a sandbox the pid
file's lock comes first, because later it could not be made. Stop, at `stop()`: exports stop taking requests, drain and
flush; then nodes are closed, which releases their locks. Whatever fails at the start undoes what was done, and no
socket exists before all options were found right. A last flush that fails makes the end a failure, once everything has
been put away: whoever stops the daemon takes a good end to mean that all is on the disk.

Exports end side by side, so that one whose disk hangs keeps no other from its end. It is waited for, but not for ever:
after `shutdown_timeout` what hangs is named in the log and left to the kernel (docs/stalls.md).

Context: `run()` is the whole life, on one asyncio loop, in any thread. Two daemons in one process do not know of each
other; signals belong to the process, hence to whoever made the daemons (`cli.run`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from vhostblk import native
from vhostblk.block import activation
from vhostblk.block.crypto.secret import SecretConfig
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.graph import BlockGraph
from vhostblk.block.leaky_bucket import ThrottleLimits
from vhostblk.block.lock_wait import LockWait, StoppedError
from vhostblk.block.node import BlockNode
from vhostblk.block.reopen import acquire_write
from vhostblk.block.throttle_group import ThrottleGroup
from vhostblk.errors import BlockError, ConfigError, HangError, StateError
from vhostblk.export.device_watch import DeviceWatch
from vhostblk.export.events import OnEvent
from vhostblk.export.export import Export
from vhostblk.export.io_thread import IOThread
from vhostblk.export.options import ExportConfig
from vhostblk.export.stats_page import StatsPages
from vhostblk.export.vq_mapping import VqMapping, assign
from vhostblk.pid_file import PidFile
from vhostblk.sandbox.files import Places
from vhostblk.sandbox.sandbox import Sandbox

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
    secrets: Sequence[SecretConfig] = ()
    exports: Sequence[ExportConfig] = ()
    pid_file: Path | None = None
    data_path: str = "auto"  # auto, native or python
    lock_timeout: float = 0.0  # seconds to wait for images that other processes have
    shutdown_timeout: float = 0.0  # seconds that the end may take; 0: as long as it takes
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
        sandbox: of this process; whoever gives one has made the process for this daemon alone.
    """

    def __init__(
        self,
        config: DaemonConfig,
        on_ready: Callable[[], None] | None = None,
        on_event: OnEvent = lambda _event: None,
        sandbox: Sandbox | None = None,
    ) -> None:
        self._config = config
        self._sandbox = sandbox
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
        self._ended: set[str] = set()  # exports that are being closed, or are closed
        self._pid_file: PidFile | None = None
        self.graph = BlockGraph(config.drivers)
        self.graph.serves_guests = True
        self.exports: dict[str, Export] = {}
        """By id."""
        self._devices = DeviceWatch(self.graph, self.exports)

    def stop(self) -> None:
        """Make `run()` come to its orderly end."""
        self._stop.set()

    async def run(self) -> None:
        """Serve until stopped.

        Raises:
            ConfigError: an option is wrong; nothing is left behind.
            BlockError: a disk cannot be opened, or, after an orderly end, a last flush failed.
            OSError: a socket or the pid file cannot be made.
            HangError: something did not end in `shutdown_timeout`. It is still being waited for, in this loop: end the
                process without that.
        """
        self._use_native = self._choose_data_path()
        life = asyncio.create_task(self._live())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({life, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({life}, timeout=self._config.shutdown_timeout or None)
        except asyncio.CancelledError:
            life.cancel()
            await asyncio.wait({life})
            raise
        finally:
            stopping.cancel()
        if not life.done():
            await self._give_up()
        with suppress(StoppedError):
            life.result()
        if not self._is_durable:
            raise BlockError(errno.EIO, "what was written last may be lost: a flush failed")

    async def _live(self) -> None:
        locks = LockWait(self._config.lock_timeout, self._stop)
        if self._sandbox is not None:
            self._sandbox.enter()
        async with AsyncExitStack() as stack:
            stack.callback(self._pages.close)
            stack.push_async_callback(self._close_nodes)
            for group in self._config.throttle_groups:
                self.graph.throttle_groups[group.name] = ThrottleGroup(group.name, group.limits)
            for secret in self._config.secrets:
                with _told_by(f"--object secret,id={secret.name}"):
                    self.graph.secrets.add(secret)
            for options in self._config.blockdevs:
                with _told_by(self._config.blockdev_option):
                    await locks.attempt(partial(self.graph.add, options))
            pid_file = None
            stack.push_async_callback(self._devices.close)
            self._devices.nodes_came()
            if self._sandbox is not None:
                pid_file = self._take_pid_file(stack)
                await self._restrict_files(self._sandbox)
            if self._use_native:
                stack.push_async_callback(self._close_threads)
            for config in self._config.exports:
                with _told_by(self._export_option(config)):
                    await locks.attempt(partial(self._open_export, config, stack))
            if self._sandbox is None:
                pid_file = self._take_pid_file(stack)
            for export in self.exports.values():
                with _told_by(self._config.listen_option or self._export_option(export.config)):
                    export.listen()
            self._devices.start()
            for export in self.exports.values():
                export.start()
            if pid_file is not None:
                pid_file.write()
            if self._sandbox is not None:
                self._sandbox.restrict_system_calls()
            if self._on_ready is not None:
                self._on_ready()
            await self._stop.wait()
            log.info("stopping")
            await self._devices.close()
            await self._close_exports()

    def _take_pid_file(self, stack: AsyncExitStack) -> PidFile | None:
        if self._config.pid_file is None:
            return None
        pid_file = self._pid_file = PidFile(self._config.pid_file)
        stack.callback(pid_file.close)
        return pid_file

    async def _restrict_files(self, sandbox: Sandbox) -> None:
        """The images are open, and there are no engine threads yet, which have what this one has."""
        exports, pid_file = self._config.exports, self._config.pid_file
        for config in exports:
            self._pages.prepare(config.id, config.num_queues, is_native=self._use_native)
        await self.graph.end_threads()
        sandbox.restrict_files(
            self.graph.host_needs(),
            Places(
                tuple(config.socket_path for config in exports if config.socket_path is not None),
                pid_file.absolute() if pid_file is not None else None,
            ),
            gives_away=any(config.socket_access.gives_away for config in exports),
        )

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
            export.look_again()

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
        self._devices.nodes_came()

    async def change_medium(self, export: str, node_name: str, *, force: bool = False) -> None:
        """Exchange what an export shows; `force`: also while its guest uses it.

        Raises:
            ConfigError: see `Medium.change`; or there is no such export or node.
        """
        medium = self._find_export(export).medium
        await medium.change(self.graph, self.graph.find(node_name), force=force)
        self._devices.nodes_came()

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
        if node.inactive and not config.allow_inactive:
            # As QEMU: whoever does not say otherwise has the image from the beginning.
            await activation.activate(self.graph, [node])
        export = await Export.open(
            *(config, node, threads, self._pages, self._on_event),
            graph=self.graph if config.allow_inactive else None,
            lock_timeout=self._config.lock_timeout,
        )
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

    async def _close_exports(self) -> None:
        ends = [self._close_export(export) for export in self.exports.values()]
        for problem in await asyncio.gather(*ends, return_exceptions=True):
            if problem is not None:
                raise problem

    async def _close_export(self, export: Export) -> None:
        if export.config.id not in self._ended:
            self._ended.add(export.config.id)
            is_durable = await export.close()
            self._is_durable &= is_durable

    async def _close_nodes(self) -> None:
        is_durable = await self.graph.close_all()
        self._is_durable &= is_durable

    async def _give_up(self) -> NoReturn:
        """Name what hangs, and end what does not, which may take as long again."""
        left = [export for export in self.exports.values() if not export.is_closed]
        for export in left:
            export.abandon()
        if left:
            # Those of the others are closed; then it finds that the rest is in use.
            closing = asyncio.create_task(self._close_nodes())
            await asyncio.wait({closing}, timeout=self._config.shutdown_timeout)
            if closing.done() and not closing.cancelled():
                closing.exception()
        if self._pid_file is not None:
            self._pid_file.close()
        what = f"export {left[0].config.id}" if left else "an image"
        raise HangError(
            f"given up after {self._config.shutdown_timeout:g} s: {what} does not end; "
            "the kernel has what was in flight, and the image's lock until that is over"
        )

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
