"""Driver and device against each other, in any order, with any framing, around every wrap."""

from __future__ import annotations

from collections import deque
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.rings import PackedRingPair, RingPair
from tests.schedule import HUNT
from vhostblk.virtio.chain import DescriptorChain
from vhostblk.virtio.driver import Used

ALWAYS = -1
"""A notification for every chain is wanted."""

lengths = st.lists(st.integers(0, 9), max_size=4)


class Ring(RuleBasedStateMachine):
    """A queue and the plainest model of it: three deques and two counters.

    Counters count slots of the ring: one for each chain of a split ring, one for each descriptor of
    a packed one. There, a place comes again after two rounds, and so does a wish to hear of it.

    Invariants: chains come out as they went in, in order; used elements come back in the order of
    pushes; a side that was promised a notification gets one, and one that was not does not.
    """

    pair: RingPair | PackedRingPair
    packed = False

    @initialize(
        size=st.sampled_from([1, 2, 4, 8]),
        event_idx=st.booleans(),
        start=st.sampled_from([0, 1, 65528, 65535]),
    )
    def start(self, size: int, event_idx: bool, start: int) -> None:
        self.pair = (PackedRingPair if self.packed else RingPair)(
            size - self.packed * (size > 2),
            event_idx=event_idx,
            indirect=True,
            indirect_entries=8,
            start=start,
        )
        self.round = 2 * self.pair.driver.size if self.packed else 1 << 16
        # Head, what is readable, how much is writable, slots.
        self.added: deque[tuple[int, bytes, int, int]] = deque()
        self.available: deque[tuple[int, bytes, int, int]] = deque()
        self.popped: list[tuple[DescriptorChain, int]] = []
        self.pushed: deque[tuple[Used, int]] = deque()
        self.tokens: dict[int, int] = {}
        self.serial = 0
        # Absolute counters: how many slots, ever; and at which count a notification is wanted.
        self.published_ever = self.pushed_ever = 0
        self.kick_looked = self.call_looked = 0
        self.has_called = False
        # Both events are 0 in fresh memory, which is that far behind a start in the middle.
        self.kick_wanted_from: int | None = ALWAYS
        if event_idx and not self.packed:
            self.kick_wanted_from = -start & 0xFFFF
        self.call_wanted_from: int | None = self.kick_wanted_from

    @rule(readable=lengths, writable=lengths, indirect=st.booleans())
    def add(self, readable: list[int], writable: list[int], indirect: bool) -> None:
        needed = 1 if indirect else len(readable) + len(writable)
        if (not readable and not writable) or needed > self.pair.driver.free_descriptors:
            return
        self.serial += 1
        content = bytes((self.serial + i) % 256 for i in range(sum(readable)))
        at = 128 * (self.serial % 512)
        buffers, offset = [], 0
        for length in readable + writable:
            buffers.append(self.pair.data(at + offset, length))
            offset += length
        for buffer in buffers[: len(readable)]:
            start = buffer.gpa - buffers[0].gpa
            self.pair.bytes_at(buffer)[:] = content[start : start + buffer.length]
        head = self.pair.driver.add(
            buffers[: len(readable)], buffers[len(readable) :], token=self.serial, indirect=indirect
        )
        assert head not in self.tokens
        self.tokens[head] = self.serial
        self.added.append((head, content, sum(writable), needed if self.packed else 1))

    @rule()
    def publish(self) -> None:
        slots = sum(chain[3] for chain in self.added)
        assert self.pair.driver.publish() == slots
        self.published_ever += slots
        self.available += self.added
        self.added.clear()

    def is_wanted(self, wanted_from: int | None, new: range) -> bool:
        """Whether one of the `new` slots is what the other side wants to hear of."""
        if wanted_from is None:
            return False
        if wanted_from == ALWAYS:
            return bool(new)
        return any((slot - wanted_from) % self.round == 0 for slot in new)

    @rule()
    def look_whether_to_kick(self) -> None:
        new = range(self.kick_looked, self.published_ever)
        assert self.pair.driver.kick_needed() == self.is_wanted(self.kick_wanted_from, new)
        self.kick_looked = self.published_ever

    @rule()
    def pop(self) -> None:
        chain = self.pair.device.pop()
        if not self.available:
            assert chain is None
            return
        head, content, writable, slots = self.available.popleft()
        assert chain is not None
        assert chain.head == head
        assert b"".join(chain.readable) == content
        assert sum(map(len, chain.writable)) == writable
        self.popped.append((chain, slots))

    @precondition(lambda self: self.popped)
    @rule(data=st.data())
    def push(self, data: Any) -> None:
        chain, slots = self.popped.pop(data.draw(st.integers(0, len(self.popped) - 1)))
        self.serial += 1
        self.pair.device.push(chain.head, self.serial)
        self.pushed_ever += slots
        self.pushed.append((Used(chain.head, self.serial, self.tokens[chain.head]), slots))

    @rule()
    def look_whether_to_call(self) -> None:
        new = range(self.call_looked, self.pushed_ever)
        expected = self.is_wanted(self.call_wanted_from, new)
        if not self.has_called:
            expected = bool(new)
        assert self.pair.device.needs_notification() == expected
        self.has_called |= expected
        self.call_looked = self.pushed_ever

    @rule()
    def reap(self) -> None:
        used = self.pair.driver.reap()
        assert used == [element for element, _ in self.pushed]
        self.pushed.clear()
        for element in used:
            del self.tokens[element.head]

    @rule()
    def device_sleeps(self) -> None:
        assert self.pair.device.enable_notification() == bool(self.available)
        ahead = sum(chain[3] for chain in self.available)
        self.kick_wanted_from = self.published_ever - ahead if self.pair.event_idx else ALWAYS

    @rule()
    def device_works(self) -> None:
        self.pair.device.disable_notification()
        if self.packed or not self.pair.event_idx:
            self.kick_wanted_from = None

    @rule()
    def driver_sleeps(self) -> None:
        assert self.pair.driver.enable_interrupts() == bool(self.pushed)
        ahead = sum(slots for _, slots in self.pushed)
        self.call_wanted_from = self.pushed_ever - ahead if self.pair.event_idx else ALWAYS

    @rule()
    def driver_works(self) -> None:
        self.pair.driver.disable_interrupts()
        if self.packed or not self.pair.event_idx:
            self.call_wanted_from = None

    @precondition(lambda self: not self.popped)
    @rule()
    def restart(self) -> None:
        """What GET_VRING_BASE and a start with the same base do."""
        self.look_whether_to_call()
        self.pair.start_device(self.pair.device.base)
        self.has_called = False

    @invariant()
    def chains_are_somewhere(self) -> None:
        if hasattr(self, "pair"):
            assert self.pair.device.in_flight == len(self.popped)
            assert self.pair.driver.in_flight == len(self.tokens)


class PackedRing(Ring):
    """The same with the other format; sizes need not be powers of two."""

    packed = True


TestRing = Ring.TestCase
TestRing.settings = settings(max_examples=150 * HUNT, stateful_step_count=60)

TestPackedRing = PackedRing.TestCase
TestPackedRing.settings = settings(max_examples=150 * HUNT, stateful_step_count=60)
