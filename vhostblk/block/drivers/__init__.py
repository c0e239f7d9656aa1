"""Protocol and format drivers, one node class per file; `DRIVERS` is the registry (block layer row B03)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from vhostblk.block.drivers.file import FileNode, HostDeviceNode
from vhostblk.block.drivers.memory import MemoryNode
from vhostblk.block.drivers.null import NullNode
from vhostblk.block.drivers.raw import RawNode
from vhostblk.block.node import BlockNode

DRIVERS: Mapping[str, type[BlockNode]] = MappingProxyType(
    {
        driver.driver_name: driver
        for driver in (FileNode, HostDeviceNode, MemoryNode, NullNode, RawNode)
    }
)
