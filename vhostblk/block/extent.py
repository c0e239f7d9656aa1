"""What somebody above a node may do without asking: ranges of it that are ranges of a file, and flushes.

Such answers hold until they are revoked (`BlockNode.revoke`). The native engine uses them; nothing here knows it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from vhostblk.block.lean_dataclass import lean_dataclass


class ExtentFlag(enum.IntFlag):
    """What may be done with an extent, and how best; the values are `enum vb_extent_flag` of native/engine.h."""

    READ = 1
    WRITE = 2
    ZERO = 4  # reads as zeroes; no file
    NULL = (
        8  # accepts writes and drops them; without ZERO, reads leave buffers as they are; no file
    )
    INLINE = 16  # the file never blocks (tmpfs)
    POOL = 32  # aio=threads
    FIXED = 64  # O_DIRECT: fixed buffers pay
    CACHED = 128  # a page cache in between: reads may be there, writes are copies


@lean_dataclass(frozen=True, slots=True)
class HostExtent:
    """A range of a node that is a range of a host file, until it is revoked.

    Attributes: offset, length: bytes on the node that was asked; never empty. fd: borrowed, valid
        until the extent has been revoked; None where no file is behind it (ZERO, NULL).
        host_offset: where `offset` is in the file. request_alignment: requests not aligned to it
        must go through the block layer. memory_alignment: nor those whose buffers' addresses or
        lengths are not aligned to this. record: if not 0, whoever writes remembers where, in
        granules of so many bytes (a power of two, at least 512), see `PastWrites`.
    """

    offset: int
    length: int
    fd: int | None
    host_offset: int
    flags: ExtentFlag
    request_alignment: int = 1
    memory_alignment: int = 1
    record: int = 0

    @property
    def end(self) -> int:
        """The byte behind the last."""
        return self.offset + self.length

    def without(self, flags: ExtentFlag) -> HostExtent:
        """The same with fewer rights."""
        if not int(self.flags) & int(flags):
            return self
        return replace(self, flags=self.flags & ~flags)

    def cut(self, start: int, end: int) -> HostExtent | None:
        """The part inside `start`..`end`, or None if that is empty."""
        start, end = max(start, self.offset), min(end, self.end)
        if start >= end:
            return None
        if start == self.offset and end == self.end:
            return self
        host_offset = self.host_offset + start - self.offset
        return replace(self, offset=start, length=end - start, host_offset=host_offset)


Ranges: TypeAlias = Sequence[tuple[int, int]]
"""Start and end of each."""


def merged(ranges: Ranges) -> list[tuple[int, int]]:
    """The same bytes as ranges that are apart from each other, in order."""
    runs: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if runs and start <= runs[-1][1]:
            if end > runs[-1][1]:
                runs[-1] = runs[-1][0], end
        else:
            runs.append((start, end))
    return runs


class Hull:
    """The smallest range that has all the ranges it was told of."""

    __slots__ = ("end", "start")

    def __init__(self) -> None:
        self.start = self.end = 0

    def add(self, start: int, end: int) -> None:
        """Another one, `start`..`end`."""
        if self.start == self.end:
            self.start, self.end = start, end
        else:
            self.start, self.end = min(self.start, start), max(self.end, end)

    def touches(self, start: int, end: int) -> bool:
        """Whether the two overlap."""
        return self.start < end and start < self.end


@lean_dataclass(frozen=True, slots=True)
class PastWrites:
    """What somebody has written through extents, past the pipeline, since he was last asked.

    Attributes: count: writes that have ended, however they ended. highest: where the one that
        reached furthest ended, bytes. ranges: offset and length of what was written, in the
        granules that the extents asked for; only if they were asked for.
    """

    count: int = 0
    highest: int = 0
    ranges: Sequence[tuple[int, int]] = ()

    def shifted(self, offset: int) -> PastWrites:
        """The same by offsets that are so much larger."""
        ranges = [(start + offset, length) for start, length in self.ranges]
        return PastWrites(self.count, self.highest and self.highest + offset, ranges)


class Writer(enum.Enum):
    """Who is about to write by extents, and so what has to be true before he does."""

    REGULAR = "regular"  # he may write to any of what is around, and again
    ONCE = "once"  # he writes just that, all of it, as soon as he may
    MAKER = "maker"  # the same, and nobody looks at the node before he has come to an end


class FlushTarget(enum.Enum):
    """What `flush_target` says when it is not a file descriptor."""

    NOTHING = "nothing"  # a flush has nothing to do
    ASK = "ask"  # only the block layer can flush
