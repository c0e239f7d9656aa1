"""The device's half of a packed virtqueue: the readable reference the engine is measured against.

VIRTIO 1.2 §2.8. Everything the driver can do wrong ends in a `GuestError` with a `Broken` reason,
the same for the same bytes as in the engine (`enum vb_broken`), after a number of steps bounded by
the queue size.

Theory of operation: there is one ring of descriptors, and both sides write it. A place in it is a
slot together with a wrap counter, which changes each time around; both in one number, `Position`,
counted modulo twice the size. Two places belong to the device: `avail`, where the next chain will
begin, and `used`, where the next used descriptor goes. Always::

    used  <=  avail  <=  used + size

because every chain that is not yet used occupies as many slots as it has descriptors (one, if they
are in an indirect table). A chain that does not fit breaks the queue, so a driver cannot make more
available than the ring holds.

Nobody publishes an index. Two flags of a descriptor say whose it is: AVAIL as the wrap counter and
USED as its opposite when the driver has made it available in this round, both as the wrap counter
when the device has used it. The flags of a chain's first descriptor are written last, so when they
are there, all is.

The used descriptor of a chain takes only one slot, wherever its chain was; `used` skips as many as
the chain had, for which the device remembers their number, by the chain's buffer id.

Notifications are as in `split`, but for where the wishes are: each side has a structure of four bytes
that says always, never, or when a certain place is passed.

Knows nothing of eventfds, of threads, or of what the chains mean.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence

from vhostblk.errors import GuestError
from vhostblk.virtio.chain import Broken, DescriptorChain
from vhostblk.virtio.memory import GuestMemory, ring_words
from vhostblk.virtio.tracking import Descriptor, PackedTracker
from vhostblk.virtio.virtqueue import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    QUEUE_SIZE_MAX,
    BaseVirtqueue,
)

__all__ = [
    "DESC",
    "EVENT_SIZE",
    "FIRST_BASE",
    "PackedVirtqueue",
    "available",
    "event_word",
    "flags_word",
    "position",
    "used",
]

DESC = struct.Struct("<QIHH")
"""VIRTIO 1.2 §2.8.13: address, length, buffer id, flags."""
EVENT = struct.Struct("<I")
"""VIRTIO 1.2 §2.8.14: place, flags; moved at once, so that they belong together."""
EVENT_SIZE = EVENT.size

DESC_F_AVAIL = 1 << 7
DESC_F_USED = 1 << 15
EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC = 0, 1, 2

FIRST_BASE = 0x8000_8000
"""The base of a ring nobody has used: both places at slot 0, both wrap counters 1."""


def available(place: int, size: int) -> int:
    """AVAIL and USED of a descriptor that is available at `place`."""
    return DESC_F_AVAIL if place < size else DESC_F_USED


def used(place: int, size: int) -> int:
    """AVAIL and USED of a descriptor that is used at `place`."""
    return DESC_F_AVAIL | DESC_F_USED if place < size else 0


def event_word(place: int, size: int) -> int:
    """A place as event structures and bases have it: slot, and the wrap counter in bit 15."""
    return place | 0x8000 if place < size else place - size


def position(word: int, size: int) -> int:
    """The opposite of `event_word`."""
    return word & 0x7FFF if word & 0x8000 else (word & 0x7FFF) + size


def flags_word(slot: int) -> int:
    """Which 16-bit word of the ring has the flags of a slot."""
    return 8 * slot + 7


class PackedVirtqueue(BaseVirtqueue):
    """One packed virtqueue, seen by the device: see `Virtqueue`.

    Args:
        memory: where buffers are looked up, and once, here, the three areas. A new memory map needs
            a new object.
        size: entries, up to 32768; need not be a power of two.
        desc, avail, used: addresses of the descriptor, driver and device areas, as
            `GuestMemory.ring` understands them.
        base: the places `avail` (16 bits) and `used` (16 bits above).
        event_idx: VIRTIO_F_EVENT_IDX was negotiated.
        indirect: VIRTIO_F_INDIRECT_DESC was negotiated.
        tracker: who remembers what is in flight, and knows what is.

    Raises:
        PeerError: what the tracker remembers is not about this ring.
        GuestError: size, base or alignment are impossible, or an area is outside guest memory.

    Context: one thread at a time.
    """

    __slots__ = (
        "_avail",
        "_desc",
        "_device_event",
        "_driver_event",
        "_replays",
        "_room",
        "_slots",
        "_tracker",
        "_unnotified",
        "_used",
        "_words",
    )

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        base: int = FIRST_BASE,
        event_idx: bool = False,
        indirect: bool = False,
        tracker: PackedTracker | None = None,
    ) -> None:
        if not 1 <= size <= QUEUE_SIZE_MAX:
            raise GuestError(f"queue size {size} is impossible", Broken.RING_ADDRESS)
        # VIRTIO 1.2 §2.8.11: the driver MUST align the parts to 16, 4 and 4 bytes.
        if desc % 16 or avail % 4 or used % 4:
            raise GuestError(
                f"misaligned rings: {desc:#x}, {avail:#x}, {used:#x}", Broken.RING_ADDRESS
            )
        super().__init__(memory, size, event_idx, indirect)
        try:
            self._desc = memory.ring(desc, 16 * size)
            self._driver_event = memory.ring(avail, EVENT_SIZE)
            self._device_event = memory.ring(used, EVENT_SIZE)
        except GuestError as error:
            raise GuestError(str(error), Broken.RING_ADDRESS) from None
        self._words = ring_words(self._desc)
        self._avail = position(base & 0xFFFF, size)
        self._used = position(base >> 16, size)
        # Whoever served the ring before may have taken some, and not given them back.
        self._room = size - (self._avail - self._used) % (2 * size)
        if base & 0x7FFF >= size or base >> 16 & 0x7FFF >= size or self._room < 0:
            raise GuestError(f"base {base:#x} in a ring of {size}", Broken.RING_ADDRESS)
        self._unnotified = 0
        # Slots and entries of chains in flight, by buffer id: a good driver gives each its own.
        self._slots: dict[int, deque[tuple[int, int]]] = {}
        self._tracker = tracker
        self._replays: deque[tuple[int, Sequence[Descriptor]]] = deque()
        if tracker is not None:
            self._resume(tracker)

    @property
    def base(self) -> int:
        """See `Virtqueue.base`."""
        size = self._size
        return event_word(self._avail, size) | event_word(self._used, size) << 16

    def pop(self) -> DescriptorChain | None:
        """See `Virtqueue.pop`."""
        if self.broken is not None:
            return None
        if self._replays:
            return self._pop_replay(*self._replays[0])
        flags = self._is_available()
        if flags is None:
            return None
        # The rest of the chain is read after the flags that made it ours.
        self._fence.weak()
        chain, descriptors = self._walk(flags)
        slots = len(descriptors)
        entry = self._tracker.begin(descriptors) if self._tracker is not None else 0
        self._avail = (self._avail + slots) % (2 * self._size)
        self._room -= slots
        self._slots.setdefault(chain.head, deque()).append((slots, entry))
        self._in_flight += 1
        return chain

    @property
    def replays(self) -> int:
        """Chains that who had the ring before has left in flight, and `pop` will give first."""
        return len(self._replays)

    def _resume(self, tracker: PackedTracker) -> None:
        """Go on where the ring was left."""
        size = self._size
        flags = [self._words[flags_word(slot)] for slot in range(size)]
        place, chains = tracker.resume(size, self._slot(self._used), flags)
        if place is None:
            return
        slots = sum(len(descriptors) for _, descriptors in chains)
        self._used = place[0] if place[1] else place[0] + size
        self._avail = (self._used + slots) % (2 * size)
        self._room = size - slots
        self._in_flight = len(chains)
        self._replays.extend(chains)
        # Whoever was killed in the middle of a batch may have written used descriptors behind the
        # first one, which the driver would come to believe in: make them available again.
        for offset in range(slots):
            behind = (self._used + offset) % (2 * size)
            if flags[behind % size] & (DESC_F_AVAIL | DESC_F_USED) == used(behind, size):
                self._words[flags_word(behind % size)] = flags[behind % size] ^ DESC_F_USED

    def _slot(self, place: int) -> tuple[int, bool]:
        return place % self._size, place < self._size

    def _pop_replay(self, entry: int, descriptors: Sequence[Descriptor]) -> DescriptorChain:
        """A chain whose descriptors in the ring may be overwritten."""
        chain = DescriptorChain(0, [], [])
        for position_, descriptor in enumerate(descriptors):
            is_last = position_ + 1 == len(descriptors)
            if self._take(chain, descriptor, is_first=not position_) != is_last:
                self._break(Broken.CHAIN_LOOP, f"chain {chain.head}: somebody has changed it")
        self._replays.popleft()
        self._slots.setdefault(chain.head, deque()).append((len(descriptors), entry))
        return chain

    def push(self, head: int, written: int) -> None:
        """See `Virtqueue.push`."""
        place, size = self._used, self._size
        slot = place % size
        # VIRTIO 1.2 §2.8.4: the length counts only where WRITE says that something was written.
        flags = used(place, size) | (DESC_F_WRITE if written else 0)
        struct.pack_into("<IH", self._desc, 16 * slot + 8, written, head)
        slots, entry = self._slots[head].popleft()
        if not self._slots[head]:
            del self._slots[head]
        self._used = (place + slots) % (2 * size)
        if self._tracker is not None:
            self._tracker.push(entry, self._slot(self._used))
        # The data and the rest before the flags, which show the descriptor to the driver.
        self._fence.weak()
        self._words[flags_word(slot)] = flags
        if self._tracker is not None:
            self._tracker.publish(entry, self._slot(self._used))
        self._room += slots
        self._unnotified += slots
        self._in_flight -= 1
        if self.mark is not None:
            self.mark(self._desc[16 * slot : 16 * slot + 16])

    def needs_notification(self) -> bool:
        """See `Virtqueue.needs_notification`."""
        passed, self._unnotified = self._unnotified, 0
        if not passed:
            return False
        if not self._has_notified:
            # Whoever served this ring before may have died between using a chain and saying so.
            self._has_notified = True
            return True
        # The driver may have changed its mind just before it looked at the flags.
        self._fence.full()
        (event,) = EVENT.unpack(self._driver_event)
        flags, place = event >> 16 & 3, event & 0xFFFF
        if not self._event_idx or flags != EVENT_DESC:
            return bool(flags != EVENT_DISABLE)
        if place & 0x7FFF >= self._size:
            return True  # nonsense; a notification too many is legal
        # VIRTIO 1.2 §2.8.10: whether the place is among those that were passed.
        behind = (self._used - 1 - position(place, self._size)) % (2 * self._size)
        return behind < passed

    def enable_notification(self) -> bool:
        """See `Virtqueue.enable_notification`."""
        event = EVENT_ENABLE << 16
        if self._event_idx:
            event = EVENT_DESC << 16 | event_word(self._avail, self._size)
        self._write_event(event)
        # The request for a kick is visible before we conclude that there is nothing.
        self._fence.full()
        pending = self._is_available() is not None or self.replays > 0
        return self.broken is None and pending

    def disable_notification(self) -> None:
        """See `Virtqueue.disable_notification`."""
        self._write_event(EVENT_DISABLE << 16)

    def mark_ring(self) -> None:
        """See `Virtqueue.mark_ring`."""
        if self.mark is not None:
            self.mark(self._desc)
            self.mark(self._device_event)

    def _write_event(self, event: int) -> None:
        EVENT.pack_into(self._device_event, 0, event)
        if self.mark is not None:
            self.mark(self._device_event)

    def _is_available(self) -> int | None:
        """The flags of the next chain's first descriptor, or None if there is no next chain."""
        flags = self._words[flags_word(self._avail % self._size)]
        expected = available(self._avail, self._size)
        return flags if flags & (DESC_F_AVAIL | DESC_F_USED) == expected else None

    def _walk(self, flags: int) -> tuple[DescriptorChain, Sequence[Descriptor]]:
        """Take the chain at `avail`, whose first flags were read; and its descriptors."""
        chain = DescriptorChain(0, [], [])
        slot, size = self._avail % self._size, self._size
        if not self._room:
            self._break(Broken.AVAIL_IDX, f"slot {slot} is available again while it is in flight")
        # VIRTIO 1.2 §2.8.17: a chain is no longer than the room that the ring has for it.
        taken: list[Descriptor] = []
        while True:
            if len(taken) == self._room:
                self._break(Broken.CHAIN_LOOP, f"chain {chain.head}: more than {self._room} slots")
            address, length, head, flags_now = DESC.unpack_from(self._desc, 16 * slot)
            taken.append(Descriptor(head, flags_now if taken else flags, length, address))
            if self._take(chain, taken[-1], is_first=len(taken) == 1):
                return chain, taken
            slot = (slot + 1) % size

    def _take(self, chain: DescriptorChain, descriptor: Descriptor, *, is_first: bool) -> bool:
        """Take a descriptor that was read; whether it is the last one."""
        head, flags, length, address = descriptor
        chain.head = head  # §2.8.6: the last one's counts
        if flags & DESC_F_INDIRECT:
            if not is_first:
                # §2.8.19: not in a chain.
                self._break(Broken.INDIRECT, f"chain {head}: a table behind a buffer")
            self._walk_table(chain, self._indirect_table(head, address, length, flags))
            return True
        self._append(chain, address, length, flags)
        return not flags & DESC_F_NEXT

    def _walk_table(self, chain: DescriptorChain, table: bytes) -> None:
        """Take all descriptors of an indirect table: §2.8.7, only WRITE has a meaning there."""
        for address, length, _, flags in DESC.iter_unpack(table):
            self._append(chain, address, length, flags)

    def _append(self, chain: DescriptorChain, address: int, length: int, flags: int) -> None:
        """Add one buffer."""
        if flags & DESC_F_WRITE:
            views = chain.writable
            chain.saw_writable = True
        elif chain.saw_writable:
            # VIRTIO 1.2 §2.8.17: writable elements come after all readable ones.
            self._break(Broken.ORDER, f"chain {chain.head}: readable behind writable")
        else:
            views = chain.readable
        if length:
            try:
                views += self._memory.view(address, length)
            except GuestError:
                chain.lacks(views)
