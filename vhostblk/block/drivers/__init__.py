"""Protocol and format drivers, one node class per file; `DRIVERS` has them and the filters (block layer row B03)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from vhostblk.block.drivers.file import FileNode, HostDeviceNode
from vhostblk.block.drivers.memory import MemoryNode
from vhostblk.block.drivers.null import NullNode
from vhostblk.block.drivers.qcow2 import Qcow2Node
from vhostblk.block.drivers.raw import RawNode
from vhostblk.block.drivers.snapshot_access import SnapshotAccessNode
from vhostblk.block.filters import FILTERS
from vhostblk.block.node import BlockNode

_ALL: tuple[type[BlockNode], ...] = (
    *(FileNode, HostDeviceNode, MemoryNode, NullNode, Qcow2Node, RawNode, SnapshotAccessNode),
    *FILTERS,
)
DRIVERS: Mapping[str, type[BlockNode]] = MappingProxyType(
    {driver.driver_name: driver for driver in _ALL}
)
