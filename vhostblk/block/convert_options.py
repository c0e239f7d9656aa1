"""How disks are copied into another one, and who is told of it: what `convert.py` is asked for.

Knows nothing about how it is done.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from vhostblk.errors import BlockError

LARGEST_BUFFER = 16 << 20
"""Bytes that one worker holds at most; also the largest sensible `min_sparse`."""
MOST_WORKERS = 16


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How to copy.

    Attributes:
        min_sparse: zeroes of so many bytes are not written as data; 0: all is written.
        compressed: whole clusters of the target are compressed.
        offload: the storage may copy by itself.
        salvage: what cannot be read is zeroes.
        in_order: the target is written from its beginning to its end.
        workers: chunks that are copied at the same time, at most `MOST_WORKERS`.
        rate: bytes a second that are written; 0: as many as can be.
        is_new: the target was just made.
        has_backing: the target is backed by what the first source is backed by.
        is_zero: the target reads as zeroes, the caller knows.
    """

    min_sparse: int = 4096
    compressed: bool = False
    offload: bool = False
    salvage: bool = False
    in_order: bool = True
    workers: int = 8
    rate: int = 0
    is_new: bool = False
    has_backing: bool = False
    is_zero: bool = False


class What(enum.Enum):
    """What has failed."""

    STATUS = "reading block status"
    READ = "reading"
    WRITE = "writing"


class Listener(Protocol):
    """Who wants to know how it goes."""

    def progress(self, done: float) -> None:
        """How much of the data is being copied, or has been: from 0 to 1."""

    def failed(self, what: What, offset: int, error: BlockError) -> None:
        """It will not succeed; several workers may say so. The offset is one of all sources together."""

    def lost(self, what: What, offset: int, error: BlockError) -> None:
        """A sector cannot be read; the target has zeroes. The offset is one of the source that has it."""
