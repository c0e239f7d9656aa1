"""Whose an export's image is: images that change hands between daemons (row B40), as at live migration.

An export has its image from the beginning to the end. One that may be *inactive* (`allow-inactive`) has it only
while queues run: the first queue that starts takes it, which waits for whoever is about to let go of it; when the last
one has stopped it is given up, before the front-end hears of the stop. At migration the source's queues have stopped
before the destination's start, so each daemon has what it needs when it needs it, and nobody has to tell them.

Knows nothing about queues, but that they are about to start, or have stopped.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from functools import partial

from vhostblk.block import activation
from vhostblk.block.backend import BlockBackend
from vhostblk.block.graph import BlockGraph
from vhostblk.block.lock_wait import LockWait, StoppedError
from vhostblk.block.permissions import parents_first
from vhostblk.errors import ConfigError, PeerError

Log = logging.LoggerAdapter[logging.Logger]


class Ownership:
    """See the module.

    Args:
        backend: the export's view of the image.
        name: of the export.
        is_in_use: whether queues run.
        graph: that the image is in, for exports that have it only while queues run; None: it is theirs until somebody
            asks for it.
        lock_timeout: how long to wait for an image that somebody else has, seconds.

    Context: the control loop.
    """

    def __init__(
        self,
        backend: BlockBackend,
        name: str,
        log: Log,
        is_in_use: Callable[[], bool],
        *,
        graph: BlockGraph | None = None,
        lock_timeout: float = 0.0,
    ) -> None:
        self._backend = backend
        self._name = name
        self._log = log
        self._is_in_use = is_in_use
        self._graph = graph
        self._lock_timeout = lock_timeout
        self._handed_over = (
            graph if backend.node.inactive else None
        )  # whose image somebody else has
        self._changing = asyncio.Lock()
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Nobody needs the image any more: do not wait for it."""
        self._stopping.set()

    async def inactivate(self, graph: BlockGraph) -> None:
        """Give the image up to another process: what was written is on the disk, its locks are free.

        The next queue that is started takes it back, or `activate`.

        Raises:
            ConfigError: the guest uses it, or somebody else here does, or it cannot be given up; nothing has changed.
        """
        async with self._changing:
            if self._is_in_use():
                raise ConfigError(f"Export '{self._name}' is in use: queues run", errno.EBUSY)
            await activation.inactivate(graph, [self._backend.node], self._backend.root)
            self._handed_over = graph
        self._log.info("its image is given up")

    async def activate(self, graph: BlockGraph) -> None:
        """Take the image back. Does nothing if it is ours.

        Raises:
            ConfigError: somebody else has it, or it cannot be read.
        """
        async with self._changing:
            await activation.activate(graph, parents_first([self._backend.node]))
            self._handed_over = None

    async def before_queues(self) -> None:
        """A queue is about to start: the image is ours when this returns.

        Raises:
            PeerError: somebody else has it, and has not let go of it in time; or it cannot be read.
        """
        async with self._changing:
            graph = self._handed_over
        if graph is None:
            return
        try:
            wait = LockWait(self._lock_timeout, self._stopping)
            await wait.attempt(partial(self.activate, graph))
        except ConfigError as exc:
            raise PeerError(f"the image belongs to somebody else: {exc}") from None
        except StoppedError:
            raise PeerError("the export is being stopped") from None
        self._log.info("its image is taken back")

    async def after_queues(self) -> None:
        """No queue runs any more: another daemon may want the image for the same guest."""
        if self._graph is None or self._handed_over is not None:
            return
        try:
            await self.inactivate(self._graph)
        except ConfigError as exc:
            self._log.warning("the image cannot be given up: %s", exc)
