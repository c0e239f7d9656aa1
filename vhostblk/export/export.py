"""An export: a block node offered on a socket, to one front-end at a time.

Life: `open` (permissions, locks), `listen`, `start`, any number of front-ends one after the other, `stop` (no more
clients, the one there is drained), `close` (flush, release). A second client is accepted and closed at once, with a
log line; a client that comes while its predecessor is still being drained waits for that.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Sequence
from typing import Any

from vhostblk.block import activation
from vhostblk.block.backend import BlockBackend
from vhostblk.block.graph import BlockGraph
from vhostblk.block.node import BlockNode
from vhostblk.block.op_blockers import OpType, check_op
from vhostblk.block.permissions import Perm, parents_first
from vhostblk.errors import BlockError, ConfigError, PeerError, StateError
from vhostblk.export.accounting import block_device_stats
from vhostblk.export.blk_device import BlkDevice
from vhostblk.export.data_path import DataPath
from vhostblk.export.error_log import ErrorLog
from vhostblk.export.error_policy import Action, IoStatus
from vhostblk.export.events import (
    BlockIOError,
    OnEvent,
    QueuesPaused,
    QueuesResumed,
)
from vhostblk.export.front_end import FrontEnd
from vhostblk.export.io_thread import IOThread
from vhostblk.export.medium import Medium
from vhostblk.export.native_path import NativeDataPath
from vhostblk.export.options import ExportConfig
from vhostblk.export.python_path import PythonDataPath
from vhostblk.export.statistics import QueueStatistics, describe, total
from vhostblk.export.stats_page import StatsPage, StatsPages
from vhostblk.vhost.transport import Listener

# How long to let things be when a client cannot be accepted for want of fds or memory, seconds.
_ACCEPT_RETRY = 0.2


class _Prefix(logging.LoggerAdapter[logging.Logger]):
    """Log lines say which export they are about."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        return f"export {self.extra['export']}: {msg}" if self.extra else msg, kwargs


class Export:
    """One export; made by `open`.

    Context: the control loop.
    Owns: the root edge of its node, the data path, the listener and the front-end.
    """

    def __init__(
        self,
        config: ExportConfig,
        backend: BlockBackend,
        threads: Sequence[IOThread],
        page: StatsPage,
        on_event: OnEvent,
    ) -> None:
        self.config = config
        self.log = _Prefix(logging.getLogger(__name__), {"export": config.id})
        self._errors = ErrorLog(self.log)
        # What front-ends and guests do wrong, per session: they could do it all day.
        self._offences = ErrorLog(self.log)
        self._backend = backend
        self._page = page
        self.device = BlkDevice(
            backend,
            serial=config.serial,
            num_queues=config.num_queues,
            max_segments=config.max_segments,
            logical_block_size=config.logical_block_size,
            errors=self._errors,
            policy=config.errors,
        )
        self.device.on_io_error = self._io_failed
        self.device.parking.paused = self._paused
        self._on_event = on_event
        self._handed_over: BlockGraph | None = None  # whose image somebody else has
        self._handing_over = asyncio.Lock()
        self._path: DataPath = (
            NativeDataPath(
                self.device,
                threads,
                self,
                page,
                queue_threads=config.queue_threads,
                pin_memory=config.pin_memory,
            )
            if threads
            else PythonDataPath(self.device, self, page)
        )
        self.medium = Medium(
            config.id,
            self.device,
            in_use=self._is_in_use,
            changed=self._medium_changed,
            emit=on_event,
        )
        self._listener: Listener | None = None
        self._front_end: FrontEnd | None = None
        self._serving: asyncio.Task[None] | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._resizing: asyncio.Task[None] | None = None
        self._resize_due = False

    @classmethod
    async def open(
        cls,
        config: ExportConfig,
        node: BlockNode,
        threads: Sequence[IOThread],
        pages: StatsPages | None = None,
        on_event: OnEvent = lambda _event: None,
    ) -> Export:
        """Take the node's permissions and get ready, without a socket yet.

        Args:
            threads: the engine threads that serve it; none: the Python data path does.
            pages: makes the statistics page; None: nobody outside can look.
            on_event: hears of what happens to the disk; called from the loop, must not raise.

        Raises:
            ConfigError: the permissions are taken, or an option does not fit the disk.
        """
        backend = BlockBackend(
            node,
            f"export '{config.id}'",
            writable=config.writable,
            write_cache=config.write_cache,
            # As QEMU's exports: what several guests do to one disk is theirs to agree on.
            shared=Perm.ALL,
        )
        page = (
            StatsPage.private(config.id, config.num_queues)
            if pages is None
            else pages.create(config.id, config.num_queues, is_native=bool(threads))
        )
        try:
            export = cls(config, backend, threads, page, on_event)
            await export._path.open()
        except BaseException:
            await backend.close()
            page.close()
            raise
        backend.attach(
            revoke=export._path.revoke,
            revoke_flush=export._path.revoke_flush,
            resized=export._resized,
            take_writes=export._path.take_writes,
        )
        return export

    def listen(self) -> None:
        """Open the socket; whoever connects waits for `start`.

        Raises:
            ConfigError: it cannot be listened on.
        """
        config = self.config
        if config.socket_path is not None:
            self._listener = Listener.bind(config.socket_path)
        else:
            assert config.fd is not None
            self._listener = Listener.adopt(config.fd)

    def start(self) -> None:
        """Serve whoever connects. `listen` comes first."""
        config = self.config
        assert self._listener is not None
        self.log.info(
            "%s, %d bytes, %s, %s, listening on %s",
            f"node '{config.node_name}'",
            self.device.capacity,
            "read-only" if self.device.read_only else "writable",
            self._path.description,
            config.socket_path or f"fd {config.fd}",
        )
        self._accepting = asyncio.create_task(self._accept(self._listener))

    async def stop(self) -> None:
        """No more clients; the one there is is hung up on, once what it asked for has completed."""
        if self._listener is not None:
            self._listener.close()
        if self._front_end is not None:
            self._front_end.disconnect()
        for task in (self._accepting, self._serving, self._resizing):
            if task is not None:
                await task

    async def close(self) -> bool:
        """Stop, make everything durable and let go of the node.

        Returns:
            False if the last flush failed; that is in the log.
        """
        await self.stop()
        # The backend's last drain and flush still need to know what the data path did.
        try:
            is_durable = await self._backend.close()
            await self._path.close()
        finally:
            self._page.unlink()
        self._errors.summarize()
        served = self.statistics()
        if served.requests:
            for line in describe(served):
                self.log.info("%s", line)
        self._page.close()  # not before: the engine writes to it as long as there are queues
        return is_durable

    def statistics(self) -> QueueStatistics:
        """What was served so far, all queues together."""
        return total(self._page.read().values())

    def block_stats(self) -> dict[str, Any]:
        """What was served so far as `BlockStats`, as `query-blockstats` of QEMU returns it for a device."""
        node = self._backend.node
        return {
            "device": self.config.id,
            "node-name": node.node_name,
            "stats": block_device_stats(self.statistics(), node.highest_offset()),
        }

    def refresh_size(self) -> None:
        """Look at the size of the disk again; the guest is told if it changed."""
        self._resize_due = True
        if self._resizing is None or self._resizing.done():
            self._resizing = asyncio.create_task(self._refresh_size())

    async def _refresh_size(self) -> None:
        # It may change once more while we look.
        while self._resize_due:
            self._resize_due = False
            try:
                await self._backend.node.refresh_length()
            except BlockError as exc:
                self.log.warning("cannot tell the size of the disk: %s", exc)

    def _resized(self, length: int) -> None:
        self.log.info("the disk has %d bytes now", self.device.capacity)
        self._path.set_capacity(self.device.capacity)
        if self._front_end is not None:
            self._front_end.config_changed()

    def _is_in_use(self) -> bool:
        return self._front_end is not None and self._front_end.is_running

    def _medium_changed(self) -> None:
        node = self._backend.node
        self.log.info("its disk is %s now", f"'{node.node_name}'" if node.node_name else "ejected")
        if self._front_end is not None:
            self._front_end.config_changed()

    async def move(self, threads: Sequence[IOThread], queue_threads: Sequence[int] = ()) -> None:
        """Have other engine threads serve it, also while it is used; its front-end notices nothing (row B27).

        Waits for the requests in flight. Not inside a drained section, which holds them up. Goes on to its end even
        if whoever waits for it is cancelled.

        Args:
            queue_threads: for each queue, the number of its thread; empty: they take turns.

        Raises:
            ConfigError: see `DataPath.move`, or somebody blocks it; all is as before.
        """
        check_op(self.device.backend.node, OpType.DATAPLANE)
        if self.config.fixed_iothread:
            raise ConfigError(f"Export '{self.config.id}' has fixed-iothread=on", errno.EPERM)
        moving = asyncio.create_task(self._path.move(threads, queue_threads))
        try:
            await asyncio.shield(moving)
        except asyncio.CancelledError:
            await asyncio.wait([moving])
            if not moving.cancelled():
                moving.exception()  # nobody is left to be told
            raise
        except ConfigError as exc:
            reason = f"Export '{self.config.id}' cannot move: {exc}"
            raise ConfigError(reason, exc.errno) from None
        names = ", ".join(thread.name for thread in threads)
        self.log.info("moved to %s: %s", names, self._path.description)

    # ------------------------------------------------------------------ images that change hands (row B40)

    async def inactivate(self, graph: BlockGraph) -> None:
        """Give the image up to another process: what was written is on the disk, its locks are free.

        The next queue that is started takes it back, or `activate`.

        Raises:
            ConfigError: the guest uses it, or it cannot be given up; nothing has changed.
        """
        async with self._handing_over:
            if self._is_in_use():
                raise ConfigError(f"Export '{self.config.id}' is in use: queues run", errno.EBUSY)
            await activation.inactivate(graph, self._nodes())
            self._handed_over = graph
        self.log.info("its image is given up")

    async def activate(self, graph: BlockGraph) -> None:
        """Take the image back. Does nothing if it is ours.

        Raises:
            ConfigError: somebody else has it, or it cannot be read.
        """
        async with self._handing_over:
            await activation.activate(graph, self._nodes())
            self._handed_over = None
        # Whoever had it may have changed its size.
        if self._front_end is not None:
            self._front_end.config_changed()

    def _nodes(self) -> list[BlockNode]:
        return parents_first([self._backend.node])

    async def _activate(self) -> None:
        async with self._handing_over:
            graph = self._handed_over
        if graph is not None:
            try:
                await self.activate(graph)
            except ConfigError as exc:
                raise PeerError(f"the image belongs to somebody else: {exc}") from None

    # ------------------------------------------------------------------ errors of the disk

    @property
    def io_status(self) -> IoStatus:
        """Why the queues are paused; `OK` while they are not."""
        return self.device.parking.status

    def resume(self) -> int:
        """Try again what the disk has failed, and take requests again; returns how many were waiting.

        Does nothing unless an error has paused the queues.
        """
        return self.device.parking.resume()

    def _io_failed(self, is_read: bool, action: Action, error: int) -> None:
        operation, reason = "read" if is_read else "write", os.strerror(error)
        has_status = self.config.errors.has_status
        self._on_event(
            BlockIOError(
                self.config.id,
                self._backend.node.node_name,
                operation,
                action,
                error == errno.ENOSPC if has_status else None,
                reason,
            )
        )
        if action is Action.STOP and not self.device.parking.is_paused:
            self.log.warning("a %s failed: %s: its queues are paused", operation, reason)

    def _paused(self, paused: bool) -> None:
        self._path.pause(paused)
        self._on_event(QueuesPaused(self.config.id) if paused else QueuesResumed(self.config.id))
        if not paused:
            self.log.info("its queues go on")

    # ------------------------------------------------------------------ front-ends

    async def _accept(self, listener: Listener) -> None:
        while True:
            try:
                connection = await listener.accept()
            except StateError:
                return
            except OSError as exc:
                self._errors.record(f"cannot accept a client: {exc.strerror}")
                await asyncio.sleep(_ACCEPT_RETRY)
                continue
            if self._serving is not None and not self._serving.done():
                assert self._front_end is not None
                if not self._front_end.is_leaving:
                    connection.close()
                    self._offences.record("refused a second front-end: one is connected")
                    continue
                await self._serving
            if listener.fileno() < 0:
                connection.close()
                return
            self._front_end = FrontEnd(
                connection,
                self.device,
                self._path,
                self.config.num_queues,
                self.log,
                self._offences,
                self._activate,
            )
            self._serving = asyncio.create_task(self._serve(self._front_end))

    async def _serve(self, front_end: FrontEnd) -> None:
        self.log.info("a front-end has connected")
        self._page.front_end_came()
        try:
            await front_end.run()
        except Exception:
            self.log.exception("a bug: the session died")
        finally:
            self._front_end = None
            self._page.front_end_left()
            self._offences.summarize()
        self.log.info("the front-end has left")

    # ------------------------------------------------------------------ DataPathEvents

    def queue_broken(self, index: int, reason: str) -> None:
        """Log it: the front-end has been told through the queue's error fd."""
        self._offences.record(f"queue {index}: broken by the guest", f": {reason}")

    def queue_lost(self, reason: str) -> None:
        """The session cannot go on without it; the next one may find room again."""
        self.log.error("the session ends: %s", reason)
        if self._front_end is not None:
            self._front_end.disconnect()

    def memory_faulted(self) -> None:
        """The session cannot go on in memory that is gone."""
        self._offences.record("the front-end truncated the memory it shares: the session ends")
        if self._front_end is not None:
            self._front_end.disconnect()
