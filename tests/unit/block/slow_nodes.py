"""Nodes whose requests take time wherever the tests keep their files, for models of what is under way."""

from __future__ import annotations

import asyncio
import dataclasses

from tests.unit.block.fakes import CowNode, NoOptions
from vhostblk.block.driver import OpenContext
from vhostblk.block.drivers import host_file
from vhostblk.block.drivers.file import FileNode
from vhostblk.block.drivers.memory import MemoryNode
from vhostblk.block.options import NodeOptions
from vhostblk.block.roles import Role

SIZE = 8192


def _slow(file: host_file.HostFile) -> host_file.HostFile:
    """As on a disk: requests take time, and there is a cache."""
    return dataclasses.replace(file, in_memory=False)


class SlowFile(FileNode):
    """A file whose I/O suspends, wherever the tests keep their files."""

    def _adopt(self, file: host_file.HostFile) -> None:
        super()._adopt(_slow(file))
        self._at_once = None  # what is in the page cache is nothing to rely on


class DirectFile(SlowFile):
    """The same in whole blocks, as with O_DIRECT, which not every file system has; its memory may be anywhere."""

    driver_name = "direct-file"

    def _adopt(self, file: host_file.HostFile) -> None:
        super()._adopt(dataclasses.replace(file, request_alignment=512))


class SlowMemory(MemoryNode):
    """The same for memory."""

    def _adopt(self, file: host_file.HostFile) -> None:
        super()._adopt(_slow(file))


class Overlay(CowNode):
    """A layer in clusters, over a base."""

    driver_name = "overlay"
    child_keys = ("backing",)

    def __init__(self, name: str, common: NodeOptions, options: NoOptions) -> None:
        super().__init__(None, SIZE, 512, common=common)
        self.node_name = name
        self.pause = _some_turns

    async def open(self, context: OpenContext) -> None:
        await context.open_child(self, "backing", Role.COW)


async def _some_turns() -> None:
    await asyncio.sleep(0)
