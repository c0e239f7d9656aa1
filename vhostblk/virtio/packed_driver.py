"""The guest's half of a packed virtqueue: for tests, and for clients that are a guest without a VM.

VIRTIO 1.2 §2.8.21 and §2.8.22. `PackedDriverQueue` is to `packed` what `DriverQueue` is to `split`,
and is used in the same way: `DriverRing`. It obeys every MUST a driver has; whoever wants to break
one uses `write_descriptor` and `write_event`, which check nothing.

Theory of operation: places in the ring are counted modulo twice its size, as in `packed`. `add`
writes descriptors where the next free ones are, and holds back the flags of the first that was
added since the last `publish`: without them the device sees none. A chain's name is a buffer id,
taken from a list of free ones, because chains come back in any order.

Knows nothing of how the memory is shared nor of what the buffers mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from vhostblk.errors import PeerError, StateError
from vhostblk.virtio.driver import Buffer, Used
from vhostblk.virtio.memory import Fence, ring_words
from vhostblk.virtio.packed import (
    DESC,
    DESC_F_AVAIL,
    DESC_F_USED,
    EVENT,
    EVENT_DESC,
    EVENT_DISABLE,
    EVENT_ENABLE,
    EVENT_SIZE,
    available,
    event_word,
    flags_word,
    used,
)
from vhostblk.virtio.virtqueue import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE

__all__ = ["PackedDriverQueue"]


class PackedDriverQueue:
    """One packed virtqueue, seen by the driver: see `DriverRing`.

    Args:
        area: shared memory for the rings, `area_size` bytes; zeroed here; borrowed.
        gpa: guest physical address of `area`; a multiple of 16.
        size: entries, up to 32768; need not be a power of two.
        event_idx: VIRTIO_F_EVENT_IDX was negotiated.
        indirect_entries: longest table `add(indirect=True)` can make; each buffer id has one.

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
        # Where the parts begin, in bytes from the start of the area: descriptor, driver, device area.
        self.desc_offset = 0
        self.avail_offset = 16 * size
        self.used_offset = self.avail_offset + EVENT_SIZE
        self._tables_offset = self.avail_offset + 16
        end = self.area_size(size, indirect_entries)
        if gpa % 16 or len(area) < end:
            raise StateError(f"a queue of {size} needs {end} bytes, aligned to 16")
        self._area = area[:end]
        self._area[:] = bytes(end)
        self._desc = self._part(0, 16 * size)
        self._words = ring_words(self._desc)
        self._driver_event = self._part(self.avail_offset, EVENT_SIZE)
        self._device_event = self._part(self.used_offset, EVENT_SIZE)
        self._fence = Fence()
        self._ids = deque(range(size))
        self._chains: dict[int, tuple[int, object]] = {}  # slots and token by buffer id
        self._free = size
        self._avail = 0  # where the next descriptor goes
        self._published = 0  # up to where the device sees them
        self._kicked = 0  # the same, when it was last decided whether to kick
        self._used = 0  # where the next used descriptor comes
        self._first_flags = 0  # of the descriptor at `_published`, while they are held back

    @staticmethod
    def area_size(size: int, indirect_entries: int = 0) -> int:
        """Bytes of shared memory that a queue of `size` needs."""
        return 16 * (size + 1 + indirect_entries * size)

    @property
    def free_descriptors(self) -> int:
        """Descriptors `add` can still use; a chain with an indirect table needs one."""
        return self._free

    @property
    def in_flight(self) -> int:
        """Chains added and not reaped."""
        return len(self._chains)

    @property
    def base(self) -> int:
        """Where a device would begin that has used all that was reaped and popped all of it."""
        size = self.size
        return event_word(self._published, size) | event_word(self._used, size) << 16

    @property
    def visible_base(self) -> int:
        """See `DriverRing.visible_base`: behind the last used descriptor, reaped or not."""
        place, size = self._used, self.size
        left = dict(self._chains)
        while left and self._is_used_at(place):
            head = self._words[flags_word(place % size) - 1]
            slots, _ = left.pop(head, (0, None))
            if not slots:
                break
            place = (place + slots) % (2 * size)
        return event_word(place, size) | event_word(place, size) << 16

    def close(self) -> None:
        """Let go of the memory. Idempotent; nothing else may be called afterwards."""
        views = (self._words, self._desc, self._driver_event, self._device_event, self._area)
        for view in views:
            view.release()

    def add(
        self,
        readable: Sequence[Buffer],
        writable: Sequence[Buffer],
        *,
        token: object = None,
        indirect: bool = False,
    ) -> int:
        """See `DriverRing.add`; what is returned is the chain's buffer id."""
        buffers = [(b, 0) for b in readable] + [(b, DESC_F_WRITE) for b in writable]
        needed = 1 if indirect else len(buffers)
        if (
            not buffers
            or needed > self._free
            or (indirect and len(buffers) > self.indirect_entries)
        ):
            raise StateError(f"no room for {len(buffers)} buffers, {self._free} free")
        head = self._ids.popleft()
        if indirect:
            gpa, table = self.table(head)
            for i, ((address, length), flags) in enumerate(buffers):
                DESC.pack_into(table, 16 * i, address, length, 0, flags)
            self._append(gpa, 16 * len(buffers), head, DESC_F_INDIRECT)
        else:
            for i, ((address, length), flags) in enumerate(buffers):
                more = DESC_F_NEXT if i + 1 < needed else 0
                self._append(address, length, head, flags | more)
        self._chains[head] = (needed, token)
        self._free -= needed
        return head

    def _append(self, address: int, length: int, head: int, flags: int) -> None:
        """Write the next descriptor, but for the flags of the first that is not published."""
        place, size = self._avail, self.size
        flags |= available(place, size)
        slot = place % size
        if place == self._published:
            self._first_flags = flags
            flags = self._words[flags_word(slot)]
        self.write_descriptor(slot, address, length, head, flags)
        self._avail = (place + 1) % (2 * size)

    def publish(self) -> int:
        """See `DriverRing.publish`; what is returned is the number of slots."""
        size = self.size
        added = (self._avail - self._published) % (2 * size)
        if added:
            # VIRTIO 1.2 §2.8.21.1: everything else before the flags that show it.
            self._fence.weak()
            self._words[flags_word(self._published % size)] = self._first_flags
            self._published = self._avail
        return added

    def kick_needed(self) -> bool:
        """See `DriverRing.kick_needed`."""
        size = self.size
        added = (self._published - self._kicked) % (2 * size)
        if not added:
            return False
        self._kicked = self._published
        # VIRTIO 1.2 §2.8.21.2: the flags before the look at the event structure.
        self._fence.full()
        (event,) = EVENT.unpack(self._device_event)
        flags, word = event >> 16 & 3, event & 0xFFFF
        if not self.event_idx or flags != EVENT_DESC:
            return bool(flags != EVENT_DISABLE)
        passed = ((self._published - 1 - n) % (2 * size) for n in range(added))
        return word in (event_word(place, size) for place in passed)

    def reap(self) -> list[Used]:
        """See `DriverRing.reap`."""
        reaped: list[Used] = []
        while self._is_used():
            # VIRTIO 1.2 §2.8.22: the flags before the rest.
            self._fence.weak()
            slot = self._used % self.size
            _, written, head, flags = DESC.unpack_from(self._desc, 16 * slot)
            slots, token = self._chains.pop(head, (0, None))
            if not slots:
                raise PeerError(f"the used descriptor in slot {slot} names {head}, not in flight")
            self._ids.append(head)
            self._free += slots
            self._used = (self._used + slots) % (2 * self.size)
            reaped.append(Used(head, written if flags & DESC_F_WRITE else 0, token))
        return reaped

    def enable_interrupts(self) -> bool:
        """See `DriverRing.enable_interrupts`."""
        if self.event_idx:
            self.write_event(EVENT_DESC, event_word(self._used, self.size))
        else:
            self.write_event(EVENT_ENABLE)
        self._fence.full()
        return self._is_used()

    def disable_interrupts(self) -> None:
        """See `DriverRing.disable_interrupts`."""
        self.write_event(EVENT_DISABLE)

    def _is_used(self) -> bool:
        """Whether there is something to reap."""
        return bool(self._chains) and self._is_used_at(self._used)

    def _is_used_at(self, place: int) -> bool:
        flags = self._words[flags_word(place % self.size)]
        return flags & (DESC_F_AVAIL | DESC_F_USED) == used(place, self.size)

    # ---- what a driver that knows what it does wrong needs; also how everything above writes

    def write_descriptor(self, slot: int, address: int, length: int, head: int, flags: int) -> None:
        """Write one descriptor of the ring."""
        DESC.pack_into(self._desc, 16 * slot, address, length, head, flags)

    def write_event(self, flags: int, place: int = 0) -> None:
        """Write the driver's event structure."""
        EVENT.pack_into(self._driver_event, 0, flags << 16 | place)

    def set_place(self, place: int) -> None:
        """Continue an idle ring at another place, as if others had gone through it.

        Args:
            place: modulo twice the size.

        Raises:
            StateError: chains are in flight.
        """
        if self._chains:
            raise StateError("chains are in flight")
        self._avail = self._published = self._kicked = self._used = place % (2 * self.size)
        for slot in range(self.size):
            # As if each had been used when the ring last came by.
            last = place - self.size + (slot - place) % self.size
            self._words[flags_word(slot)] = used(last % (2 * self.size), self.size)

    def table(self, head: int) -> tuple[int, memoryview]:
        """Give the guest physical address and the memory of a buffer id's indirect table."""
        offset = self._tables_offset + 16 * self.indirect_entries * head
        return self.gpa + offset, self._part(offset, 16 * self.indirect_entries)

    def _part(self, offset: int, length: int) -> memoryview:
        return self._area[offset : offset + length]
