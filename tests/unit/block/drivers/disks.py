"""A file opened as a disk, for one test."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers.file import FileNode
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec

Scenario = Callable[[BlockBackend, FileNode], Awaitable[None]]


def with_file(path: Path, scenario: Scenario, **options: Any) -> None:
    """Open a file as a disk, run, close everything."""

    async def everything() -> None:
        graph = BlockGraph()
        try:
            node = await graph.add(
                {"driver": "file", "node-name": "d", "filename": str(path), "discard": "unmap"}
                | options
            )
            assert isinstance(node, FileNode)
            backend = BlockBackend(
                node, "the test", writable=not node.read_only, resize=not node.read_only
            )
            try:
                await scenario(backend, node)
            finally:
                await backend.close()
        finally:
            await graph.close_all()

    asyncio.run(everything())


async def read(backend: BlockBackend, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xee" * length)
    await backend.preadv(offset, IoVec.of(buffer))
    return bytes(buffer)
