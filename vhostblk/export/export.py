"""An export: a block node offered on a socket, to one front-end at a time.

Life: `open` (permissions, locks), `listen`, `start`, any number of front-ends one after the other, `stop` (no more
clients, the one there is drained), `close` (flush, release). Who is let in is reception.py's.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

from vhostblk.block.backend import BlockBackend
from vhostblk.block.graph import BlockGraph
from vhostblk.block.node import BlockNode
from vhostblk.block.op_blockers import OpType, check_op
from vhostblk.block.permissions import Perm, parents_first
from vhostblk.errors import BlockError, ConfigError
from vhostblk.export.accounting import block_device_stats
from vhostblk.export.again import Again
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
from vhostblk.export.front_end import LOG_LOST, FrontEnd
from vhostblk.export.io_thread import IOThread
from vhostblk.export.medium import Medium
from vhostblk.export.native_path import NativeDataPath
from vhostblk.export.options import ExportConfig
from vhostblk.export.ownership import Ownership
from vhostblk.export.python_path import PythonDataPath
from vhostblk.export.reception import Reception
from vhostblk.export.stall_watch import StallWatch
from vhostblk.export.statistics import QueueStatistics, describe, total
from vhostblk.export.stats_page import StatsPage, StatsPages
from vhostblk.vhost.transport import Connection


class _Prefix(logging.LoggerAdapter[logging.Logger]):
    """Log lines say which export they are about."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        return f"export {self.extra['export']}: {msg}" if self.extra else msg, kwargs


class Export:
    """One export; made by `open`.

    Context: the control loop.
    Owns: the root edge of its node, the data path, the reception.
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
        self._ownership: Ownership
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
        self._stalls = StallWatch(
            config.stall_warning, page.in_flight, lambda: self.device.parking.is_paused, self.log
        )
        self._reception = Reception(
            config, self._new_front_end, self, self.log, self._errors, self._offences
        )
        self.is_closed = False
        """Nothing is left of it."""
        self._looking = Again(self._refresh_size)

    @classmethod
    async def open(
        cls,
        config: ExportConfig,
        node: BlockNode,
        threads: Sequence[IOThread],
        pages: StatsPages | None = None,
        on_event: OnEvent = lambda _event: None,
        *,
        graph: BlockGraph | None = None,
        lock_timeout: float = 0.0,
    ) -> Export:
        """Take the node's permissions and get ready, without a socket yet.

        Args:
            threads: the engine threads that serve it; none: the Python data path does.
            pages: makes the statistics page; None: nobody outside can look.
            on_event: hears of what happens to the disk; called from the loop, must not raise.
            graph: the node's, for exports that have the image only while queues run.
            lock_timeout: how long such a one waits for it, seconds.

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
            export._ownership = Ownership(
                *(backend, config.id, export.log, export._is_in_use),
                graph=graph,
                lock_timeout=lock_timeout,
            )
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
        self._reception.listen()

    def start(self) -> None:
        """Serve whoever connects. `listen` comes first."""
        config = self.config
        self.log.info(
            "%s, %d bytes, %s, %s, listening on %s",
            f"node '{config.node_name}'",
            self.device.capacity,
            "read-only" if self.device.read_only else "writable",
            self._path.description,
            config.socket_path or f"fd {config.fd}",
        )
        self._reception.start()

    async def stop(self) -> None:
        """No more clients; the one there is is hung up on, once what it asked for has completed."""
        self._ownership.stop()
        await self._reception.stop()
        await self._looking.wait()

    @property
    def _front_end(self) -> FrontEnd | None:
        return self._reception.front_end

    def _new_front_end(self, connection: Connection) -> FrontEnd:
        return FrontEnd(
            connection,
            self.device,
            self._path,
            self.config.num_queues,
            self.log,
            self._offences,
            self._ownership,
        )

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
        self.is_closed = True
        return is_durable

    def abandon(self) -> None:
        """Say what a `close` that does not end leaves behind. The process ends without waiting for it."""
        in_flight, oldest = self._page.in_flight()
        if in_flight:
            reason = (
                f"{in_flight} requests are in flight, one for {(time.monotonic_ns() - oldest) / 1e9:.1f} s; the guest "
                "was not told that they are done"
            )
        else:
            reason = "its disk is not flushed; what was written last may be lost"
        self.log.error("given up: %s", reason)
        self._page.unlink()

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

    def look_again(self) -> None:
        """Look at the disk again: the guest is told if its size has changed, and what has paused is resumed then."""
        self._looking.ask()

    async def _refresh_size(self) -> None:
        try:
            await self._backend.node.refresh_length()
        except BlockError as exc:
            self.log.warning("cannot tell the size of the disk: %s", exc)
        # Not before: requests behind a new end are to find that out, and not what the disk says there.
        self.resume()

    def has_room(self, node: BlockNode) -> None:
        """A device has grown, whose node this is: requests that wait for room there are tried again."""
        if self.io_status is IoStatus.NOSPACE and node in parents_first([self._backend.node]):
            self.log.info("node '%s' has grown", node.node_name)
            self.resume()

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
        """See `Ownership.inactivate`."""
        await self._ownership.inactivate(graph)

    async def activate(self, graph: BlockGraph) -> None:
        """See `Ownership.activate`."""
        await self._ownership.activate(graph)
        # Whoever had it may have changed its size.
        if self._front_end is not None:
            self._front_end.config_changed()

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

    # ------------------------------------------------------------------ Visitors

    def front_end_came(self) -> None:
        """Count it, and look after its requests."""
        self._page.front_end_came()
        self._stalls.start()

    def front_end_left(self) -> None:
        """It has none any more."""
        self._page.front_end_left()
        self._stalls.stop()

    # ------------------------------------------------------------------ DataPathEvents

    def queue_broken(self, index: int, reason: str) -> None:
        """Log it: the front-end has been told through the queue's error fd."""
        self._offences.record(f"queue {index}: broken by the guest", f": {reason}")
        if self._front_end is not None:
            self._front_end.queue_broken(index)

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

    def log_lost(self) -> None:
        """A front-end that migrates the guest would lose what the guest has read: it must know."""
        self._offences.record(f"{LOG_LOST}: the session ends")
        if self._front_end is not None:
            self._front_end.disconnect()
