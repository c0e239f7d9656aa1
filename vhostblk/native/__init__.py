"""The engine as Python sees it.

`engine.h` is the contract; names here are its names. Handles are objects that own what C gave them
and end with `close()`. Messages are plain tuples in the order of `struct vb_message`, because
hundreds of thousands of them go by in a second.

Knows nothing of vhost-user, of virtio, of block nodes, nor of asyncio.

Where the extension was not built (`available` is False) everything that needs it raises
`StateError`; the rest of vhostblk then moves data in Python.
"""

from __future__ import annotations

from vhostblk.native.binding import ADDRESS_SPACE, address_of, available, io_uring_error
from vhostblk.native.constants import (
    FLUSH_MISS,
    FLUSH_NOTHING,
    LATENCY_BUCKETS,
    SUSPENDED,
    Broken,
    ExtentFlag,
    IOOp,
    MessageType,
    Op,
    QueueFd,
    RequestFlag,
)
from vhostblk.native.dirty import DirtyMap
from vhostblk.native.disk import Disk, Extents, extents
from vhostblk.native.guest_memory import Memory, Region
from vhostblk.native.host_io import HostIO, IOPart, IORequest
from vhostblk.native.memory_log import MemoryLog
from vhostblk.native.queues import (
    QueueConfig,
    QueueStats,
    iov_views,
    latency_bound,
    queue_config,
    segments,
)
from vhostblk.native.scan import count_steps, zero_blocks
from vhostblk.native.thread import EngineThread, Message, packed, packed_completion, packed_retry

__all__ = [
    "ADDRESS_SPACE",
    "FLUSH_MISS",
    "FLUSH_NOTHING",
    "SUSPENDED",
    "LATENCY_BUCKETS",
    "Broken",
    "DirtyMap",
    "Disk",
    "EngineThread",
    "ExtentFlag",
    "Extents",
    "HostIO",
    "IOOp",
    "IOPart",
    "IORequest",
    "Memory",
    "MemoryLog",
    "Message",
    "MessageType",
    "Op",
    "QueueConfig",
    "QueueFd",
    "QueueStats",
    "Region",
    "RequestFlag",
    "address_of",
    "available",
    "count_steps",
    "extents",
    "io_uring_error",
    "iov_views",
    "latency_bound",
    "packed",
    "packed_completion",
    "packed_retry",
    "queue_config",
    "segments",
    "zero_blocks",
]
