"""Formats of disk images that have no driver here, but must not be taken for raw bytes.

Whoever opens such an image without saying its format would see the image's own structure as a disk; and a guest whose
disk was guessed to be raw could write such a beginning, and have QEMU open files of the host for it the next time.
What is recognised, and by what, is what QEMU's drivers look at.

Bytes in, names out. Knows nothing about drivers.
"""

from __future__ import annotations

import re

__all__ = ["NAMES", "QEMU_DRIVERS", "foreign_format"]

# Where, what, which format.
_MAGIC = (
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"QED\0", "qed"),
    (0, b"QFI\xfb\0\0\0\1", "qcow"),
    (0, b"WithoutFreeSpace\2\0\0\0", "parallels"),
    (0, b"WithouFreSpacExt\2\0\0\0", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
)
# A text that names the files that have the disk; comments come first.
_VMDK_DESCRIPTOR = rb"(?:#[^\n]*\n| *\r?\n)*version=[123]\r?\n"

NAMES = frozenset({*(name for _, _, name in _MAGIC), "dmg"})
"""All of them."""

QEMU_DRIVERS = NAMES | {
    *("blklogwrites", "blkverify", "ftp", "ftps", "gluster", "http", "https", "iscsi", "iser"),
    *(
        "nbd",
        "nfs",
        "null-aio",
        "nvme",
        "preallocate",
        "quorum",
        "rbd",
        "replication",
        "ssh",
        "vvfat",
    ),
}
"""What QEMU has drivers for and we have not: names that make sense to others."""


def foreign_format(header: bytes, filename: str = "") -> str:
    """The format of content that begins like this; empty: it is none of them.

    Args:
        header: 512 bytes, or all there are.
        filename: what it is called; says it of formats that have their signature at the end.
    """
    for offset, magic, name in _MAGIC:
        if header.startswith(magic, offset):
            return name
    if re.match(_VMDK_DESCRIPTOR, header):
        return "vmdk"
    return "dmg" if filename.endswith(".dmg") else ""
