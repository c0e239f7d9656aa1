"""A disk that is open for one test, with the graph around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

from vhostblk.block.backend import BlockBackend
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode
from vhostblk.errors import BlockError, ConfigError

Scenario = Callable[[BlockBackend], Awaitable[None]]
REFUSALS: tuple[type[BlockError | ConfigError], ...] = (BlockError, ConfigError)
"""What says no with an errno."""


def with_disk(add: Callable[[BlockGraph], Awaitable[BlockNode]], scenario: Scenario) -> None:
    """Open a node, run with a user of it that may do what the node may, close everything."""

    async def everything() -> None:
        async with opened(add) as backend:
            await scenario(backend)

    asyncio.run(everything())


@asynccontextmanager
async def opened(
    add: Callable[[BlockGraph], Awaitable[BlockNode]],
) -> AsyncGenerator[BlockBackend]:
    """Open a node for a user of it that may do what the node may; closes everything."""
    graph = BlockGraph()
    try:
        node = await add(graph)
        writable = not node.read_only
        backend = BlockBackend(node, "the test", writable=writable, resize=writable)
        try:
            yield backend
        finally:
            await backend.close()
    finally:
        await graph.close_all()


async def read(backend: BlockBackend, offset: int, length: int) -> bytes:
    """All of it."""
    data = bytearray(b"\xee" * length)
    await backend.preadv(offset, IoVec.of(data))
    return bytes(data)
