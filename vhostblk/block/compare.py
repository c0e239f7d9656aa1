"""Do two images show the same bytes? What a comparison looks at, and what it finds.

Theory of operation: both images are walked together, by what each says of its layers: ranges that read as zeroes on
both sides, or that neither has, are not read; where one side has nothing, the other one has to be zeroes. What has to
be read is read in pieces, a few at a time, and settled in the order of their offsets, so that what is found is the
first there is. Memory is bounded by the pieces that are read at a time.

Context: the control loop. Knows nothing about formats, nor about who is told.
"""

from __future__ import annotations

import asyncio
import enum
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from vhostblk.block.backend import BlockBackend
from vhostblk.block.bounce import aligned_bytes
from vhostblk.block.flags import StatusFlag
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import SECTOR_SIZE
from vhostblk.block.status import statuses_above
from vhostblk.errors import BlockError

PIECE = 2 << 20
"""Bytes that are read at a time, from each image."""
_AT_ONCE = 4
_ZEROES = bytes(PIECE)
_ALLOCATED, _ZERO = int(StatusFlag.ALLOCATED), int(StatusFlag.ZERO)


class Outcome(enum.Enum):
    """What a comparison has found."""

    IDENTICAL = "identical"
    SIZE = "size"  # strict only: they are not of one size
    STATUS = "status"  # strict only: at `offset` one has something that the other does not have
    CONTENT = "content"  # the sector at `offset` differs; a shorter image goes on as zeroes


@dataclass(frozen=True, slots=True)
class Comparison:
    """An answer.

    Attributes: offset: in bytes; the end of both, if they are identical.
    """

    outcome: Outcome
    offset: int = 0


class CompareError(BlockError):
    """One of the images cannot be looked at.

    Attributes:
        image: which one; 0 or 1.
        offset: where, in bytes.
        in_read: its content cannot be read; otherwise nobody knows what it has.
    """

    def __init__(self, error: BlockError, image: int, offset: int, *, in_read: bool) -> None:
        super().__init__(error.errno or 0, error.strerror)
        self.image = image
        self.offset = offset
        self.in_read = in_read


@dataclass(frozen=True, slots=True)
class _Part:
    """A range that is all alike.

    Attributes:
        reads: images to read: none, one that has to be zeroes, or both.
        end: nothing behind counts: this is the answer, or the error.
    """

    offset: int
    length: int
    reads: tuple[int, ...] = ()
    end: Comparison | CompareError | None = None


async def compare(
    first: BlockBackend,
    second: BlockBackend,
    *,
    strict: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Comparison:
    """Compare two images from the beginning, up to the first difference.

    Args:
        strict: sizes, and what each has where, have to be the same, too. Otherwise a shorter image goes on as zeroes.
        progress: called with the offset up to which they are the same, after each range.

    Raises:
        CompareError: one of them cannot be looked at; before that, they are the same.
    """
    if strict and first.length != second.length:
        return Comparison(Outcome.SIZE)
    work = _Work((first, second), strict)
    loop = asyncio.get_running_loop()
    running: deque[tuple[_Part, asyncio.Task[Comparison | None] | None]] = deque()

    async def settle() -> Comparison | None:
        part, task = running.popleft()
        found = await task if task is not None else part.end
        if isinstance(found, CompareError):
            raise found
        if found is None:
            progress(part.offset + part.length)
        return found

    try:
        async with aclosing(work.parts()) as parts:
            async for part in parts:
                task = loop.create_task(work.look(part)) if part.reads else None
                running.append((part, task))
                if (len(running) >= _AT_ONCE) and (found := await settle()):
                    return found
        while running:
            if found := await settle():
                return found
    finally:
        tasks = [task for _, task in running if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return Comparison(Outcome.IDENTICAL, max(first.length, second.length))


class _Work:
    """One comparison.

    Owns: buffers of pieces, to be used again.
    """

    def __init__(self, images: tuple[BlockBackend, BlockBackend], strict: bool) -> None:
        self._images = images
        self._strict = strict
        self._buffers: list[bytearray] = []  # of one length
        # Of each image: what is known from here on, as flags and the end of the range.
        self._known: tuple[deque[tuple[int, int]], ...] = (deque(), deque())

    async def parts(self) -> AsyncGenerator[_Part, None]:
        """What is where, from the beginning; ends when there is no more, or with what ends it all."""
        lengths = [image.length for image in self._images]
        common, end = min(lengths), max(lengths)
        longer = lengths.index(end)
        offset = 0
        try:
            while offset < common:
                one, other = [await self._status(image, offset) for image in (0, 1)]
                part = self._part(offset, one, other)
                yield part
                offset += part.length
            while offset < end:
                flags, length = await self._status(longer, offset)
                reads: tuple[int, ...] = ()
                if flags & (_ALLOCATED | _ZERO) == _ALLOCATED:
                    length, reads = min(length, PIECE), (longer,)
                yield _Part(offset, length, reads)
                offset += length
        except CompareError as error:
            yield _Part(offset, 0, (), error)

    async def _status(self, image: int, offset: int) -> tuple[int, int]:
        """What an image has there: flags, and for how many bytes."""
        known = self._known[image]
        while known and known[0][1] <= offset:
            known.popleft()
        if not known:
            node, at = self._images[image].node, offset
            try:
                for flags, length in await statuses_above(node, None, offset, node.length - offset):
                    at += length
                    known.append((flags, at))
            except BlockError as error:
                raise CompareError(error, image, offset, in_read=False) from None
        flags, end = known[0]
        return flags, end - offset

    def _part(self, offset: int, one: tuple[int, int], other: tuple[int, int]) -> _Part:
        length = min(one[1], other[1])
        if self._strict and one[0] != other[0]:
            return _Part(offset, length, (), Comparison(Outcome.STATUS, offset))
        if one[0] & other[0] & _ZERO:
            return _Part(offset, length)
        reads = tuple(image for image, (flags, _) in enumerate((one, other)) if flags & _ALLOCATED)
        return _Part(offset, min(length, PIECE) if reads else length, reads)

    async def look(self, part: _Part) -> Comparison | None:
        """Read what is to be read, and compare it."""
        contents = [self._take(part.length) for _ in part.reads]
        for image, content in zip(part.reads, contents, strict=True):
            try:
                await self._images[image].preadv(part.offset, IoVec.of(content))
            except BlockError as error:
                raise CompareError(error, image, part.offset, in_read=True) from None
        one = contents[0]
        other = contents[1] if len(contents) > 1 else _ZEROES
        if len(other) != len(one):
            other = other[: len(one)]
        at = first_difference(one, other)
        if not self._buffers or len(self._buffers[0]) != part.length:
            self._buffers = []
        self._buffers += contents
        return Comparison(Outcome.CONTENT, part.offset + at) if at is not None else None

    def _take(self, length: int) -> bytearray:
        # Whole objects compare as fast as memory is read; parts of them would have to be copied.
        if self._buffers and len(self._buffers[0]) == length:
            return self._buffers.pop()
        return aligned_bytes(length)


def first_difference(one: bytearray, other: bytes | bytearray) -> int | None:
    """The offset of the first sector that differs, of two buffers of one length; None: they are the same."""
    # Whole buffers compare as fast as memory is read; slices are copies.
    if one == other:
        return None
    start, end = 0, len(one)
    while end - start > SECTOR_SIZE:
        middle = start + max((end - start) // 2 // SECTOR_SIZE, 1) * SECTOR_SIZE
        if one[start:middle] == other[start:middle]:
            start = middle
        else:
            end = middle
    return start
