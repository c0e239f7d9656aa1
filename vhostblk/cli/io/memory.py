"""Memory for requests: anonymous pages, which O_DIRECT takes; filled with a pattern, or compared with one."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

from vhostblk.block.iov import IoVec
from vhostblk.cli.io.command import ComplaintError

# How far `-m` moves buffers.
_MISALIGNED_BY = 16
_STEP = 1 << 20


def allocate(length: int, *, misalign: bool = False) -> memoryview:
    """A buffer, aligned to pages.

    Args:
        misalign: it is not.
    """
    if not length:
        return memoryview(bytearray())
    start = _MISALIGNED_BY if misalign else 0
    return memoryview(mmap.mmap(-1, length + start))[start:]


def fill(buffer: memoryview, pattern: bytes) -> None:
    """Repeat the pattern until the buffer is full."""
    chunk = pattern * max(1, min(_STEP, len(buffer)) // len(pattern))
    for start in range(0, len(buffer), len(chunk)):
        part = buffer[start : start + len(chunk)]
        part[:] = chunk[: len(part)]


def repeats(buffer: memoryview, byte: int) -> bool:
    """Whether all bytes are this one."""
    chunk = bytes([byte]) * min(_STEP, len(buffer))
    return all(
        bytes(buffer[start : start + _STEP]) == chunk[: len(buffer) - start]
        for start in range(0, len(buffer), _STEP)
    )


def fill_from_file(buffer: memoryview, path: str) -> None:
    """Repeat what a file begins with.

    Raises:
        ComplaintError: it cannot be read, or is empty.
    """
    try:
        with open(path, "rb") as file:
            pattern = file.read(len(buffer))
    except OSError as error:
        raise ComplaintError(f"{path}: {os.strerror(error.errno or 0)}") from None
    if not pattern:
        raise ComplaintError(f"{path}: file is empty")
    fill(buffer, pattern)


def cut(buffer: memoryview, lengths: Sequence[int]) -> IoVec:
    """One vector over consecutive parts of a buffer."""
    parts = []
    start = 0
    for length in lengths:
        parts.append(buffer[start : start + length])
        start += length
    return IoVec(parts)
