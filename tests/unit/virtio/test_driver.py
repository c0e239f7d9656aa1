"""The driver half: room, layout, and what it makes of a device that breaks the rules."""

from __future__ import annotations

import pytest

from tests.rings import BASE, RingPair
from vhostblk.errors import PeerError, StateError
from vhostblk.virtio.driver import DriverQueue


def test_parts_are_aligned_as_the_specification_demands() -> None:
    for exponent in range(16):
        pair = RingPair(1 << exponent, indirect_entries=3)
        driver = pair.driver
        assert driver.desc_offset % 16 == 0
        assert driver.avail_offset % 2 == 0
        assert driver.used_offset % 4 == 0
        assert driver.avail_offset >= 16 * driver.size
        assert driver.used_offset >= driver.avail_offset + 6 + 2 * driver.size
        assert driver.table(0)[0] >= BASE + driver.used_offset + 6 + 8 * driver.size


def test_area_that_is_too_small_or_misaligned_is_refused() -> None:
    need = DriverQueue.area_size(8)
    with pytest.raises(StateError):
        DriverQueue(memoryview(bytearray(need - 1)), 0, 8)
    with pytest.raises(StateError):
        DriverQueue(memoryview(bytearray(need)), 8, 8)


def test_add_refuses_a_chain_for_which_there_is_no_room() -> None:
    pair = RingPair(4, indirect_entries=2)
    with pytest.raises(StateError):
        pair.driver.add([], [])
    with pytest.raises(StateError):
        pair.driver.add([pair.data(i, 1) for i in range(5)], [])
    with pytest.raises(StateError):
        pair.driver.add([pair.data(i, 1) for i in range(3)], [], indirect=True)
    assert pair.driver.free_descriptors == 4


def test_descriptors_come_back_when_the_chain_is_reaped() -> None:
    pair = RingPair(4)
    for _ in range(10):
        pair.driver.add([pair.data(i, 1) for i in range(3)], [])
        assert pair.driver.free_descriptors == 1
        pair.driver.publish()
        chain = pair.device.pop()
        assert chain is not None
        pair.device.push(chain.head, 0)
        pair.driver.reap()
        assert pair.driver.free_descriptors == 4


def test_reap_refuses_more_chains_than_are_in_flight() -> None:
    pair = RingPair(4)
    pair.driver.add([pair.data(0, 1)], [])
    pair.driver.publish()
    pair.device.push(0, 0)
    pair.device.push(0, 0)
    with pytest.raises(PeerError, match="2 used of 1"):
        pair.driver.reap()


@pytest.mark.parametrize("head", [1, 4, 2**32 - 1])
def test_reap_refuses_a_head_that_is_not_in_flight(head: int) -> None:
    pair = RingPair(4)
    added = pair.driver.add([pair.data(0, 1)], [])
    pair.driver.publish()
    assert head != added
    pair.device.push(head, 0)
    with pytest.raises(PeerError, match="not in flight"):
        pair.driver.reap()


def test_indices_cannot_be_moved_while_chains_are_in_flight() -> None:
    pair = RingPair(4)
    pair.driver.add([pair.data(0, 1)], [])
    with pytest.raises(StateError):
        pair.driver.set_indices(5)


def test_close_lets_the_shared_memory_go() -> None:
    area = bytearray(4096)
    driver = DriverQueue(memoryview(area), 0, 8)
    driver.close()
    driver.close()
    area.clear()  # would raise BufferError if a view were left
