"""Vectors of buffers: what a request reads into or writes from.

A vector never owns memory: its views point into guest memory, into a bounce buffer or into a
caller's bytes. The views may change under us when a guest holds them (block layer row B13.6), so
nothing here looks at a byte twice.

Knows nothing about who the memory belongs to.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from vhostblk import native
from vhostblk.block import py_buffer

Buffer: TypeAlias = bytes | bytearray | memoryview | mmap.mmap

_ZEROES = bytes(64 * 1024)


def address_of(buffer: Buffer) -> int:
    """The address of a buffer's first byte in this process; read-only buffers too.

    The caller keeps the buffer alive for as long as it uses the address.
    """
    if native.available:
        return native.address_of(buffer)
    return py_buffer.address_of(buffer)


class IoVec:
    """A list of byte views that together are one request's memory.

    Args: views: flat byte views ("B", contiguous); used as they are, not copied. Empty ones are
        allowed.

    `length` is how many bytes, `piece` the same if they are in one piece, else 0: requests in many are looked at more
    closely.

    Context: any thread; a vector itself is never changed after construction.
    """

    __slots__ = ("length", "piece", "views")

    def __init__(self, views: Sequence[memoryview]) -> None:
        self.views = views
        # Most requests have one or two elements.
        if len(views) == 1:
            self.length = self.piece = len(views[0])
        else:
            self.length = sum(map(len, views))
            self.piece = 0

    @classmethod
    def of(cls, *buffers: Buffer) -> IoVec:
        """A vector over whole buffers of any kind, in order."""
        return cls([memoryview(buffer).cast("B") for buffer in buffers])

    def __len__(self) -> int:
        """How many bytes, like `length`."""
        return self.length

    def __repr__(self) -> str:
        return f"IoVec({'+'.join(str(len(view)) for view in self.views) or '0'} bytes)"

    def slice(self, offset: int, length: int) -> IoVec:
        """The part from byte `offset` on, `length` bytes long; shares the memory.

        Raises:
            ValueError: the part is not inside the vector.
        """
        if offset == 0 and length == self.length:
            return self
        return IoVec(list(self._parts(offset, length)))

    def _parts(self, offset: int, length: int) -> Iterator[memoryview]:
        if offset < 0 or length < 0 or offset + length > self.length:
            raise ValueError(f"bytes {offset}+{length} of a vector of {self.length}")
        for view in self.views:
            if not length:
                return
            size = len(view)
            if offset >= size:
                offset -= size
                continue
            part = view[offset : offset + length]
            offset = 0
            length -= len(part)
            yield part

    def copy_from(self, source: Buffer, offset: int = 0) -> None:
        """Fill the vector from byte `offset` on with the whole of `source`."""
        data = memoryview(source).cast("B")
        done = 0
        for part in self._parts(offset, len(data)):
            part[:] = data[done : done + len(part)]
            done += len(part)

    def copy_to(self, target: memoryview, offset: int = 0) -> None:
        """Copy `len(target)` bytes, from byte `offset` of the vector on, to `target`."""
        done = 0
        for part in self._parts(offset, len(target)):
            target[done : done + len(part)] = part
            done += len(part)

    def tobytes(self) -> bytes:
        """A copy of all bytes."""
        return b"".join(self.views)

    def zero(self, offset: int, length: int) -> None:
        """Overwrite a part with zeroes."""
        for part in self._parts(offset, length):
            for start in range(0, len(part), len(_ZEROES)):
                piece = part[start : start + len(_ZEROES)]
                piece[:] = _ZEROES[: len(piece)]

    def is_zero(self) -> bool:
        """Whether all bytes are zero; each is looked at once."""
        for view in self.views:
            # Most data shows at once that it is not.
            if len(view) and (view[0] or view[-1]):
                return False
            for start in range(0, len(view), len(_ZEROES)):
                piece = bytes(view[start : start + len(_ZEROES)])
                if piece != _ZEROES[: len(piece)]:
                    return False
        return True

    def is_aligned(self, alignment: int) -> bool:
        """Whether every element's address and length are multiples of `alignment` (row B13.2)."""
        if alignment <= 1:
            return True
        mask = alignment - 1
        for view in self.views:
            if len(view) & mask:
                return False
        return not any(address_of(view) & mask for view in self.views if len(view))


_new = object.__new__


def in_one_piece(view: memoryview, length: int) -> IoVec:
    """`IoVec([view])`, for whoever makes hundreds of thousands a second and knows the length already."""
    iov = _new(IoVec)
    iov.views = (view,)
    iov.length = iov.piece = length
    return iov


def concat(parts: Iterable[IoVec]) -> IoVec:
    """One vector over several, in order; empty elements are left out."""
    return IoVec([view for part in parts for view in part.views if len(view)])
