"""A file opened as a disk, for one test."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.disks import read, with_disk
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers.file import FileNode

__all__ = ["read", "with_file"]

Scenario = Callable[[BlockBackend, FileNode], Awaitable[None]]


def with_file(path: Path, scenario: Scenario, **options: Any) -> None:
    """Open a file as a disk, run, close everything."""
    file = {"driver": "file", "node-name": "d", "filename": str(path), "discard": "unmap"}

    async def with_node(backend: BlockBackend) -> None:
        assert isinstance(backend.node, FileNode)
        await scenario(backend, backend.node)

    with_disk(lambda graph: graph.add(file | options), with_node)
