"""Arguments and counters of queues, and the contents of the requests they hand up.

`struct vb_queue_config`, `struct vb_queue_stats`, `struct vb_iov`, `struct vb_segment`. Knows
nothing of what asks for a queue.
"""

from __future__ import annotations

import struct
from typing import Any

from vhostblk.native.binding import ADDRESS_SPACE, IOV, address_of, engine, ffi, pointer_of
from vhostblk.native.constants import LATENCY_BUCKETS
from vhostblk.native.disk import Disk

__all__ = [
    "QueueConfig",
    "QueueStats",
    "iov_views",
    "latency_bound",
    "queue_config",
    "segments",
]

_SEGMENT = struct.Struct("=QQQ")


def latency_bound(bucket: int) -> int:
    """Lower bound of a bucket of a latency histogram, in ns."""
    return int(engine().vb_latency_bound(bucket))


def iov_views(pointer: int, count: int, length: int) -> list[memoryview]:
    """The data of a VB_REQUEST as writable views; valid until the request is given back."""
    memory = ADDRESS_SPACE
    if count == 1:  # as most have
        return [memory[pointer : pointer + length]]
    table = memory[pointer : pointer + count * IOV.size]
    return [memory[address : address + size] for address, size in IOV.iter_unpack(table)]


def segments(pointer: int, count: int) -> list[tuple[int, int, bool]]:
    """The segments of a DISCARD or WRITE_ZEROES: offset, length, and whether it may unmap."""
    table = ADDRESS_SPACE[pointer : pointer + count * _SEGMENT.size]
    return [
        (offset, length, bool(flags & 1)) for offset, length, flags in _SEGMENT.iter_unpack(table)
    ]


class QueueStats:
    """Counters that one queue's engine thread writes, in memory of ours.

    Args:
        buffer: where they are, `SIZE` zeroed bytes, aligned to 8, for instance in shared memory; None: own memory.
            It must outlive the queue.
    """

    SIZE = 8 * (7 * (5 + LATENCY_BUCKETS) + 6 + 7 + 2)
    """Bytes of `struct vb_queue_stats`."""

    def __init__(self, buffer: Any = None) -> None:
        engine()
        self._buffer = buffer if buffer is not None else ffi.new("struct vb_queue_stats *")
        self._stats = (
            self._buffer
            if buffer is None
            else ffi.from_buffer("struct vb_queue_stats *", buffer, require_writable=True)
        )

    @property
    def pointer(self) -> int:
        """For `queue_config`."""
        return pointer_of(self._stats)


class QueueConfig:
    """A `struct vb_queue_config`; keep it until VB_QUEUE_START is acknowledged."""

    def __init__(self, struct_: Any, keep: tuple[object, ...]) -> None:
        self._struct = struct_
        self._keep = keep

    @property
    def pointer(self) -> int:
        """For VB_QUEUE_START."""
        return pointer_of(self._struct)


def queue_config(
    *,
    disk: Disk,
    stats: QueueStats,
    desc_uva: int,
    avail_uva: int,
    used_uva: int,
    size: int,
    index: int,
    base: int = 0,
    enabled: bool = True,
    event_idx: bool = False,
    indirect: bool = False,
    packed: bool = False,
    kick_fd: int = -1,
    call_fd: int = -1,
    err_fd: int = -1,
    inflight: memoryview | None = None,
    log_gpa: int | None = None,
) -> QueueConfig:
    """Build the argument of VB_QUEUE_START; see `struct vb_queue_config`."""
    engine()
    config = ffi.new("struct vb_queue_config *")
    config.disk = ffi.cast("struct vb_disk *", disk.pointer)
    config.stats = ffi.cast("struct vb_queue_stats *", stats.pointer)
    config.desc_uva, config.avail_uva, config.used_uva = desc_uva, avail_uva, used_uva
    config.size, config.index, config.base = size, index, base
    config.enabled, config.event_idx, config.indirect = enabled, event_idx, indirect
    config.packed = packed
    config.kick_fd, config.call_fd, config.err_fd = kick_fd, call_fd, err_fd
    config.logged, config.log_gpa = log_gpa is not None, log_gpa or 0
    if inflight is not None:
        config.inflight, config.inflight_size = address_of(inflight), len(inflight)
    return QueueConfig(config, (disk, stats, inflight))
