"""Which chains of a packed ring are in flight, written into memory that outlives this process.

vhost-user, "Inflight I/O tracking"; the readable reference of the engine's inflight_packed.c.

Theory of operation. A used descriptor may overwrite those of a chain that is in flight, so the region
has copies of them all, in entries that form a free list. Entries are taken from it and given back as
in transactions, of which there are two:

- A chain that is taken is in flight once `old_free_head` says so; before that, nothing has happened.
- A chain that is given back is done once the flags of its used descriptor, at `old_used_idx`, do not
  say any more that the slot is available; before that, nothing has happened.

So one of two free lists counts, and what is not in it is in flight; the ring goes on behind it. The
used position and its wrap counter are stored at once: one without the other is another place.

What the front-end writes into the region is believed if the free list and the chains in flight have
each entry once; loops end with the number of entries.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vhostblk.errors import PeerError
from vhostblk.vhost.inflight import PACKED_ENTRY, PACKED_HEADER, VERSION
from vhostblk.virtio.tracking import Descriptor, PackedResumption

__all__ = ["InflightPacked"]

# 16-bit words of the header, and the 64-bit word of the used positions, new and old.
_VERSION, _DESC_NUM, _FREE_HEAD, _OLD_FREE_HEAD = 4, 5, 6, 7
_POSITIONS = 2
_USED = struct.Struct("=HHBB2x")
_HEAD, _SIZE = PACKED_HEADER.size, PACKED_ENTRY.size
_DESC = struct.Struct("=HHIQ")  # id, flags, len, addr: from byte 16 of an entry


class InflightPacked:
    """One ring's part of a region; a `virtio.tracking.PackedTracker`.

    Args:
        part: shared memory, aligned to 8 bytes; borrowed.

    Context: one thread at a time, as its queue.
    """

    def __init__(self, part: memoryview) -> None:
        self._bytes = part.cast("B")
        self._words = self._bytes.cast("H")
        self._quads = self._bytes.cast("Q")
        self._counter = 0
        self._next: list[int] = []
        self._chains: dict[int, tuple[int, int]] = {}  # last entry and number, by first entry
        self._free_head = 0
        self._used = (0, True)

    def resume(
        self, size: int, used: tuple[int, bool], slot_flags: Sequence[int]
    ) -> PackedResumption:
        """See `PackedTracker.resume`."""
        version = self._words[_VERSION]
        if version == 0:
            self._begin_afresh(size, used)
            return PackedResumption(None, ())
        if version != VERSION or self._quads[0]:
            raise PeerError(f"an in-flight region of version {version}")
        return self._go_on(size, slot_flags)

    def begin(self, descriptors: Sequence[Descriptor]) -> int:
        """See `PackedTracker.begin`."""
        first = entry = last = self._free_head
        for descriptor in descriptors:
            _DESC.pack_into(self._bytes, _HEAD + _SIZE * entry + 16, *descriptor)
            last, entry = entry, self._next[entry]
        head = (_HEAD + _SIZE * first) // 2
        self._words[head + 3] = len(descriptors)
        self._words[head + 2] = last
        self._quads[head // 4 + 1] = self._counter
        self._bytes[2 * head] = 1
        self._words[_FREE_HEAD] = entry
        self._words[_OLD_FREE_HEAD] = entry  # from here on it is in flight
        self._counter = self._counter + 1 & 0xFFFF_FFFF_FFFF_FFFF
        self._free_head = entry
        self._chains[first] = (last, len(descriptors))
        return first

    def push(self, entry: int, used: tuple[int, bool]) -> None:
        """See `PackedTracker.push`."""
        last, _ = self._chains.pop(entry)
        self._next[last] = self._free_head
        self._words[(_HEAD + _SIZE * last) // 2 + 1] = self._free_head
        self._free_head = entry
        self._words[_FREE_HEAD] = entry
        self._store_used(used, self._used)

    def publish(self, entry: int, used: tuple[int, bool]) -> None:
        """See `PackedTracker.publish`."""
        self._bytes[_HEAD + _SIZE * entry] = 0
        self._words[_OLD_FREE_HEAD] = self._free_head
        self._store_used(used, used)

    def _store_used(self, new: tuple[int, bool], old: tuple[int, bool]) -> None:
        (word,) = struct.unpack("=Q", _USED.pack(new[0], old[0], new[1], old[1]))
        self._quads[_POSITIONS] = word
        self._used = old

    def _begin_afresh(self, size: int, used: tuple[int, bool]) -> None:
        self._next = list(range(1, size + 1))
        for entry, following in enumerate(self._next):
            self._bytes[_HEAD + _SIZE * entry] = 0
            self._words[(_HEAD + _SIZE * entry) // 2 + 1] = following
        self._quads[0] = 0
        self._words[_DESC_NUM] = size
        self._words[_FREE_HEAD] = 0
        self._words[_OLD_FREE_HEAD] = 0
        self._store_used(used, used)
        self._words[_VERSION] = VERSION  # from here on the rest counts

    def _go_on(self, size: int, slot_flags: Sequence[int]) -> PackedResumption:
        entries = self._words[_DESC_NUM]
        if not size <= entries <= (len(self._bytes) - _HEAD) // _SIZE:
            raise PeerError(f"an in-flight region for {entries} descriptors, the ring has {size}")
        new_slot, old_slot, new_wrap, old_wrap = _USED.unpack(
            self._quads[_POSITIONS].to_bytes(8, "little")
        )
        new, old = (new_slot, bool(new_wrap & 1)), (old_slot, bool(old_wrap & 1))
        if new[0] >= size or old[0] >= size:
            raise PeerError("an in-flight region whose used index is outside of the ring")
        # Whether the driver was shown what the last transaction was about.
        is_shown = new != old and slot_flags[old[0]] & 0x8080 != (0x80 if old[1] else 0x8000)
        used = new if is_shown else old
        head = self._words[_FREE_HEAD if is_shown else _OLD_FREE_HEAD]
        table = [PACKED_ENTRY.unpack_from(self._bytes, _HEAD + _SIZE * i) for i in range(entries)]
        self._next = [row[1] for row in table]
        # One more than there are: of those one comes twice.
        free = self._follow(head, entries + 1, set(), entries)
        chains = self._in_flight(table, set(free))
        slots = sum(len(chain) for chain in chains)
        if slots > size or slots + len(free) != entries:
            raise PeerError("an in-flight region of another ring")
        self._words[_FREE_HEAD] = head
        for entry in free:
            if table[entry][0]:
                self._bytes[_HEAD + _SIZE * entry] = 0
        self._words[_OLD_FREE_HEAD] = head
        self._store_used(used, used)
        self._free_head = head
        chains.sort(key=lambda chain: table[chain[0]][4])
        if chains:
            self._counter = table[chains[-1][0]][4] + 1 & 0xFFFF_FFFF_FFFF_FFFF
        self._chains = {chain[0]: (chain[-1], len(chain)) for chain in chains}
        # id, flags, len, addr of each
        return PackedResumption(
            used, [(chain[0], [Descriptor(*table[i][5:]) for i in chain]) for chain in chains]
        )

    def _in_flight(self, table: Sequence[tuple[int, ...]], seen: set[int]) -> list[list[int]]:
        """Entries of each chain that is not in the free list."""
        chains = []
        free = set(seen)
        for entry, (mark, _, last, number, *_) in enumerate(table):
            if mark > 1:
                raise PeerError("an in-flight region with nonsense in it")
            if mark and entry not in free:
                chain = self._follow(entry, number, seen, len(table))
                if len(chain) != number or not number or chain[-1] != last:
                    raise PeerError("an in-flight region with a chain that is cut")
                seen.update(chain)
                chains.append(chain)
        return chains

    def _follow(self, entry: int, most: int, seen: set[int], entries: int) -> list[int]:
        """At most so many entries of a list. Raises: PeerError: one comes twice."""
        found: dict[int, None] = {}
        while len(found) < most and entry < entries:
            if entry in found or entry in seen:
                raise PeerError("an in-flight region whose entries are in two lists")
            found[entry] = None
            entry = self._next[entry]
        return list(found)
