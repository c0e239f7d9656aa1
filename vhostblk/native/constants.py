"""The numbers of `engine.h`; a test compares them with what the compiler says.

They are here, and not taken from the extension, because policy needs their names also where the
extension was not built. Knows nothing else.
"""

from __future__ import annotations

import enum

__all__ = [
    "FLUSH_MISS",
    "FLUSH_NOTHING",
    "LATENCY_BUCKETS",
    "Broken",
    "ExtentFlag",
    "IOOp",
    "MessageType",
    "Op",
    "QueueFd",
    "SUSPENDED",
    "RequestFlag",
]

FLUSH_MISS = -1
"""VB_FLUSH_SET: flushes go to control."""
FLUSH_NOTHING = -2
"""VB_FLUSH_SET: there is nothing to flush."""
SUSPENDED = -1
"""VB_COMPLETE: the request is not done, and stays in flight."""

LATENCY_BUCKETS = 160
"""Length of a latency histogram."""


class Op(enum.IntEnum):
    """`enum vb_op`: kinds of requests."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    WRITE_ZEROES = 4
    GET_ID = 5
    OTHER = 6


class MessageType(enum.IntEnum):
    """`enum vb_message_type`."""

    DISK_ATTACH = 1
    DISK_DETACH = 2
    MEMORY_SET = 3
    FLUSH_SET = 4
    MAP = 5
    REVOKE = 6
    QUEUE_START = 7
    QUEUE_STOP = 8
    QUEUE_ENABLE = 9
    QUEUE_FD = 10
    COMPLETE = 11
    RETRY = 12
    LOG_SET = 13
    QUEUE_LOG = 14
    ACK = 64
    REQUEST = 65
    QUEUE_BROKEN = 66
    IO_ERROR = 67


class Broken(enum.IntEnum):
    """`enum vb_broken`: why a queue is broken."""

    AVAIL_IDX = 1
    HEAD = 2
    CHAIN_LOOP = 3
    CHAIN_NEXT = 4
    INDIRECT = 5
    ADDRESS = 6
    ORDER = 7
    NO_STATUS = 8
    RING_ADDRESS = 9
    MEMORY_FAULT = 10
    LOG = 11


class ExtentFlag(enum.IntFlag):
    """`enum vb_extent_flag`."""

    READ = 1
    WRITE = 2
    ZERO = 4
    NULL = 8
    INLINE = 16
    POOL = 32
    FIXED = 64
    CACHED = 128


class QueueFd(enum.IntEnum):
    """`enum vb_queue_fd`."""

    KICK = 0
    CALL = 1
    ERR = 2


class IOOp(enum.IntEnum):
    """`enum vb_io_op`."""

    READ = 0
    WRITE = 1
    FDATASYNC = 2
    FALLOCATE = 3
    READ_MANY = 4
    WRITE_MANY = 5


class RequestFlag(enum.IntFlag):
    """`enum vb_request_flag`: what VB_REQUEST says of a request."""

    RETRIED = 1
    UNALIGNED = 2
    NEEDS_FLUSH = 4
    FAILED = 8
    FAULTED = 16
