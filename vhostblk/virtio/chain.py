"""One descriptor chain, as buffers, and the few things devices do to lists of buffers.

VIRTIO 1.2 §2.7.4: framing is the driver's choice, so a device may only ever see two byte strings:
what it may read and what it may write. The views are live guest memory: their lengths are ours,
their contents may change under us; who decides anything by them copies them first (`copy_from`).

Knows nothing of rings (`split`, `packed`) nor of what the bytes mean (`blk_request`).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Broken", "DescriptorChain", "copy_from", "copy_to", "slice_views", "total"]


class Broken(enum.IntEnum):
    """Why a queue was declared broken; the values of `enum vb_broken` in the engine's header."""

    AVAIL_IDX = 1
    """More is available than the ring has room for."""
    HEAD = 2
    """A head outside the descriptor table."""
    CHAIN_LOOP = 3
    """More descriptors than a chain may have."""
    CHAIN_NEXT = 4
    """A next index outside its table."""
    INDIRECT = 5
    """Indirect table: not negotiated, nested, continued, or of a wrong size."""
    ADDRESS = 6
    """The status byte, or a table of indirect descriptors, is outside guest memory."""
    ORDER = 7
    """A readable descriptor behind a writable one."""
    NO_STATUS = 8
    """Nowhere to put the status byte."""
    RING_ADDRESS = 9
    """The rings themselves are outside guest memory or misaligned."""
    MEMORY_FAULT = 10
    """The memory file was truncated under us."""
    LOG = 11
    """The log of dirty memory is too short, or was truncated."""


@dataclass(slots=True)
class DescriptorChain:
    """What the driver made available in one go.

    Buffers of length 0 are legal and have no view.
    """

    head: int
    """The chain's name in the used ring: the index of its first descriptor, or its buffer id."""
    readable: list[memoryview]
    """Device-readable buffers, in order. Writing to them is a bug of ours."""
    writable: list[memoryview]
    """Device-writable buffers, in order."""
    saw_writable: bool = False
    """A writable descriptor, of whatever length; for those who build chains."""
    is_incomplete: bool = False
    """Some buffer is not in guest memory: the driver may not know yet that memory was unplugged. Of
    the writable ones only those behind it are here."""

    def lacks(self, views: list[memoryview]) -> None:
        """Note that the next of these is not in guest memory."""
        self.is_incomplete = True
        if views is self.writable:
            views.clear()  # the status is the last writable byte: it is behind this, or nowhere


def total(views: Sequence[memoryview]) -> int:
    """Bytes in all `views` together."""
    return sum(map(len, views))


def copy_from(views: Sequence[memoryview], length: int) -> bytes:
    """Copy the first `length` bytes, or all there are if fewer, reading each of them once."""
    if views and len(views[0]) >= length:
        return bytes(views[0][:length])
    out = bytearray()
    for view in views:
        out += view[: length - len(out)]
        if len(out) == length:
            break
    return bytes(out)


def copy_to(views: Sequence[memoryview], data: bytes) -> int:
    """Copy `data` to the start of `views`, as much as fits.

    Returns:
        Bytes copied.
    """
    done = 0
    for view in views:
        part = data[done : done + len(view)]
        view[: len(part)] = part
        done += len(part)
        if done == len(data):
            break
    return done


def slice_views(views: Sequence[memoryview], offset: int, length: int) -> list[memoryview]:
    """Give views of bytes `[offset, offset + length)` of the string that `views` make up.

    What lies beyond the end is left out.
    """
    out = []
    for view in views:
        if length <= 0:
            break
        size = len(view)
        if offset >= size:
            offset -= size
            continue
        part = view[offset : offset + length]
        offset = 0
        length -= len(part)
        out.append(part)
    return out
