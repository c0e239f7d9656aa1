"""Where requests in flight are tracked for whoever serves the rings next: layout, and what front-ends say of it.

vhost-user, "Inflight I/O tracking", "Inflight description", GET_INFLIGHT_FD, SET_INFLIGHT_FD.

A region has one part for each queue, in order, and behind them what `device_note` says; the parts have one
size, which follows from the size of the largest ring and from the rings' format, and begin at multiples
of 64 bytes. All fields are in the machine's byte order. libvhost-user, SPDK and others have the same
layout for the same rings, so a back-end can go on where another one was killed.

The front-end keeps the file, and may do with it what it likes. Here it is only checked that the
parts are inside of it, and fit the rings; what a part contains is looked at by the tracker of the
data path that starts the ring.

Knows nothing about sockets, mappings, rings and requests.
"""

from __future__ import annotations

import struct

from vhostblk.errors import PeerError
from vhostblk.vhost.device_note import NOTE_SIZE
from vhostblk.vhost.payload import InflightDescription
from vhostblk.vhost.vring import MAX_RING_SIZE

__all__ = [
    "MAX_PARTS",
    "PACKED_ENTRY",
    "PACKED_HEADER",
    "SPLIT_ENTRY",
    "SPLIT_HEADER",
    "VERSION",
    "VERSION_OFFSET",
    "InflightState",
    "part_size",
]

SPLIT_HEADER = struct.Struct("=QHHHH")
"""QueueRegionSplit: features, version, desc_num, last_batch_head, used_idx."""
SPLIT_ENTRY = struct.Struct("=B5xHQ")
"""DescStateSplit: inflight, next, counter."""
PACKED_HEADER = struct.Struct("=QHHHHHHBB10x")
"""QueueRegionPacked: features, version, desc_num, free_head, old_free_head, used_idx, old_used_idx,
used_wrap_counter, old_used_wrap_counter."""
PACKED_ENTRY = struct.Struct("=BxHHHQHHIQ")
"""DescStatePacked: inflight, next, last, num, counter, id, flags, len, addr."""

VERSION = 1
"""0 is a part that was never used, or whose device was reset."""
VERSION_OFFSET = 8
"""Of the version in either header: 16 bits."""

MAX_PARTS = 256
_ALIGNMENT = 64
_WORD = 8  # the widest field


def part_size(queue_size: int, *, packed: bool) -> int:
    """Bytes of each queue's part, for rings of up to `queue_size` entries."""
    header, entry = (PACKED_HEADER, PACKED_ENTRY) if packed else (SPLIT_HEADER, SPLIT_ENTRY)
    return -(-(header.size + queue_size * entry.size) // _ALIGNMENT) * _ALIGNMENT


class InflightState:
    """What the front-end has said about its region.

    Context: the session.
    """

    def __init__(self) -> None:
        self.description: InflightDescription | None = None
        """As SET_INFLIGHT_FD had it; None: requests are not tracked."""
        self.note: int | None = None
        """Where the region has room for a `DeviceNote`, behind the rings' parts."""

    @staticmethod
    def answer(asked: InflightDescription, *, packed: bool) -> InflightDescription:
        """Give the reply to GET_INFLIGHT_FD; a size of 0 is a refusal, and goes without a file."""
        size = 0
        if _is_possible(asked):
            size = asked.num_queues * part_size(asked.queue_size, packed=packed) + NOTE_SIZE
        return InflightDescription(size, 0, asked.num_queues, asked.queue_size, asked.is_padded)

    def adopt(self, description: InflightDescription, *, packed: bool) -> None:
        """Take what SET_INFLIGHT_FD says.

        Raises:
            PeerError: that is impossible, misaligned, or too small; all is as before.
        """
        if not _is_possible(description):
            raise PeerError(
                f"an in-flight region for {description.num_queues} queues of"
                f" {description.queue_size}: 1 to {MAX_PARTS} of 1 to {MAX_RING_SIZE} are possible"
            )
        if description.mmap_offset % _WORD:
            raise PeerError(f"an in-flight region that begins at {description.mmap_offset:#x}")
        needed = description.num_queues * part_size(description.queue_size, packed=packed)
        largest = MAX_PARTS * part_size(MAX_RING_SIZE, packed=True) + NOTE_SIZE
        if not needed <= description.mmap_size <= largest:
            raise PeerError(
                f"an in-flight region of {description.mmap_size} bytes, {needed} are needed"
            )
        self.description = description
        end = description.mmap_size // _WORD * _WORD - NOTE_SIZE
        self.note = end if end >= needed else None

    def part(self, index: int, ring_size: int, *, packed: bool) -> range | None:
        """Say which bytes of the region are a ring's; None: it is not tracked.

        Raises:
            PeerError: the region has no room for this ring.
        """
        region = self.description
        if region is None:
            return None
        size = part_size(region.queue_size, packed=packed)
        # The driver may make rings shorter than the device offers them, and then less is used.
        if index >= region.num_queues or ring_size > region.queue_size:
            raise PeerError(
                f"vring {index} of {ring_size}: the in-flight region is for"
                f" {region.num_queues} of up to {region.queue_size}"
            )
        end = region.mmap_size if self.note is None else self.note
        if (index + 1) * size > end:  # the format was another when it was described
            raise PeerError(f"vring {index}: the in-flight region ends before its part")
        return range(index * size, (index + 1) * size)

    def versions(self, *, packed: bool) -> tuple[int, ...]:
        """Say where the parts' versions are: zeroed, the parts count as never used."""
        region = self.description
        if region is None:
            return ()
        size = part_size(region.queue_size, packed=packed)
        count = min(region.num_queues, region.mmap_size // size)
        return tuple(index * size + VERSION_OFFSET for index in range(count))


def _is_possible(description: InflightDescription) -> bool:
    return 1 <= description.num_queues <= MAX_PARTS and 1 <= description.queue_size <= MAX_RING_SIZE
