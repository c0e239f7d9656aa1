"""What a qcow2 image is like, in QMP's words (`ImageInfoSpecificQCow2`, row B41.6).

A header and a directory of bitmaps in, names and values out. Knows nothing about files.
"""

from __future__ import annotations

from typing import Any

from vhostblk.block.drivers.qcow2.bitmaps import BitmapDirectory, BitmapEntry, BitmapFlag
from vhostblk.block.drivers.qcow2.header import (
    AutoClear,
    Compatible,
    Compression,
    Header,
    Incompatible,
)

_BITMAP_FLAGS = {BitmapFlag.IN_USE: "in-use", BitmapFlag.AUTO: "auto"}


def qcow2_facts(
    header: Header, directory: BitmapDirectory, encryption: dict[str, Any] | None = None
) -> dict[str, Any]:
    """All that there is to say; of version 2 that is little.

    Args:
        encryption: what there is to say of that; None: there is none.
    """
    encrypted = {} if encryption is None else {"encrypt": encryption}
    refcount_bits = 1 << header.refcount_order
    compression = Compression(header.compression).name.lower()
    if header.version < 3:
        return {
            "compat": "0.10",
            "refcount-bits": refcount_bits,
            **encrypted,
            "compression-type": compression,
        }
    facts: dict[str, Any] = {"compat": "1.1"}
    if header.data_file_name:
        facts["data-file"] = header.data_file_name
    if header.has_data_file:
        facts["data-file-raw"] = bool(header.autoclear & AutoClear.RAW_DATA_FILE)
    facts |= {
        "extended-l2": header.has_subclusters,
        "lazy-refcounts": bool(header.compatible & Compatible.LAZY_REFCOUNTS),
        "corrupt": bool(header.incompatible & Incompatible.CORRUPT),
        "refcount-bits": refcount_bits,
        **encrypted,
    }
    if directory.bitmaps:
        facts["bitmaps"] = [_bitmap(bitmap) for bitmap in directory.bitmaps]
    facts["compression-type"] = compression
    return facts


def _bitmap(bitmap: BitmapEntry) -> dict[str, Any]:
    flags = [word for flag, word in _BITMAP_FLAGS.items() if bitmap.flags & flag]
    return {"name": bitmap.name, "granularity": bitmap.granularity, "flags": flags}
