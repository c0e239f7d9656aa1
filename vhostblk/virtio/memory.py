"""How virtqueues see guest memory: bounds-checked views, and the order in which they use them.

VIRTIO 1.2 §2.7 counts in guest physical addresses. `GuestMemory` is the interface this package
consumes; who maps the memory, and where the rings' addresses come from, is somebody else's
business. `FlatMemory` is the simplest implementation: one buffer.

Theory of operation, for everybody who touches memory that the other side changes at the same time:

*Read once.* A value that decides anything is read once into a Python integer and used from there.

*Whole values.* `ring_words` gives 16-bit items, and `struct` moves "<H", "<I" and "<Q" by a copy of
constant size, which compilers turn into one load or store: indices never tear.

*Order.* Python has no memory barriers. What the rings need is (1) loads in order and stores in
order (entry before index), and (2) in two places a store before a load of what the other side
writes. x86 keeps (1) by itself (TSO), and CPython adds no reordering of its own: the interpreter's
accesses are calls that no compiler merges. Nothing gives (2) for free, not even x86. `Fence` does:
`full` releases and takes a lock that nobody else wants. On x86 both are locked instructions, thus
full barriers; on ARMv8 a store-release followed by a load-acquire is one as well. `weak` is for
(1): nothing on x86, `full` on every other machine.
"""

from __future__ import annotations

import platform
import sys
import threading
from typing import Protocol

from vhostblk.errors import GuestError, StateError

__all__ = ["FlatMemory", "Fence", "GuestMemory", "ring_words"]


class GuestMemory(Protocol):
    """Guest memory as a device sees it."""

    def view(self, gpa: int, length: int) -> list[memoryview]:
        """Give writable views of `length` bytes at guest physical address `gpa`.

        Args:
            gpa: any 64-bit value; the guest chose it.
            length: bytes, positive.

        Returns:
            One view, or several in order where the range crosses a border between regions.

        Raises:
            GuestError: some byte of the range is not guest memory.
        """
        ...

    def ring(self, address: int, length: int) -> memoryview:
        """Give one writable view of a ring area.

        Args:
            address: what the ring was configured with, which need not be a guest physical address.
            length: bytes, positive.

        Raises:
            GuestError: the area is not wholly inside one region.
        """
        ...


class FlatMemory:
    """One buffer that is all the guest memory there is; rings are addressed like everything else.

    Args:
        base: guest physical address of the buffer's first byte.
        buffer: anything writable with the buffer protocol; borrowed.
    """

    def __init__(self, base: int, buffer: bytearray | memoryview) -> None:
        self._base = base
        self._bytes = memoryview(buffer).cast("B")

    def view(self, gpa: int, length: int) -> list[memoryview]:
        """See `GuestMemory.view`."""
        start = gpa - self._base
        if start < 0 or start + length > len(self._bytes):
            raise GuestError(f"[{gpa:#x}, +{length:#x}) is outside guest memory")
        return [self._bytes[start : start + length]]

    def ring(self, address: int, length: int) -> memoryview:
        """See `GuestMemory.ring`."""
        (view,) = self.view(address, length)
        return view


class Fence:
    """The barriers of one queue; see the module's theory of operation.

    Context: one thread at a time, as its queue.
    """

    __slots__ = ("_lock", "weak")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        ordered = platform.machine() in ("x86_64", "AMD64", "i686", "i386")
        self.weak = _nothing if ordered else self.full
        """Loads before it stay before loads and stores after it; stores stay before stores."""

    def full(self) -> None:
        """Everything before stays before everything after."""
        # Release first, then acquire: the other way round would let both pass the fence on ARM.
        self._lock.release()
        self._lock.acquire()


def _nothing() -> None:
    """`Fence.weak` where the hardware keeps the order."""


def ring_words(ring: memoryview) -> memoryview:
    """View a ring area as its 16-bit little-endian words.

    Raises:
        StateError: on a big-endian host, which these readable rings do not serve.
    """
    if sys.byteorder != "little":
        raise StateError("the Python virtqueues need a little-endian host")
    return ring.cast("H")
