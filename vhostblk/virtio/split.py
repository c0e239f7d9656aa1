"""The device's half of a split virtqueue: the readable reference the engine is measured against.

VIRTIO 1.2 §2.7. Everything the driver can do wrong ends in a `GuestError` with a `Broken` reason,
the same for the same bytes as in the engine (`enum vb_broken`), after a number of steps bounded by
the queue size.

Theory of operation: two free-running 16-bit counters belong to the device, `next_avail` (chains
popped) and the used index (chains pushed). The driver owns `avail.idx`. Always::

    pushed  <=  popped  <=  avail.idx  <=  pushed + size        (modulo 65536)

because every chain that is not yet used occupies a descriptor. The first two are ours; the third is
checked each time `avail.idx` is read, and bounds the requests a driver can have in flight.

Notifications::

    disable_notification()               while working, further kicks are of no use
    while chain := pop(): ... push()
    if needs_notification(): call        once per batch
    if enable_notification(): again      the driver added some before it saw that it has to kick

Limits of a chain: descriptors in the queue's own table are bounded by the queue size, as
§2.7.5.3.1 demands. A table of indirect descriptors may be longer than that: Linux sizes its tables
by the device's seg_max only and not by the queue, so a queue of 64 gets tables of 128 entries (126
segments, header, status). `INDIRECT_ENTRIES_MIN` allows for these.

Left to the driver: buffers of length 0 (their address is not looked at), bytes in all of a chain.

Knows nothing of eventfds, of threads, or of what the chains mean.
"""

from __future__ import annotations

import struct
from collections import deque

from vhostblk.errors import GuestError
from vhostblk.virtio.chain import Broken, DescriptorChain
from vhostblk.virtio.memory import GuestMemory, ring_words
from vhostblk.virtio.tracking import Resumption, SplitTracker
from vhostblk.virtio.virtqueue import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    INDIRECT_ENTRIES_MIN,
    QUEUE_SIZE_MAX,
    BaseVirtqueue,
)

__all__ = [
    "DESC",
    "DESC_F_INDIRECT",
    "DESC_F_NEXT",
    "DESC_F_WRITE",
    "INDIRECT_ENTRIES_MIN",
    "QUEUE_SIZE_MAX",
    "SplitVirtqueue",
    "avail_size",
    "desc_size",
    "used_size",
]

DESC = struct.Struct("<QIHH")
"""VIRTIO 1.2 §2.7.5: address, length, flags, next."""
USED_ELEM = struct.Struct("<II")
"""VIRTIO 1.2 §2.7.8: id, len."""

USED_F_NO_NOTIFY = 1
AVAIL_F_NO_INTERRUPT = 1

# 16-bit words before the entries of both rings: flags, idx.
FLAGS, IDX, ENTRIES = 0, 1, 2


def desc_size(size: int) -> int:
    """Bytes of the descriptor table of a queue of `size` (VIRTIO 1.2 §2.7)."""
    return 16 * size


def avail_size(size: int) -> int:
    """Bytes of the available ring of a queue of `size`, used_event included (VIRTIO 1.2 §2.7)."""
    return 6 + 2 * size


def used_size(size: int) -> int:
    """Bytes of the used ring of a queue of `size`, avail_event included (VIRTIO 1.2 §2.7)."""
    return 6 + 8 * size


class SplitVirtqueue(BaseVirtqueue):
    """One split virtqueue, seen by the device: see `Virtqueue`.

    Args:
        memory: where buffers are looked up, and once, here, the three ring areas. A new memory map
            needs a new object.
        size: entries; a power of two up to 32768.
        desc, avail, used: addresses of the areas, as `GuestMemory.ring` understands them.
        base: the next available index to pop.
        event_idx: VIRTIO_F_EVENT_IDX was negotiated.
        indirect: VIRTIO_F_INDIRECT_DESC was negotiated.
        tracker: who remembers what is in flight, and knows what is.

    Raises:
        GuestError: size or alignment are illegal, or an area is outside guest memory.
        PeerError: what the tracker remembers is not about this ring.

    Context: one thread at a time.
    """

    __slots__ = (
        "_avail",
        "_avail_idx",
        "_desc",
        "_mask",
        "_notified_used",
        "_replays",
        "_tracker",
        "_used",
        "_used_idx",
        "_used_words",
        "next_avail",
    )

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        base: int = 0,
        event_idx: bool = False,
        indirect: bool = False,
        tracker: SplitTracker | None = None,
    ) -> None:
        if not 1 <= size <= QUEUE_SIZE_MAX or size & (size - 1):
            raise GuestError(f"queue size {size} is not a power of two", Broken.RING_ADDRESS)
        # VIRTIO 1.2 §2.7.1: the driver MUST align the parts to 16, 2 and 4 bytes.
        if desc % 16 or avail % 2 or used % 4:
            raise GuestError(
                f"misaligned rings: {desc:#x}, {avail:#x}, {used:#x}", Broken.RING_ADDRESS
            )
        super().__init__(memory, size, event_idx, indirect)
        try:
            self._desc = memory.ring(desc, desc_size(size))
            self._avail = ring_words(memory.ring(avail, avail_size(size)))
            self._used = memory.ring(used, used_size(size))
        except GuestError as error:
            raise GuestError(str(error), Broken.RING_ADDRESS) from None
        self._used_words = ring_words(self._used)
        self._mask = size - 1
        # The used index survives a restart of the ring only in the ring itself.
        self._used_idx = self._used_words[IDX]
        self._notified_used = self._used_idx
        self._tracker = tracker
        start = Resumption(base, ())
        if tracker is not None:
            start = tracker.resume(size, self._used_idx, self._avail[IDX], base)
        self._replays = deque(start.heads)
        self._in_flight = len(self._replays)
        self._avail_idx = start.next_avail & 0xFFFF
        self.next_avail = start.next_avail & 0xFFFF
        """Free-running index of the next chain to pop."""

    @property
    def base(self) -> int:
        """See `Virtqueue.base`."""
        return self.next_avail

    @property
    def replays(self) -> int:
        """See `Virtqueue.replays`."""
        return len(self._replays)

    def pop(self) -> DescriptorChain | None:
        """See `Virtqueue.pop`."""
        if self.broken is not None:
            return None
        if self._replays:
            chain = self._walk(self._replays[0])
            self._replays.popleft()
            return chain
        position = self.next_avail
        if position == self._avail_idx:
            avail_idx = self._avail[IDX]
            if avail_idx == position:
                return None
            # VIRTIO 1.2 §2.7.13: chains in flight occupy descriptors, so they and the new ones
            # together cannot be more than the ring has.
            if (avail_idx - position & 0xFFFF) + self._in_flight > self._size:
                self._break(
                    Broken.AVAIL_IDX,
                    f"avail.idx {avail_idx} with {position} popped, {self._in_flight} in flight",
                )
            # Entries and descriptors are read after the index that made them ours.
            self._fence.weak()
            self._avail_idx = avail_idx
        head = self._avail[ENTRIES + (position & self._mask)]
        if head >= self._size:
            self._break(Broken.HEAD, f"head {head} of a table of {self._size}")
        chain = self._walk(head)
        if self._tracker is not None:
            self._tracker.begin(head)
        self.next_avail = position + 1 & 0xFFFF
        self._in_flight += 1
        return chain

    def push(self, head: int, written: int) -> None:
        """See `Virtqueue.push`."""
        used_idx = self._used_idx
        USED_ELEM.pack_into(self._used, 4 + 8 * (used_idx & self._mask), head, written)
        if self._tracker is not None:
            self._tracker.push(head)
        # VIRTIO 1.2 §2.7.8.2: the data and the element before the index.
        self._fence.weak()
        self._used_idx = used_idx = used_idx + 1 & 0xFFFF
        self._used_words[IDX] = used_idx
        if self._tracker is not None:
            self._tracker.publish(used_idx)
        self._in_flight -= 1
        if self.mark is not None:
            element = 4 + 8 * (used_idx - 1 & self._mask)
            self.mark(self._used[element : element + USED_ELEM.size])
            self.mark(self._used[2 * IDX : 2 * IDX + 2])

    def needs_notification(self) -> bool:
        """See `Virtqueue.needs_notification`; before 65536 pushes are outstanding (§2.7.7.2)."""
        before, now = self._notified_used, self._used_idx
        if before == now:
            return False
        self._notified_used = now
        if not self._has_notified:
            # Whoever served this ring before may have died between using a chain and saying so.
            self._has_notified = True
            return True
        # The driver may have changed its mind just before it looked at the used index.
        self._fence.full()
        if not self._event_idx:
            return not self._avail[FLAGS] & AVAIL_F_NO_INTERRUPT
        used_event = self._avail[ENTRIES + self._size]
        return now - used_event - 1 & 0xFFFF < now - before & 0xFFFF

    def enable_notification(self) -> bool:
        """See `Virtqueue.enable_notification`."""
        if self._event_idx:
            self._write_used_word(ENTRIES + 4 * self._size, self.next_avail)
        else:
            self._write_used_word(FLAGS, 0)
        # The request for a kick is visible before we conclude that there is nothing.
        self._fence.full()
        pending = self._avail[IDX] != self.next_avail or self.replays
        return self.broken is None and bool(pending)

    def disable_notification(self) -> None:
        """See `Virtqueue.disable_notification`."""
        # With EVENT_IDX there is nothing to write: avail_event, once passed, asks for no more.
        if not self._event_idx:
            self._write_used_word(FLAGS, USED_F_NO_NOTIFY)

    def mark_ring(self) -> None:
        """See `Virtqueue.mark_ring`."""
        if self.mark is not None:
            # The log need not reach what only EVENT_IDX gives a meaning.
            self.mark(self._used if self._event_idx else self._used[:-2])

    def _write_used_word(self, position: int, value: int) -> None:
        self._used_words[position] = value
        if self.mark is not None:
            self.mark(self._used[2 * position : 2 * position + 2])

    def _walk(self, head: int) -> DescriptorChain:
        """Follow the chain that starts at `head`, which is in range, to its end."""
        chain = DescriptorChain(head, [], [])
        unpack, view = DESC.unpack_from, self._memory.view
        table: memoryview | bytes = self._desc
        entries = left = self._size
        index = head
        saw_writable = False
        while True:
            left -= 1
            if left < 0:
                self._break(Broken.CHAIN_LOOP, f"chain {head} has more than {entries} descriptors")
            address, length, flags, following = unpack(table, 16 * index)
            if flags & DESC_F_INDIRECT:
                if table is not self._desc:
                    self._break(Broken.INDIRECT, f"chain {head}: a table inside a table")
                table = self._indirect_table(head, address, length, flags)
                entries = left = length // 16
                index = 0
                continue
            if flags & DESC_F_WRITE:
                views = chain.writable
                saw_writable = True
            elif saw_writable:
                # VIRTIO 1.2 §2.7.4.2: writable elements come after all readable ones.
                self._break(Broken.ORDER, f"chain {head}: readable behind writable")
            else:
                views = chain.readable
            if length:
                try:
                    views += view(address, length)
                except GuestError:
                    chain.lacks(views)
            if not flags & DESC_F_NEXT:
                return chain
            if following >= entries:
                self._break(Broken.CHAIN_NEXT, f"chain {head}: next {following} of {entries}")
            index = following
