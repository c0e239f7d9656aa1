"""Protocol and format drivers, one node class per file; `DRIVERS` has them and the filters (block layer row B03).

A driver is imported when it is used.
"""

from __future__ import annotations

from types import MappingProxyType

from vhostblk.block.driver_table import DriverPlace, DriverTable

DRIVERS = DriverTable(
    MappingProxyType(
        {
            "file": DriverPlace("vhostblk.block.drivers.file", "FileNode", protocol="file"),
            "host_device": DriverPlace(
                "vhostblk.block.drivers.file",
                "HostDeviceNode",
                protocol="host_device",
                devices=True,
            ),
            "host_cdrom": DriverPlace(
                "vhostblk.block.drivers.file", "HostCdromNode", protocol="host_cdrom", devices=True
            ),
            "luks": DriverPlace(
                "vhostblk.block.drivers.luks",
                "LuksNode",
                signatures=((0, b"LUKS\xba\xbe\0\1"),),
            ),
            "memory": DriverPlace("vhostblk.block.drivers.memory", "MemoryNode"),
            "nbd": DriverPlace(
                "vhostblk.block.drivers.nbd",
                "NbdNode",
                protocol="nbd",
                more_protocols=("nbd+tcp", "nbd+unix"),
            ),
            "null-co": DriverPlace("vhostblk.block.drivers.null", "NullNode", protocol="null-co"),
            "qcow2": DriverPlace(
                "vhostblk.block.drivers.qcow2", "Qcow2Node", signatures=((0, b"QFI\xfb"),)
            ),
            # Anything may be raw.
            "raw": DriverPlace("vhostblk.block.drivers.raw", "RawNode", signatures=((0, b""),)),
            "snapshot-access": DriverPlace(
                "vhostblk.block.drivers.snapshot_access", "SnapshotAccessNode"
            ),
            "blkdebug": DriverPlace(
                "vhostblk.block.filters.blkdebug", "BlkdebugNode", protocol="blkdebug"
            ),
            "compress": DriverPlace("vhostblk.block.filters.compress", "CompressNode"),
            "copy-before-write": DriverPlace(
                "vhostblk.block.filters.copy_before_write", "CopyBeforeWriteNode"
            ),
            "copy-on-read": DriverPlace("vhostblk.block.filters.copy_on_read", "CopyOnReadNode"),
            "throttle": DriverPlace("vhostblk.block.filters.throttle", "ThrottleNode"),
        }
    )
)
