"""Flags of requests, of block status and of open nodes: QEMU's names and values (block layer row B02).

The values matter only inside, and in logs, tests and documentation that people compare. `OpenFlag` is how a node was
opened, in one number; what a user asks for are options (row C7), and `modes.py` derives the flags from them.
"""

from __future__ import annotations

import enum


class Req(enum.IntFlag):
    """Request flags (row B02). APIs take plain integers: the arithmetic of IntFlag is slow."""

    NONE = 0
    COPY_ON_READ = 0x001
    ZERO_WRITE = 0x002
    MAY_UNMAP = 0x004
    REGISTERED_BUF = 0x008
    FUA = 0x010
    WRITE_COMPRESSED = 0x020
    WRITE_UNCHANGED = 0x040
    SERIALISING = 0x080
    NO_FALLBACK = 0x100
    PREFETCH = 0x200
    NO_WAIT = 0x400
    MASK = 0x7FF


class StatusFlag(enum.IntFlag):
    """Status bits (row B02)."""

    DATA = 0x01
    ZERO = 0x02
    OFFSET_VALID = 0x04
    RAW = 0x08  # of drivers: ask `file` at `map` instead
    ALLOCATED = 0x10  # only here: the layer has it
    EOF = 0x20  # only here: the answer reaches the end of the node
    RECURSE = 0x40  # of drivers: `file` may know of zeroes
    COMPRESSED = 0x80


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


class Preallocation(enum.Enum):
    """What a node that grows does about its new part (row B31.4); the values are the words that users write."""

    OFF = "off"
    METADATA = "metadata"  # a format's tables, but not the data
    FALLOC = "falloc"  # room, without writing it
    FULL = "full"  # zeroes are written
