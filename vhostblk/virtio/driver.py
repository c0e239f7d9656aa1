"""The guest's half of a split virtqueue: for tests, and for clients that are a guest without a VM.

VIRTIO 1.2 §2.7.13 and §2.7.14. `DriverQueue` lays the three ring areas out in shared memory, keeps
the free list and hands tokens back. It obeys every MUST a driver has; whoever wants to break one
uses the `write_*` methods at the end, which check nothing.

Theory of operation: `add` fills descriptors and an entry of the available ring, `publish` makes all
that was added visible at once, `kick_needed` then tells whether the device asked to be told.
`enable_interrupts`, wait, `reap` is the way back.

Knows nothing of how the memory is shared nor of what the buffers mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from vhostblk.errors import PeerError, StateError
from vhostblk.virtio.memory import Fence, ring_words
from vhostblk.virtio.split import (
    AVAIL_F_NO_INTERRUPT,
    DESC,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    ENTRIES,
    FLAGS,
    IDX,
    USED_ELEM,
    USED_F_NO_NOTIFY,
    avail_size,
    desc_size,
    used_size,
)

__all__ = ["Buffer", "DriverQueue", "DriverRing", "Used"]


class Buffer(NamedTuple):
    """A piece of guest memory that a descriptor points to."""

    gpa: int
    length: int


class Used(NamedTuple):
    """A chain the device has given back."""

    head: int
    written: int
    """Bytes, as the device says."""
    token: object
    """What `add` was given."""


class DriverRing(Protocol):
    """One virtqueue, seen by the driver, whatever its format: `DriverQueue`, `PackedDriverQueue`."""

    size: int
    """Entries."""
    gpa: int
    """Guest physical address of its memory."""
    desc_offset: int
    avail_offset: int
    used_offset: int
    """Where its three parts are in that memory."""
    indirect_entries: int
    """Longest table `add(indirect=True)` can make."""

    @property
    def free_descriptors(self) -> int:
        """Descriptors `add` can still use; a chain with an indirect table needs one."""
        ...

    @property
    def in_flight(self) -> int:
        """Chains added and not reaped."""
        ...

    @property
    def base(self) -> int:
        """The base a device would begin at that has popped all that was published."""
        ...

    @property
    def visible_base(self) -> int:
        """What a front-end that lost its back-end can say of where it was: what is used."""
        ...

    def close(self) -> None:
        """Let go of the memory. Idempotent; nothing else may be called afterwards."""
        ...

    def add(
        self,
        readable: Sequence[Buffer],
        writable: Sequence[Buffer],
        *,
        token: object = None,
        indirect: bool = False,
    ) -> int:
        """Put a chain into the ring; `publish` shows it to the device.

        Args:
            readable: buffers for the device to read.
            writable: buffers for the device to write.
            token: comes back in `Used.token`.
            indirect: put the descriptors into a table of their own.

        Returns:
            The chain's name.

        Raises:
            StateError: not enough free descriptors, or more than a table holds.
        """
        ...

    def publish(self) -> int:
        """Show the device everything added since the last call. 0: that was nothing."""
        ...

    def kick_needed(self) -> bool:
        """Say whether the device asked to be told of what was published since the last call."""
        ...

    def reap(self) -> list[Used]:
        """Take back every chain the device has used, in the order of the ring.

        Raises:
            PeerError: the device gave back what it does not have, or more than there is.
        """
        ...

    def enable_interrupts(self) -> bool:
        """Ask for a notification for the next chain the device uses.

        Returns:
            Whether there is something to reap already.
        """
        ...

    def disable_interrupts(self) -> None:
        """Tell the device that notifications are not needed; they may come nevertheless."""
        ...


class DriverQueue:
    """One split virtqueue, seen by the driver: see `DriverRing`.

    Args:
        area: shared memory for the rings, `area_size` bytes; zeroed here; borrowed.
        gpa: guest physical address of `area`; a multiple of 16.
        size: entries; a power of two up to 32768.
        event_idx: VIRTIO_F_EVENT_IDX was negotiated.
        indirect_entries: longest table `add(indirect=True)` can make; each descriptor gets one.

    Context: one thread at a time.
    """

    def __init__(
        self,
        area: memoryview,
        gpa: int,
        size: int,
        *,
        event_idx: bool = False,
        indirect_entries: int = 0,
    ) -> None:
        self.size = size
        self.event_idx = event_idx
        self.indirect_entries = indirect_entries
        self.gpa = gpa
        # Where the parts begin, in bytes from the start of the area.
        self.desc_offset, self.avail_offset, self.used_offset, self._tables_offset, end = _layout(
            size, indirect_entries
        )
        if gpa % 16 or len(area) < end:
            raise StateError(f"a queue of {size} needs {end} bytes, aligned to 16")
        self._area = area[:end]
        self._area[:] = bytes(end)
        self._desc = self._part(self.desc_offset, desc_size(size))
        self._avail = ring_words(self._part(self.avail_offset, avail_size(size)))
        self._used = self._part(self.used_offset, used_size(size))
        self._used_words = ring_words(self._used)
        self._fence = Fence()
        # First in, first out: every descriptor takes its turn, also in a queue that is never full.
        self._free = deque(range(size))
        self._chains: dict[int, tuple[list[int], object]] = {}
        self._added = 0
        self._avail_idx = 0
        self._kicked_avail = 0
        self._used_idx = 0

    @staticmethod
    def area_size(size: int, indirect_entries: int = 0) -> int:
        """Bytes of shared memory that a queue of `size` needs."""
        return _layout(size, indirect_entries)[-1]

    @property
    def free_descriptors(self) -> int:
        """Descriptors `add` can still use; a chain with an indirect table needs one."""
        return len(self._free)

    @property
    def in_flight(self) -> int:
        """Chains added and not reaped."""
        return len(self._chains)

    @property
    def avail_idx(self) -> int:
        """Free-running index behind the last chain that was published."""
        return self._avail_idx

    @property
    def base(self) -> int:
        """See `DriverRing.base`."""
        return self._avail_idx

    @property
    def used_idx(self) -> int:
        """Free-running index behind the last chain that was reaped."""
        return self._used_idx

    @property
    def newest_head(self) -> int:
        """Of the chain that was added last."""
        return next(reversed(self._chains))

    @property
    def visible_base(self) -> int:
        """See `DriverRing.visible_base`: the ring's used index."""
        return int(self._used_words[IDX])

    def close(self) -> None:
        """Let go of the memory. Idempotent; nothing else may be called afterwards."""
        for view in (self._desc, self._avail, self._used_words, self._used, self._area):
            view.release()

    def add(
        self,
        readable: Sequence[Buffer],
        writable: Sequence[Buffer],
        *,
        token: object = None,
        indirect: bool = False,
    ) -> int:
        """See `DriverRing.add`; what is returned is the chain's head."""
        buffers = [(b, 0) for b in readable] + [(b, DESC_F_WRITE) for b in writable]
        needed = 1 if indirect else len(buffers)
        if (
            not buffers
            or needed > len(self._free)
            or (indirect and len(buffers) > self.indirect_entries)
        ):
            raise StateError(f"no room for {len(buffers)} buffers, {len(self._free)} free")
        indices = [self._free.popleft() for _ in range(needed)]
        if indirect:
            gpa, table = self.table(indices[0])
            _link(table, range(len(buffers)), buffers)
            self.write_descriptor(indices[0], gpa, 16 * len(buffers), DESC_F_INDIRECT)
        else:
            _link(self._desc, indices, buffers)
        head = indices[0]
        self._chains[head] = (indices, token)
        self.write_avail(self._avail_idx + self._added, head)
        self._added += 1
        return head

    def publish(self) -> int:
        """See `DriverRing.publish`; what is returned is the number of chains."""
        added, self._added = self._added, 0
        if added:
            # VIRTIO 1.2 §2.7.13.3.1: descriptors and entries before the index.
            self._fence.weak()
            self._avail_idx = self._avail_idx + added & 0xFFFF
            self.write_avail_idx(self._avail_idx)
        return added

    def kick_needed(self) -> bool:
        """See `DriverRing.kick_needed`."""
        before, now = self._kicked_avail, self._avail_idx
        if before == now:
            return False
        self._kicked_avail = now
        # VIRTIO 1.2 §2.7.13.4.1: the index before the look at flags or avail_event.
        self._fence.full()
        if not self.event_idx:
            return not self._used_words[FLAGS] & USED_F_NO_NOTIFY
        avail_event = self._used_words[ENTRIES + 4 * self.size]
        return now - avail_event - 1 & 0xFFFF < now - before & 0xFFFF

    def reap(self) -> list[Used]:
        """See `DriverRing.reap`."""
        used_idx = self._used_words[IDX]
        count = used_idx - self._used_idx & 0xFFFF
        if count > len(self._chains):
            raise PeerError(f"used.idx {used_idx}: {count} used of {len(self._chains)} in flight")
        self._fence.weak()
        reaped = []
        for _ in range(count):
            head, written = USED_ELEM.unpack_from(
                self._used, 4 + 8 * (self._used_idx & self.size - 1)
            )
            chain = self._chains.pop(head, None)
            if chain is None:
                raise PeerError(f"used element {self._used_idx} names {head}, not in flight")
            indices, token = chain
            self._free += indices
            self._used_idx = self._used_idx + 1 & 0xFFFF
            reaped.append(Used(head, written, token))
        return reaped

    def enable_interrupts(self) -> bool:
        """See `DriverRing.enable_interrupts`."""
        if self.event_idx:
            self.write_used_event(self._used_idx)
        else:
            self.write_avail_flags(0)
        self._fence.full()
        return bool(self._used_words[IDX] != self._used_idx)

    def disable_interrupts(self) -> None:
        """See `DriverRing.disable_interrupts`."""
        # With EVENT_IDX a used_event that was passed asks for no more.
        if not self.event_idx:
            self.write_avail_flags(AVAIL_F_NO_INTERRUPT)

    # ---- what a driver that knows what it does wrong needs; also how everything above writes

    def write_descriptor(
        self, index: int, address: int, length: int, flags: int = 0, following: int = 0
    ) -> None:
        """Write one descriptor of the queue's table."""
        DESC.pack_into(self._desc, 16 * index, address, length, flags, following)

    def write_avail(self, position: int, head: int) -> None:
        """Write the entry of the available ring at free-running `position`."""
        self._avail[ENTRIES + (position & self.size - 1)] = head

    def write_avail_idx(self, value: int) -> None:
        """Write avail.idx. The queue's own idea of it stays as it is."""
        self._avail[IDX] = value & 0xFFFF

    def write_avail_flags(self, value: int) -> None:
        """Write avail.flags."""
        self._avail[FLAGS] = value

    def write_used_event(self, value: int) -> None:
        """Write used_event: notify when the element with this free-running index is used."""
        self._avail[ENTRIES + self.size] = value & 0xFFFF

    def set_indices(self, value: int) -> None:
        """Continue an idle ring as if `value` chains had gone through it.

        Raises:
            StateError: chains are in flight.
        """
        if self._chains:
            raise StateError("chains are in flight")
        value &= 0xFFFF
        self._avail_idx = self._kicked_avail = self._used_idx = value
        self.write_avail_idx(value)
        self._used_words[IDX] = value

    def table(self, index: int) -> tuple[int, memoryview]:
        """Give the guest physical address and the memory of descriptor `index`'s indirect table."""
        offset = self._tables_offset + 16 * self.indirect_entries * index
        return self.gpa + offset, self._part(offset, 16 * self.indirect_entries)

    def _part(self, offset: int, length: int) -> memoryview:
        return self._area[offset : offset + length]


def _link(table: memoryview, indices: Sequence[int], buffers: list[tuple[Buffer, int]]) -> None:
    """Write one descriptor per buffer, each naming the next one's index."""
    following = *indices[1:], 0
    for i, ((gpa, length), flags) in enumerate(buffers):
        more = DESC_F_NEXT if i + 1 < len(buffers) else 0
        DESC.pack_into(table, 16 * indices[i], gpa, length, flags | more, following[i])


def _layout(size: int, indirect_entries: int) -> tuple[int, int, int, int, int]:
    """Offsets of descriptors, available ring, used ring, indirect tables, and the end."""
    avail = desc_size(size)
    used = _align(avail + avail_size(size), 4)
    tables = _align(used + used_size(size), 16)
    return 0, avail, used, tables, tables + 16 * indirect_entries * size


def _align(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment
