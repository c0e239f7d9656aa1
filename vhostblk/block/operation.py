"""A user of a node that works on its image, and may do so while everybody else is held (commit, rebase; later, jobs).

Knows nothing about what the work is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from vhostblk.block import pipeline
from vhostblk.block.backend import BlockBackend
from vhostblk.block.edge import Edge
from vhostblk.block.node import BlockNode
from vhostblk.block.permissions import Perm
from vhostblk.block.quiesce import drained, wake
from vhostblk.block.transaction import GraphTransaction

Report = Callable[[int, int], None]
"""Told how far some work is: bytes that are done, and all."""


class Pace:
    """Keeps long work at a speed, and lets everybody else have a turn, also where nothing has to be waited for.

    Args:
        speed: most bytes a second; 0: any number.
    """

    def __init__(self, speed: int = 0) -> None:
        self._speed = speed
        self._due = time.monotonic()

    async def spent(self, count: int) -> None:
        """Wait as long as so many bytes may take."""
        if not self._speed:
            await asyncio.sleep(0)
            return
        # What was not used before is not used later either.
        self._due = max(self._due, time.monotonic()) + count / self._speed
        await asyncio.sleep(self._due - time.monotonic())


class Operation(BlockBackend):
    """One user's view of a node, which is about this node: it does not move when the graph is rebuilt.

    Args:
        name: what is being done, for messages.
        perm, shared: what it does, and what others may do meanwhile.

    Raises:
        ConfigError: the permissions are not to be had.

    Context: the control loop.
    Owns: its edge, until `close()`.
    """

    def __init__(self, node: BlockNode, name: str, perm: Perm, shared: Perm) -> None:
        self._own_drains = 0
        super().__init__(node, name, writable=False, shared=shared)
        self.root.stays = True
        try:
            with GraphTransaction() as change:
                change.ask(self.root, perm, shared)
        except BaseException:
            self.root.detach()
            raise
        self.writable = bool(perm & Perm.WRITE)

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Nobody else has anything in flight in the node, nor uses its extents, inside `async with`; we may."""
        self._own_drains += 1
        try:
            async with drained(self.node):
                yield
        finally:
            self._own_drains -= 1

    async def prefetch(self, offset: int, length: int) -> None:
        """What the layer does not have there it has, with the same bytes, when this returns; others write meanwhile.

        Raises:
            BlockError: as `pipeline.prefetch`.
        """
        if not length:
            return
        await self.resumed()
        self.in_flight += 1
        try:
            await pipeline.prefetch(self.node, offset, length)
        finally:
            self.leave()

    async def finish(self) -> None:
        """`close`, also for whoever is cancelled meanwhile, and learns that afterwards."""
        cancelled: asyncio.CancelledError | None = None
        closed = False
        while not closed:
            try:
                await self.close()
                closed = True
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    async def resumed(self) -> None:
        """Return when no drain but our own holds requests."""
        while self.quiesced > self._own_drains:
            waiter = asyncio.get_running_loop().create_future()
            self._queued.append(waiter)
            await waiter

    def child_drained_end(self, edge: Edge) -> None:
        """Let requests go on."""
        super().child_drained_end(edge)
        queued, self._queued = self._queued, []
        wake(queued)
