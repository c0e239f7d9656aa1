"""Bits that are named in the block layer's documentation but live in options here (block layer row B02).

`OpenFlag` is how a node was opened, in one number: for logs, messages and tests. What a user asks for are options
(row C7); `modes.py` derives the flags from them.
"""

from __future__ import annotations

import enum


class OpenFlag(enum.IntFlag):
    """How a node is open; values are those of QEMU's BDRV_O_*. 0x40 was the write cache once, and stays free."""

    NO_SHARE = 0x0001
    RDWR = 0x0002
    RESIZE = 0x0004
    SNAPSHOT = 0x0008
    TEMPORARY = 0x0010
    NOCACHE = 0x0020
    NATIVE_AIO = 0x0080
    NO_BACKING = 0x0100
    NO_FLUSH = 0x0200
    COPY_ON_READ = 0x0400
    INACTIVE = 0x0800
    CHECK = 0x1000
    ALLOW_RDWR = 0x2000
    UNMAP = 0x4000
    PROTOCOL = 0x8000
    NO_IO = 0x10000
    AUTO_RDONLY = 0x20000
    IO_URING = 0x40000
    CBW_DISCARD_SOURCE = 0x80000
    CACHE_MASK = NOCACHE | NO_FLUSH


class CheckMode(enum.IntFlag):
    """What a consistency check may repair."""

    FIX_LEAKS = 1
    FIX_ERRORS = 2
