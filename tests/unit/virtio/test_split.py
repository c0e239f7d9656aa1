"""The device half of the split ring: what it hands out, what it refuses, whom it notifies."""

from __future__ import annotations

from typing import Any

import pytest

from tests.rings import BASE, RingPair
from vhostblk.errors import GuestError
from vhostblk.virtio.chain import Broken
from vhostblk.virtio.driver import Buffer
from vhostblk.virtio.memory import FlatMemory
from vhostblk.virtio.split import DESC, INDIRECT_ENTRIES_MIN, SplitVirtqueue

NEXT, WRITE, INDIRECT = 1, 2, 4


def break_by_pop(pair: RingPair) -> Broken:
    """Pop, expect the queue to break, check that it stays so, and say why it broke."""
    before = pair.device.next_avail
    with pytest.raises(GuestError) as caught:
        pair.device.pop()
    assert caught.value.reason == pair.device.broken
    assert pair.device.pop() is None
    assert not pair.device.enable_notification()
    assert pair.device.next_avail == before
    assert pair.device.broken is not None
    return pair.device.broken


# ---------------------------------------------------------------- what a good driver sees


def test_pop_of_an_empty_ring_is_none() -> None:
    assert RingPair().device.pop() is None


def test_chain_keeps_order_and_direction_of_its_buffers() -> None:
    pair = RingPair()
    pair.bytes_at(pair.data(0, 4))[:] = b"head"
    pair.bytes_at(pair.data(100, 3))[:] = b"out"
    head = pair.driver.add(
        [pair.data(0, 4), pair.data(100, 3)], [pair.data(200, 5), pair.data(300, 1)]
    )
    assert pair.device.pop() is None, "nothing is visible before publish"
    pair.driver.publish()
    chain = pair.device.pop()
    assert chain is not None
    assert chain.head == head
    assert [bytes(view) for view in chain.readable] == [b"head", b"out"]
    assert [len(view) for view in chain.writable] == [5, 1]
    chain.writable[0][:] = b"reply"
    assert bytes(pair.bytes_at(pair.data(200, 5))) == b"reply"


def test_push_returns_head_and_length_to_the_driver() -> None:
    pair = RingPair()
    head = pair.driver.add([pair.data(0, 1)], [], token="mine")
    pair.driver.publish()
    chain = pair.device.pop()
    assert chain is not None
    assert pair.device.in_flight == 1
    pair.device.push(chain.head, 17)
    assert pair.driver.reap() == [(head, 17, "mine")]
    assert pair.device.in_flight == 0


def test_full_ring_of_one_entry_works_past_the_wrap_of_the_index() -> None:
    pair = RingPair(1, start=65535)
    for turn in range(3):
        pair.driver.add([], [pair.data(turn, 1)])
        pair.driver.publish()
        chain = pair.device.pop()
        assert chain is not None
        pair.device.push(chain.head, turn)
        assert [used.written for used in pair.driver.reap()] == [turn]
    assert pair.device.next_avail == 2


def test_zero_length_buffers_are_legal_and_have_no_view() -> None:
    pair = RingPair()
    pair.driver.add([Buffer(2**63, 0), pair.data(0, 1)], [Buffer(0, 0)])
    pair.driver.publish()
    chain = pair.device.pop()
    assert chain is not None
    assert ([len(v) for v in chain.readable], chain.writable) == ([1], [])


def test_restart_continues_at_base_and_at_the_used_index_in_memory() -> None:
    pair = RingPair(4)
    for _ in range(3):
        pair.driver.add([pair.data(0, 1)], [])
        pair.driver.publish()
        chain = pair.device.pop()
        assert chain is not None
        pair.device.push(chain.head, 0)
        pair.driver.reap()
    device = pair.start_device(pair.device.next_avail)
    pair.driver.add([pair.data(0, 2)], [])
    pair.driver.publish()
    chain = device.pop()
    assert chain is not None
    device.push(chain.head, 9)
    assert [used.written for used in pair.driver.reap()] == [9]


def test_indirect_chain_looks_like_a_direct_one() -> None:
    pair = RingPair(2, indirect=True, indirect_entries=8)
    pair.driver.add(
        [pair.data(i, 1) for i in range(4)],
        [pair.data(100 + i, 2) for i in range(4)],
        indirect=True,
    )
    pair.driver.publish()
    chain = pair.device.pop()
    assert chain is not None
    assert [len(v) for v in chain.readable] == [1] * 4
    assert [len(v) for v in chain.writable] == [2] * 4


def test_direct_descriptors_may_precede_an_indirect_one() -> None:
    pair = RingPair(4, indirect=True, indirect_entries=4)
    gpa, table = pair.driver.table(1)
    DESC.pack_into(table, 0, pair.data_gpa, 7, 0, 0)
    pair.driver.write_descriptor(0, pair.data_gpa, 16, NEXT, 1)
    # VIRTIO 1.2 §2.7.5.3.2: WRITE is to be ignored here.
    pair.driver.write_descriptor(1, gpa, 16, INDIRECT | WRITE)
    pair.offer(0)
    chain = pair.device.pop()
    assert chain is not None
    assert [len(v) for v in chain.readable] == [16, 7]


def test_indirect_table_may_be_longer_than_a_small_queue() -> None:
    pair = RingPair(2, indirect=True, indirect_entries=INDIRECT_ENTRIES_MIN)
    pair.driver.add([], [pair.data(i, 1) for i in range(INDIRECT_ENTRIES_MIN)], indirect=True)
    pair.driver.publish()
    chain = pair.device.pop()
    assert chain is not None
    assert len(chain.writable) == INDIRECT_ENTRIES_MIN


def test_chain_as_long_as_the_queue_is_legal() -> None:
    pair = RingPair(8)
    pair.driver.add([pair.data(i, 1) for i in range(8)], [])
    pair.driver.publish()
    chain = pair.device.pop()
    assert chain is not None
    assert len(chain.readable) == 8


# ---------------------------------------------------------------- what a bad driver does


@pytest.mark.parametrize("size", [0, 3, 12, 65536, -8])
def test_queue_refuses_a_size_that_is_not_a_power_of_two_up_to_32768(size: int) -> None:
    with pytest.raises(GuestError) as caught:
        SplitVirtqueue(FlatMemory(0, bytearray(1 << 20)), size, 0, 4096, 8192)
    assert caught.value.reason == Broken.RING_ADDRESS


@pytest.mark.parametrize(
    ("desc", "avail", "used"), [(8, 512, 1024), (0, 511, 1024), (0, 512, 1026)]
)
def test_queue_refuses_misaligned_rings(desc: int, avail: int, used: int) -> None:
    with pytest.raises(GuestError) as caught:
        SplitVirtqueue(FlatMemory(0, bytearray(4096)), 8, desc, avail, used)
    assert caught.value.reason == Broken.RING_ADDRESS


@pytest.mark.parametrize(
    ("desc", "avail", "used"),
    [(4096 - 112, 0, 0), (0, 4096 - 20, 0), (0, 0, 4096 - 68), (2**64 - 16, 0, 0)],
)
def test_queue_refuses_rings_that_leave_guest_memory(desc: int, avail: int, used: int) -> None:
    with pytest.raises(GuestError) as caught:
        SplitVirtqueue(FlatMemory(0, bytearray(4096)), 8, desc, avail, used)
    assert caught.value.reason == Broken.RING_ADDRESS


@pytest.mark.parametrize("start", [0, 65533])
def test_queue_breaks_when_avail_idx_is_further_ahead_than_the_ring_is_long(start: int) -> None:
    pair = RingPair(8, start=start)
    pair.driver.write_avail_idx(start + 9)
    assert break_by_pop(pair) == Broken.AVAIL_IDX


def test_queue_breaks_when_avail_idx_goes_backwards() -> None:
    pair = RingPair(8, start=100)
    pair.driver.write_avail_idx(99)
    assert break_by_pop(pair) == Broken.AVAIL_IDX


def test_queue_breaks_when_more_chains_are_in_flight_than_the_ring_has_entries() -> None:
    pair = RingPair(8)
    pair.driver.write_descriptor(0, pair.data_gpa, 1)
    for _ in range(8):
        pair.offer(0)
        assert pair.device.pop() is not None
    pair.offer(0)
    assert break_by_pop(pair) == Broken.AVAIL_IDX


def test_broken_queue_still_takes_back_what_was_popped_before() -> None:
    pair = RingPair(8)
    pair.driver.add([], [pair.data(0, 1)], token="first")
    pair.driver.publish()
    chain = pair.device.pop()
    assert chain is not None
    pair.offer(8)
    assert break_by_pop(pair) == Broken.HEAD
    pair.device.push(chain.head, 1)
    assert [used.token for used in pair.driver.reap()] == ["first"]


@pytest.mark.parametrize("head", [8, 9, 65535])
def test_queue_breaks_on_a_head_outside_the_table(head: int) -> None:
    pair = RingPair(8)
    pair.offer(head)
    assert break_by_pop(pair) == Broken.HEAD


def test_queue_breaks_on_a_descriptor_that_is_its_own_next() -> None:
    pair = RingPair(8)
    pair.driver.write_descriptor(3, pair.data_gpa, 1, NEXT, 3)
    pair.offer(3)
    assert break_by_pop(pair) == Broken.CHAIN_LOOP


def test_queue_breaks_on_a_loop_through_the_whole_table() -> None:
    pair = RingPair(8)
    for i in range(8):
        pair.driver.write_descriptor(i, pair.data_gpa, 1, NEXT, (i + 1) % 8)
    pair.offer(0)
    assert break_by_pop(pair) == Broken.CHAIN_LOOP


@pytest.mark.parametrize("following", [8, 65535])
def test_queue_breaks_on_a_next_outside_the_table(following: int) -> None:
    pair = RingPair(8)
    pair.driver.write_descriptor(0, pair.data_gpa, 1, NEXT, following)
    pair.offer(0)
    assert break_by_pop(pair) == Broken.CHAIN_NEXT


@pytest.mark.parametrize("length", [0, 1])
def test_queue_breaks_on_a_readable_descriptor_behind_a_writable_one(length: int) -> None:
    pair = RingPair(8)
    pair.driver.write_descriptor(0, pair.data_gpa, length, WRITE | NEXT, 1)
    pair.driver.write_descriptor(1, pair.data_gpa, 1)
    pair.offer(0)
    assert break_by_pop(pair) == Broken.ORDER


@pytest.mark.parametrize(
    ("address", "length"),
    [
        (BASE - 1, 1),
        (BASE - 1, 2),
        (0, 1),
        (2**64 - 1, 1),
        (2**64 - 1, 2),
        (2**64 - 0x1000, 0xFFFF_FFFF),
        (BASE, 0xFFFF_FFFF),
    ],
)
@pytest.mark.parametrize("flags", [0, WRITE])
def test_chain_with_a_buffer_outside_memory_is_incomplete(
    address: int, length: int, flags: int
) -> None:
    pair = RingPair(8)
    pair.driver.write_descriptor(0, pair.data_gpa, 3, NEXT, 1)
    pair.driver.write_descriptor(1, address, length, flags | NEXT, 2)
    pair.driver.write_descriptor(2, pair.data_gpa, 1, WRITE)
    pair.offer(0)
    chain = pair.device.pop()
    assert chain is not None
    assert chain.is_incomplete
    assert list(map(len, chain.readable)) == [3]
    assert list(map(len, chain.writable)) == [1]
    assert pair.device.broken is None


def test_chain_with_a_buffer_that_ends_one_byte_behind_memory_is_incomplete() -> None:
    pair = RingPair(8)
    pair.driver.write_descriptor(0, pair.data_gpa, 1, WRITE | NEXT, 1)
    pair.driver.write_descriptor(1, pair.end - 4, 5, WRITE)
    pair.offer(0)
    chain = pair.device.pop()
    assert chain is not None
    assert chain.is_incomplete
    assert not chain.writable  # the last byte, and what is before it, is of no use


def indirect_pair(length: int, flags: int = INDIRECT, *, address: int | None = None) -> RingPair:
    """Offer one descriptor that refers to an indirect table of `length` bytes, all legal inside."""
    pair = RingPair(8, indirect=True, indirect_entries=INDIRECT_ENTRIES_MIN + 2)
    gpa, table = pair.driver.table(0)
    for i in range(INDIRECT_ENTRIES_MIN + 2):
        DESC.pack_into(table, 16 * i, pair.data_gpa, 1, 0, 0)
    pair.driver.write_descriptor(0, gpa if address is None else address, length, flags, 1)
    pair.driver.write_descriptor(1, pair.data_gpa, 1)
    pair.offer(0)
    return pair


@pytest.mark.parametrize("length", [0, 1, 15, 17, 16 * (INDIRECT_ENTRIES_MIN + 1), 0xFFFF_FFF0])
def test_queue_breaks_on_an_indirect_table_of_a_wrong_size(length: int) -> None:
    assert break_by_pop(indirect_pair(length)) == Broken.INDIRECT


def test_queue_breaks_on_an_indirect_descriptor_that_goes_on() -> None:
    assert break_by_pop(indirect_pair(16, INDIRECT | NEXT)) == Broken.INDIRECT


def test_queue_breaks_on_an_indirect_table_that_was_not_negotiated() -> None:
    pair = RingPair(8, indirect=False, indirect_entries=4)
    pair.driver.add([pair.data(0, 1)], [], indirect=True)
    pair.driver.publish()
    assert break_by_pop(pair) == Broken.INDIRECT


def test_queue_breaks_on_an_indirect_table_inside_an_indirect_table() -> None:
    pair = indirect_pair(32)
    gpa, table = pair.driver.table(0)
    DESC.pack_into(table, 0, gpa, 16, INDIRECT, 0)
    assert break_by_pop(pair) == Broken.INDIRECT


@pytest.mark.parametrize("address", [0, 2**64 - 16, BASE - 16])
def test_queue_breaks_on_an_indirect_table_outside_memory(address: int) -> None:
    assert break_by_pop(indirect_pair(32, address=address)) == Broken.ADDRESS


def test_queue_breaks_on_a_next_outside_the_indirect_table() -> None:
    pair = indirect_pair(32)
    DESC.pack_into(pair.driver.table(0)[1], 0, pair.data_gpa, 1, NEXT, 2)
    assert break_by_pop(pair) == Broken.CHAIN_NEXT


def test_queue_breaks_on_a_loop_in_the_indirect_table() -> None:
    pair = indirect_pair(32)
    for i in range(2):
        DESC.pack_into(pair.driver.table(0)[1], 16 * i, pair.data_gpa, 1, NEXT, 1 - i)
    assert break_by_pop(pair) == Broken.CHAIN_LOOP


def test_indirect_table_is_read_once() -> None:
    """A driver that rewrites the table later must not move buffers that were checked."""
    pair = indirect_pair(16)
    chain = pair.device.pop()
    DESC.pack_into(pair.driver.table(0)[1], 0, 2**63, 2**31, 0, 0)
    assert chain is not None
    assert [len(view) for view in chain.readable] == [1]


def test_break_queue_keeps_the_first_reason() -> None:
    pair = RingPair()
    pair.device.break_queue(GuestError("no status", Broken.NO_STATUS))
    pair.device.break_queue(GuestError("later", Broken.HEAD))
    assert pair.device.broken == Broken.NO_STATUS


# ---------------------------------------------------------------- notifications


def use(pair: RingPair, count: int) -> None:
    """Let `count` chains go through the ring, without any notification being looked at."""
    for _ in range(count):
        pair.driver.add([], [pair.data(0, 1)])
        pair.driver.publish()
        chain = pair.device.pop()
        assert chain is not None
        pair.device.push(chain.head, 1)
        pair.driver.reap()


def started(**options: Any) -> RingPair:
    """A ring whose first notification, which is always due, is over."""
    pair = RingPair(**options)
    use(pair, 1)
    assert pair.device.needs_notification()
    pair.driver.kick_needed()
    return pair


@pytest.mark.parametrize("event_idx", [False, True])
def test_first_notification_after_a_start_is_always_sent(event_idx: bool) -> None:
    """Whoever served the ring before may have died between using a chain and saying so."""
    pair = started(event_idx=event_idx)
    pair.driver.write_used_event(1000)
    pair.driver.write_avail_flags(1)
    use(pair, 1)
    assert not pair.device.needs_notification()
    pair.start_device(pair.device.next_avail)
    assert not pair.device.needs_notification(), "nothing was pushed"
    use(pair, 1)
    assert pair.device.needs_notification()


def test_device_notifies_unless_no_interrupt_is_set() -> None:
    pair = started()
    assert not pair.device.needs_notification(), "nothing was pushed"
    use(pair, 1)
    assert pair.device.needs_notification()
    assert not pair.device.needs_notification(), "asked and answered"
    pair.driver.disable_interrupts()
    use(pair, 1)
    assert not pair.device.needs_notification()
    pair.driver.enable_interrupts()
    use(pair, 1)
    assert pair.device.needs_notification()


def test_driver_kicks_unless_no_notify_is_set() -> None:
    pair = RingPair()
    use(pair, 1)
    assert pair.driver.kick_needed()
    pair.device.disable_notification()
    use(pair, 1)
    assert not pair.driver.kick_needed()
    assert not pair.device.enable_notification()
    use(pair, 1)
    assert pair.driver.kick_needed()


def test_enable_notification_reports_work_that_came_without_a_kick() -> None:
    for event_idx in (False, True):
        pair = RingPair(event_idx=event_idx)
        pair.driver.add([], [pair.data(0, 1)])
        pair.driver.publish()
        assert pair.device.enable_notification()


@pytest.mark.parametrize("start", [0, 65530])
@pytest.mark.parametrize("batch", [1, 2, 5, 8])
@pytest.mark.parametrize("event", range(-3, 12))
def test_event_idx_notifies_exactly_when_used_event_was_passed(
    start: int, batch: int, event: int
) -> None:
    pair = started(event_idx=True, start=start - 1)
    pair.driver.write_used_event(start + event)
    use(pair, batch)
    assert pair.device.needs_notification() == (0 <= event < batch)


@pytest.mark.parametrize("start", [0, 65530])
@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_event_idx_asks_for_exactly_one_kick(start: int, before: int, batch: int) -> None:
    """A device that went to sleep wants the first kick only; while it works it moves nothing."""
    pair = RingPair(8, event_idx=True, start=start)
    use(pair, before)
    pair.device.enable_notification()
    pair.driver.kick_needed()
    use(pair, batch)
    assert pair.driver.kick_needed()
    use(pair, batch)
    assert not pair.driver.kick_needed()


def test_event_idx_is_ignored_when_it_was_not_negotiated() -> None:
    pair = started()
    pair.driver.write_used_event(1000)
    use(pair, 1)
    assert pair.device.needs_notification()


def test_no_interrupt_flag_is_ignored_with_event_idx() -> None:
    pair = started(event_idx=True)
    pair.driver.write_avail_flags(1)
    pair.driver.write_used_event(1)
    use(pair, 1)
    assert pair.device.needs_notification()
