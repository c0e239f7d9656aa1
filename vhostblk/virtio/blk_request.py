"""What a descriptor chain asks of a block device: chain in, checked request out.

VIRTIO 1.2 §5.2.6. Sans-io: no disk is known here, only its capacity and limits. This is the only
place where 512-byte sectors exist; what comes out counts in bytes.

The rules, in the order in which they are looked at. The engine's request code has the same list;
whichever rule fails first names the status, nothing of a refused request is executed:

1. The status is the last writable byte, wherever it is (§2.7.4.1). None, or not in guest memory:
   nothing can be answered, the queue is broken (`Broken.NO_STATUS`, `Broken.ADDRESS`).
2. Any other buffer that is not in guest memory: IOERR, nothing is looked at. The header is the
   first 16 readable bytes, in any framing, copied once. Fewer: IOERR.
3. A type that is not implemented: UNSUPP.
4. OUT, DISCARD or WRITE_ZEROES on a read-only device: IOERR (§5.2.6.2).
5. IN, OUT: data not a multiple of 512 bytes, or more than 2147483136 of them: IOERR. Any byte at
   or beyond the capacity: IOERR.
6. DISCARD, WRITE_ZEROES: data empty or not a multiple of 16 bytes: IOERR. More segments than
   offered: UNSUPP. Then, segment by segment: an unknown flag, or unmap in a DISCARD: UNSUPP
   (§5.2.6.2); any byte at or beyond the capacity: IOERR.
7. FLUSH and GET_ID have no rules: FLUSH ignores data, GET_ID gives what fits, at most 20 bytes.

Not enforced, because real devices never did: the reserved word of the header, sector 0 in FLUSH,
readable bytes that IN does not need and writable ones that OUT does not need, `max_*_sectors` of a
segment (more work for us than promised, but no harm).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vhostblk.errors import GuestError
from vhostblk.virtio.blk import (
    HEADER,
    SECTOR,
    SEGMENT,
    SEGMENT_F_UNMAP,
    RequestType,
    Status,
)
from vhostblk.virtio.chain import Broken, DescriptorChain, copy_from, slice_views, total

__all__ = ["BlkRequest", "Segment", "parse"]

_IN, _OUT, _FLUSH = int(RequestType.IN), int(RequestType.OUT), int(RequestType.FLUSH)
_GET_ID = int(RequestType.GET_ID)
_DISCARD, _WRITE_ZEROES = int(RequestType.DISCARD), int(RequestType.WRITE_ZEROES)
# The most that one request may move: what fits into an int, as sectors. The kernel and the block layer have the same.
_MAX_TRANSFER = 0x7FFF_FFFF // SECTOR * SECTOR
_MODIFYING = frozenset((_OUT, _DISCARD, _WRITE_ZEROES))
_IMPLEMENTED = frozenset((_IN, _OUT, _FLUSH, _GET_ID, _DISCARD, _WRITE_ZEROES))


class Segment(NamedTuple):
    """One range of a DISCARD or WRITE_ZEROES request, inside the capacity."""

    offset: int
    """Bytes."""
    length: int
    """Bytes; may be 0."""
    unmap: bool
    """The device may deallocate the range; WRITE_ZEROES only."""


@dataclass(slots=True)
class BlkRequest:
    """A request, checked; or one that was refused, with `status` saying how."""

    head: int
    """The chain's name in the used ring."""
    status_byte: memoryview
    """Where the status goes: one byte of guest memory."""
    type: int = -1
    """RequestType, or whatever the driver wrote; -1 if it did not write that much."""
    offset: int = 0
    """Bytes; IN and OUT."""
    length: int = 0
    """Bytes of `data`."""
    data: Sequence[memoryview] = ()
    """IN, GET_ID: to be filled. OUT: to be written. Live guest memory."""
    segments: Sequence[Segment] = ()
    """DISCARD, WRITE_ZEROES."""
    status: Status | None = None
    """Set: refused, complete it with this and do nothing."""
    is_incomplete: bool = False
    """Refused because some of it is not in guest memory."""

    def complete(self, status: int, written: int = 0) -> int:
        """Write the status byte.

        Args:
            status: a `Status`.
            written: bytes of `data` that were written, for IN and GET_ID.

        Returns:
            The length to push to the used ring: after a failure nothing is vouched for but the
            status.
        """
        self.status_byte[0] = status
        return 1 if status else written + 1


def parse(
    chain: DescriptorChain, *, capacity: int, read_only: bool = False, max_segments: int = 1
) -> BlkRequest:
    """Find out what `chain` asks.

    Args:
        chain: from a virtqueue of the device.
        capacity: bytes of the disk, a multiple of 512.
        read_only: requests that modify are refused.
        max_segments: segments that a DISCARD or WRITE_ZEROES may have; 0 where neither is offered.

    Raises:
        GuestError: there is no status byte (rule 1).
    """
    writable = chain.writable
    if not writable:
        if chain.is_incomplete:
            raise GuestError(f"chain {chain.head}: its end is not in memory", Broken.ADDRESS)
        raise GuestError(f"chain {chain.head}: no status byte", Broken.NO_STATUS)
    last = writable[-1]
    request = BlkRequest(chain.head, last[-1:])
    if chain.is_incomplete:
        request.is_incomplete = True
        request.status = Status.IOERR
        return request
    readable = chain.readable
    header = copy_from(readable, HEADER.size)
    if len(header) < HEADER.size:
        request.status = Status.IOERR
        return request
    kind, _reserved, sector = HEADER.unpack(header)
    request.type = kind
    if kind not in _IMPLEMENTED:
        request.status = Status.UNSUPP
    elif read_only and kind in _MODIFYING:
        request.status = Status.IOERR
    elif kind == _IN:
        request.data = _without_status(writable)
        _check_transfer(request, sector, capacity)
    elif kind == _OUT:
        request.data = _behind_header(readable)
        _check_transfer(request, sector, capacity)
    elif kind == _GET_ID:
        request.data = _without_status(writable)
        request.length = total(request.data)
    elif kind != _FLUSH:
        _read_segments(request, _behind_header(readable), capacity, max_segments)
    return request


def _without_status(writable: list[memoryview]) -> list[memoryview]:
    last = writable[-1]
    if len(last) == 1:
        return writable[:-1]
    return [*writable[:-1], last[:-1]]


def _behind_header(readable: list[memoryview]) -> list[memoryview]:
    # What Linux and Windows send: the header in a buffer of its own.
    if len(readable[0]) == HEADER.size:
        return readable[1:]
    return slice_views(readable, HEADER.size, total(readable))


def _check_transfer(request: BlkRequest, sector: int, capacity: int) -> None:
    """Rule 5. Python's integers do not overflow, so neither does the end of the range."""
    request.offset = sector * SECTOR
    request.length = length = total(request.data)
    if length % SECTOR or length > _MAX_TRANSFER or request.offset + length > capacity:
        request.status = Status.IOERR


def _read_segments(
    request: BlkRequest, data: list[memoryview], capacity: int, max_segments: int
) -> None:
    """Rule 6. The segments are checked in, and used from, one copy."""
    length = total(data)
    if not length or length % SEGMENT.size:
        request.status = Status.IOERR
        return
    if length // SEGMENT.size > max_segments:
        request.status = Status.UNSUPP
        return
    allowed = SEGMENT_F_UNMAP if request.type == _WRITE_ZEROES else 0
    segments = []
    for sector, sectors, flags in SEGMENT.iter_unpack(copy_from(data, length)):
        if flags & ~allowed:
            request.status = Status.UNSUPP
        elif (sector + sectors) * SECTOR > capacity:
            request.status = Status.IOERR
        if request.status is not None:
            return
        segments.append(Segment(sector * SECTOR, sectors * SECTOR, bool(flags & SEGMENT_F_UNMAP)))
    request.segments = segments
