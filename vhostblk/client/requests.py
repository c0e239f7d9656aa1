"""Requests that are made one at a time, and waited for: a disk as a program sees it.

VIRTIO 1.2 §5.2.6. Knows nothing of how a request gets to the disk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from vhostblk.virtio.blk import ID_BYTES, SECTOR, SEGMENT, SEGMENT_F_UNMAP, RequestType

__all__ = ["Requests", "segments"]


class Requests(ABC):
    """What is made of `run`. Offsets and lengths are bytes."""

    @abstractmethod
    def run(
        self, queue: int, kind: RequestType, offset: int = 0, *, out: bytes = b"", room: int = 0
    ) -> bytes:
        """Make a request and wait for its end.

        Args:
            out: what the device reads: data, or segments.
            room: how much it may write.

        Raises:
            BlockError: it failed.
        """

    def read(self, offset: int, length: int, *, queue: int = 0) -> bytes:
        """Read `length` bytes at byte `offset`. Raises: BlockError: the request failed."""
        return self.run(queue, RequestType.IN, offset, room=length)

    def write(self, offset: int, data: bytes, *, queue: int = 0) -> None:
        """Write `data` at byte `offset`. Raises: BlockError: the request failed."""
        self.run(queue, RequestType.OUT, offset, out=data)

    def flush(self, *, queue: int = 0) -> None:
        """Make completed writes stable. Raises: BlockError: the request failed."""
        self.run(queue, RequestType.FLUSH)

    def discard(self, *ranges: tuple[int, int], queue: int = 0) -> None:
        """Discard ranges of (offset, length), bytes. Raises: BlockError: the request failed."""
        self.run(queue, RequestType.DISCARD, out=segments(ranges))

    def write_zeroes(self, *ranges: tuple[int, int], unmap: bool = False, queue: int = 0) -> None:
        """Zero ranges of (offset, length), bytes. Raises: BlockError: the request failed."""
        self.run(queue, RequestType.WRITE_ZEROES, out=segments(ranges, unmap=unmap))

    def get_id(self, *, queue: int = 0) -> str:
        """Ask for the serial number. Raises: BlockError: the request failed."""
        answer = self.run(queue, RequestType.GET_ID, room=ID_BYTES)
        return answer.partition(b"\0")[0].decode("ascii", "backslashreplace")


def segments(ranges: Sequence[tuple[int, int]], *, unmap: bool = False, flags: int = 0) -> bytes:
    """Encode ranges of (offset, length), bytes, as the data of DISCARD or WRITE_ZEROES."""
    flags |= SEGMENT_F_UNMAP if unmap else 0
    return b"".join(
        SEGMENT.pack(offset // SECTOR, length // SECTOR, flags) for offset, length in ranges
    )
