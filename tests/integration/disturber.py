"""Takes back extents of an export that is in use, in every way that the block graph has, and lets them be mapped again.

Between two disturbances it waits until the front-end has got some requests through, so that there is something to take
back. What happens when, is decided by a seeded generator; what the front-end does meanwhile is not, so that a seed
repeats the kind of a run, not its interleaving.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.integration.wandering_node import WanderingNode
from vhostblk.block.backend import BlockBackend
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode
from vhostblk.block.permissions import Perm
from vhostblk.export.export import Export
from vhostblk.vhost.action import WriteConfig
from vhostblk.virtio.blk import WRITEBACK_OFFSET

__all__ = ["Disturber"]

_MAX_REQUESTS_DURABLE = 30
_MAX_GROWTH = 64
_LOOK = 0.0005  # seconds
_GROWTH = 1 << 20


class Disturber:
    """See the module.

    Args:
        export: whose extents.
        image: the file at the bottom.
        seed: of the choices.

    Context: the control loop.
    """

    def __init__(self, export: Export, image: Path, seed: int) -> None:
        self.done: Counter[str] = Counter()
        """How often, by name."""
        self.span = export.device.capacity
        """Bytes at the beginning of the disk that are in use."""
        self.only = ""
        """Nothing else is done; empty: everything."""
        self.pause = 0
        """Requests between two disturbances, at most."""
        self._export = export
        self._image = image
        self._choice = random.Random(seed)
        self._node = export.device.backend.node
        self._chain = _chain(self._node)
        self._grown = 0
        self._kinds: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "range revoked": (30, self._revoke_range),
            "all revoked": (10, self._revoke_all),
            "drained": (6, self._drain),
            "write cache toggled": (4, self._toggle_write_cache),
            "grown": (3, self._grow),
            "flushed by another": (4, self._flush),
            "read by another": (4, self._read),
        }
        if isinstance(self._node, WanderingNode):
            self._kinds["moved"] = (60, self._move)

    async def disturb(self, is_over: Callable[[], bool]) -> None:
        """Do it again and again.

        Args:
            is_over: whether the front-end has ended, or is about to.
        """
        names = list(self._kinds)
        weights = [self._kinds[name][0] for name in names]
        while not is_over():
            if self._is_connected:
                name = self.only or self._choice.choices(names, weights)[0]
                await self._kinds[name][1]()
                self.done[name] += 1
            await self._progress(self._choice.randrange(self.pause + 1))

    @property
    def _is_connected(self) -> bool:
        return self._export._front_end is not None

    async def _progress(self, requests: int) -> None:
        """Wait until so many more were served; not if there is nobody to make them."""
        wanted = self._export.statistics().requests + requests
        await asyncio.sleep(_LOOK)
        # The engine counts, and tells nobody.
        while self._is_connected and self._export.statistics().requests < wanted:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK)

    def _some_node(self) -> BlockNode:
        return self._choice.choice(self._chain)

    async def _revoke_range(self) -> None:
        node = self._some_node()
        length = 1 << self._choice.randrange(9, node.length.bit_length())
        await node.revoke(self._choice.randrange(self.span), length)

    async def _revoke_all(self) -> None:
        node = self._some_node()
        await node.revoke(0, node.length)

    async def _drain(self) -> None:
        node = self._some_node()
        await node.drained_begin()
        for _ in range(self._choice.randrange(5)):
            await asyncio.sleep(0)
        node.drained_end()

    async def _toggle_write_cache(self) -> None:
        """As the guest does, but it is we who speak for it. Not for long: every write waits for the disk then."""
        for on in (False, True):
            front_end = self._export._front_end
            if front_end is not None:
                await front_end._perform(WriteConfig(WRITEBACK_OFFSET, bytes([on]), False))
                await self._progress(self._choice.randrange(_MAX_REQUESTS_DURABLE))

    async def _grow(self) -> None:
        if self._grown < _MAX_GROWTH:
            self._grown += 1
            os.truncate(self._image, self._image.stat().st_size + _GROWTH)
            await self._node.refresh_length()

    async def _flush(self) -> None:
        """Another user of the disk flushes: the engine loses the right to do it alone for a while."""
        visitor = BlockBackend(self._node, "a visitor", writable=True, shared=Perm.ALL)
        await visitor.flush()
        await visitor.close()

    async def _read(self) -> None:
        visitor = BlockBackend(self._node, "a visitor", writable=False, shared=Perm.ALL)
        block = 4096
        offset = self._choice.randrange(visitor.length // block) * block
        await visitor.preadv(offset, IoVec.of(bytearray(block)))
        await visitor.close()

    async def _move(self) -> None:
        """Several at the same time: some meet, or wait for the same requests."""
        assert isinstance(self._node, WanderingNode)
        count = self._choice.randrange(1, 4)
        await asyncio.gather(*(self._node.move(self._choice, self.span) for _ in range(count)))


def _chain(node: BlockNode) -> list[BlockNode]:
    found = [node]
    while found[-1].children:
        found.append(next(iter(found[-1].children.values())).node)
    return found
