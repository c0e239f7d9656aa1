"""Which chains of a split ring are in flight, written into memory that outlives this process.

vhost-user, "Inflight I/O tracking"; the readable reference of the engine's inflight.c.

Theory of operation. A chain is in flight from when it was popped until used.idx counts it; so with n
of them in flight used.idx + n chains were popped. What the front-end says of that (SET_VRING_BASE)
is a guess: it did not see them go.

Each line below that stores does so once, and the lines are in an order that makes sense wherever it
ends:

- The counter before `inflight`, and both before the next chain's: what is marked are the oldest.
- `next` and `last_batch_head` before used.idx: what used.idx counts and `used_idx` does not is in
  the list.
- used.idx before `inflight` is 0: no chain is lost, but one that is used may still be marked.
- All of the batch before `used_idx`: until then the list says which.

No barriers are needed: whoever reads this after our death sees what we have stored, in order.

The front-end can write what it likes into the region. So it is read once, and believed if it makes
sense; loops end with the ring's size.
"""

from __future__ import annotations

from vhostblk.errors import PeerError
from vhostblk.vhost.inflight import SPLIT_ENTRY, SPLIT_HEADER, VERSION
from vhostblk.virtio.tracking import Resumption

__all__ = ["InflightSplit"]

# 16-bit words of the header, and 16-bit words, bytes and 64-bit words of the first entry.
_VERSION, _DESC_NUM, _LAST_BATCH_HEAD, _USED_IDX = 4, 5, 6, 7
_NEXT, _INFLIGHT, _COUNTER = 11, 16, 3
# From one entry to the next.
_WORDS, _BYTES, _QUADS = SPLIT_ENTRY.size // 2, SPLIT_ENTRY.size, SPLIT_ENTRY.size // 8


class InflightSplit:
    """One ring's part of a region; a `virtio.tracking.SplitTracker`.

    Args:
        part: shared memory, aligned to 8 bytes; borrowed.

    Context: one thread at a time, as its queue.
    """

    def __init__(self, part: memoryview) -> None:
        self._bytes = part.cast("B")
        self._words = self._bytes.cast("H")
        self._quads = self._bytes.cast("Q")
        self._counter = 0
        self._last_batch_head = 0
        self._batch: list[int] = []

    def resume(self, size: int, used_idx: int, avail_idx: int, base: int) -> Resumption:
        """See `SplitTracker.resume`."""
        version = self._words[_VERSION]
        if version == 0:
            self._begin_afresh(size, used_idx)
            return Resumption(base, ())
        if version != VERSION or self._quads[0]:
            raise PeerError(f"an in-flight region of version {version}")
        return self._go_on(size, used_idx, avail_idx)

    def begin(self, head: int) -> None:
        """See `SplitTracker.begin`."""
        self._quads[_COUNTER + _QUADS * head] = self._counter
        self._bytes[_INFLIGHT + _BYTES * head] = 1
        self._counter = self._counter + 1 & 0xFFFF_FFFF_FFFF_FFFF

    def push(self, head: int) -> None:
        """See `SplitTracker.push`."""
        self._words[_NEXT + _WORDS * head] = self._last_batch_head
        self._words[_LAST_BATCH_HEAD] = head
        self._last_batch_head = head
        self._batch.append(head)

    def publish(self, used_idx: int) -> None:
        """See `SplitTracker.publish`."""
        for head in self._batch:
            self._bytes[_INFLIGHT + _BYTES * head] = 0
        self._words[_USED_IDX] = used_idx
        self._batch.clear()

    def _begin_afresh(self, size: int, used_idx: int) -> None:
        """Nothing is believed of what was never used, or of a device that was reset."""
        for head in range(size):
            self._bytes[_INFLIGHT + _BYTES * head] = 0
        self._quads[0] = 0
        self._words[_DESC_NUM] = size
        self._words[_USED_IDX] = used_idx
        self._words[_VERSION] = VERSION  # from here on the rest counts

    def _go_on(self, size: int, used_idx: int, avail_idx: int) -> Resumption:
        entries = self._words[_DESC_NUM]
        room = (len(self._bytes) - SPLIT_HEADER.size) // SPLIT_ENTRY.size
        if not size <= entries <= room:
            raise PeerError(f"an in-flight region for {entries} descriptors, the ring has {size}")
        marked = self._marked(entries)
        batch = used_idx - self._words[_USED_IDX] & 0xFFFF
        last = self._words[_LAST_BATCH_HEAD]
        used = self._last_batch(size, last, batch)
        in_flight = [head for head in marked if head not in used]
        # Where nothing is in flight used_idx may be of another life of the ring.
        if in_flight and (
            batch > size
            or max(in_flight) >= size
            or len(in_flight) > (avail_idx - used_idx & 0xFFFF)
        ):
            raise PeerError(f"an in-flight region of another ring: {len(in_flight)} in flight")
        for head in used:
            self._bytes[_INFLIGHT + _BYTES * head] = 0
        self._words[_USED_IDX] = used_idx
        counters = {head: self._quads[_COUNTER + _QUADS * head] for head in in_flight}
        in_flight.sort(key=lambda head: counters[head])
        if in_flight:
            self._counter = counters[in_flight[-1]] + 1 & 0xFFFF_FFFF_FFFF_FFFF
        self._last_batch_head = last if last < size else 0
        return Resumption(used_idx + len(in_flight) & 0xFFFF, in_flight)

    def _marked(self, entries: int) -> list[int]:
        flags = bytes(self._bytes[_INFLIGHT : _INFLIGHT + _BYTES * entries : _BYTES])
        if max(flags) > 1:
            raise PeerError("an in-flight region with nonsense in it")
        return [head for head, flag in enumerate(flags) if flag]

    def _last_batch(self, size: int, last: int, batch: int) -> set[int]:
        """Chains that used.idx counts, whatever else the region says of them."""
        used: set[int] = set()
        if batch > size:
            return used
        for _ in range(batch):
            if last >= size:
                break
            used.add(last)
            last = self._words[_NEXT + _WORDS * last]
        return used
