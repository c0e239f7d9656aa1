"""What every data path owes a packed ring: the tests of split rings that do not look into the ring, and those that do.

VIRTIO 1.2 §2.8. What a guest breaks in a packed ring costs it one queue, as in tests/integration/test_hostile_guest.py.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.contract import test_data_path_contract as requests
from tests.contract import test_data_path_rings as rings
from tests.contract.test_data_path_rings import calls, go_round, quiet, submit, submit_reads
from tests.daemons import ALL_PATHS, SERIAL, Disks, barrier, eventually, finish, packed_ring
from vhostblk.client.client import FEATURES, Client
from vhostblk.client.control import PROTOCOL_FEATURES
from vhostblk.errors import PeerError
from vhostblk.vhost.message import ProtocolFeature
from vhostblk.virtio.blk import HEADER, RequestType, Status
from vhostblk.virtio.driver import Buffer
from vhostblk.virtio.features import Feature
from vhostblk.virtio.packed import DESC, EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, event_word

pytestmark = ALL_PATHS

PACKED = FEATURES | Feature.VIRTIO_F_RING_PACKED
SECTOR = 512
AVAIL, USED = 1 << 7, 1 << 15
NEXT, WRITE, INDIRECT = 1, 2, 4


class PackedDisks:
    """The same disks, for clients whose rings are packed."""

    def __init__(self, disks: Disks) -> None:
        self._disks = disks

    def __getattr__(self, name: str) -> object:
        return getattr(self._disks, name)

    def connect(
        self, export: str = "disk", *, features: int = FEATURES, **options: object
    ) -> Client:
        client = self._disks.connect(
            export, features=features | Feature.VIRTIO_F_RING_PACKED, **options
        )
        assert client.control.features & Feature.VIRTIO_F_RING_PACKED
        return client


SAME: dict[str, Callable[[Disks], None]] = {
    "framing, direct": partial(
        requests.test_every_request_works_in_every_framing, export="disk", indirect=False
    ),
    "framing, indirect": partial(
        requests.test_every_request_works_in_every_framing, export="direct", indirect=True
    ),
    "regions": requests.test_a_request_may_be_longer_than_one_region_and_one_table,
    "refused": requests.test_refused_requests_change_nothing_and_cost_nothing_else,
    "header": requests.test_a_header_that_is_too_short_is_answered,
    "workload": partial(requests.test_a_random_workload_on_every_kind_of_disk, export="direct"),
    "without event_idx": partial(
        requests.test_a_random_workload_without_a_feature, without=Feature.VIRTIO_F_EVENT_IDX
    ),
    "four queues": requests.test_a_workload_of_four_queues_goes_on_while_others_knock,
    "full": rings.test_a_ring_can_be_full_of_the_smallest_requests,
    "kicks": rings.test_kicks_that_nobody_needs_do_no_harm,
    "sleeps": rings.test_no_wakeup_is_lost_in_many_short_sleeps,
    "polled": partial(
        rings.test_rings_without_a_kick_or_call_fd_are_polled, kick=False, call=False
    ),
    "called": rings.test_a_ring_starts_with_a_call_so_that_nothing_told_before_is_missed,
    "call fd": rings.test_a_call_fd_may_be_exchanged_while_requests_are_in_flight,
    "kick fd": rings.test_a_kick_fd_may_be_exchanged_while_requests_are_in_flight,
    "disabled": rings.test_what_a_disabled_ring_had_taken_is_finished,
    "restarted": rings.test_a_ring_is_stopped_and_started_under_load,
    "reset": rings.test_a_device_can_be_reset_with_requests_in_flight,
    "hot-plug": rings.test_memory_is_added_and_removed_under_way,
    "table": partial(rings.test_the_memory_table_is_replaced_while_rings_run, export="slow"),
}


@pytest.mark.parametrize("name", SAME)
def test_packed_rings_pass_the_tests_of_split_rings(disks: Disks, name: str) -> None:
    SAME[name](PackedDisks(disks))  # type: ignore[arg-type]


# ---------------------------------------------------------------- the ring goes round


def elsewhere(disks: Disks, **options: Any) -> Client:
    """A client whose rings go on where nobody has stopped: a back-end that tracks requests knows better."""
    untracked = PROTOCOL_FEATURES & ~ProtocolFeature.INFLIGHT_SHMFD
    return disks.connect(protocol_features=untracked, **options)


def move(client: Client, place: int) -> None:
    """Go on at another place of the ring."""
    client.stop_queue(0)
    packed_ring(client).set_place(place)
    client.start_queue(0)


@pytest.mark.parametrize("size", [1, 2, 3, 64, 1000, 32768])
@pytest.mark.parametrize("event_idx", [True, False], ids=["event_idx", "flags"])
def test_rings_of_every_size_go_round_and_their_counters_wrap(
    disks: Disks, size: int, event_idx: bool
) -> None:
    features = PACKED if event_idx else PACKED & ~Feature.VIRTIO_F_EVENT_IDX
    if size > 1:
        features &= ~Feature.VIRTIO_F_INDIRECT_DESC  # of 32768 tables there is no room for
    with elsewhere(disks, features=features, queue_size=size) as client:
        driver = client.queues[0].driver
        for place in (2 * size - 1, size - 1):
            move(client, place)
            depth = max(1, min(size // 2, 300))
            go_round(client, depth, max(2, 40 // depth))
        base = client.stop_queue(0)
        assert base == driver.base
        assert base >> 16 == base & 0xFFFF


def test_chains_of_many_sizes_come_back_in_any_order(disks: Disks) -> None:
    """The used descriptor of a chain is not where the chain was: the driver skips by the id's length."""
    features = PACKED & ~Feature.VIRTIO_F_INDIRECT_DESC
    chance = random.Random(7)
    with disks.connect("slow", features=features, queue_size=101) as client:
        for _ in range(10):
            pending = []
            while client.queues[0].driver.free_descriptors > 12:
                framing = requests.pieces_of(chance.choice((64, 200, 600)))
                kind = chance.choice((RequestType.IN, RequestType.GET_ID))
                room = SECTOR if kind is RequestType.IN else 20
                pending.append(client.submit(kind, room=room, framing=framing))
            client.wait(pending)
            assert {p.status for p in pending} == {Status.OK}
            assert {p.written for p in pending} <= {SECTOR + 1, 21}


def test_stopping_tells_both_places_of_a_ring(disks: Disks) -> None:
    features = PACKED & ~Feature.VIRTIO_F_INDIRECT_DESC
    with elsewhere(disks, features=features, queue_size=8) as client:
        move(client, 6)
        assert client.get_id() == SERIAL  # three descriptors: slot 1 in the round after the wrap
        assert client.stop_queue(0) == 0x0001_0001
        assert client.control.vring_base(0) == 0x0001_0001
        client.start_queue(0)
        assert client.get_id() == SERIAL


# ---------------------------------------------------------------- notifications


def listen(client: Client, ahead: int) -> None:
    """Ask to be told when the chain that many slots ahead is used."""
    driver = packed_ring(client)
    place = (driver.base >> 16 & 0x7FFF) + (0 if driver.base >> 31 else driver.size) + ahead
    driver.write_event(EVENT_DESC, event_word(place % (2 * driver.size), driver.size))


@pytest.mark.parametrize("place", [0, 120, 250])
def test_event_is_told_of_exactly_the_descriptor_it_asked_for(disks: Disks, place: int) -> None:
    with elsewhere(disks, features=PACKED, queue_size=128) as client:
        move(client, place)
        quiet(client)
        for ahead in (0, 1, 4):
            listen(client, ahead)
            for _ in range(ahead):
                finish_silently(client)
            assert calls(client) == 0
            finish_silently(client)
            assert calls(client) == 1
            finish_silently(client, 3)
            assert calls(client) == 0


def finish_silently(client: Client, count: int = 1) -> None:
    """Let requests end without asking to be told."""
    pending = submit(client, count)
    eventually(
        lambda: client.poll() is not None and all(p.is_done for p in pending), "the requests"
    )


def test_event_is_told_once_of_a_batch_that_passes_it(disks: Disks) -> None:
    with disks.connect(features=PACKED) as client:
        quiet(client)
        listen(client, 5)
        finish_silently(client, 16)
        assert calls(client) == 1


@pytest.mark.parametrize("features", [PACKED, PACKED & ~Feature.VIRTIO_F_EVENT_IDX])
def test_flags_enable_and_disable_notifications(disks: Disks, features: int) -> None:
    with disks.connect(features=features) as client:
        quiet(client)
        driver = packed_ring(client)
        for _ in range(2):
            driver.write_event(EVENT_DISABLE, 0xFFFF)
            finish_silently(client, 8)
            assert calls(client) == 0
            driver.write_event(EVENT_ENABLE, 0xFFFF)
            finish_silently(client)
            assert calls(client) == 1


@pytest.mark.parametrize("features", [PACKED, PACKED & ~Feature.VIRTIO_F_EVENT_IDX])
def test_an_idle_device_asks_to_be_kicked_for_the_very_next_request(
    disks: Disks, features: int
) -> None:
    with disks.connect(features=features) as client:
        driver = client.queues[0].driver
        expected = EVENT_DESC if features & Feature.VIRTIO_F_EVENT_IDX else EVENT_ENABLE

        def asks() -> bool:
            at = Buffer(driver.gpa + driver.used_offset, 4)
            event = int.from_bytes(client.memory.read(at), "little")
            place = event & 0xFFFF
            return event >> 16 == expected and place in (0, driver.base & 0xFFFF)

        for count in (1, 3, 100):
            finish(client, submit(client, count))
            eventually(asks, "the event structure")
            driver.kick_needed()  # for what was kicked without asking
            pending = submit(client, notify=False)
            driver.publish()
            assert driver.kick_needed()
            client.queues[0].kick()
            finish(client, pending)


# ---------------------------------------------------------------- what a driver must not do


class Hostile:
    """Queue 0 of a client, of 16 entries, used without any of the driver's care."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.driver = packed_ring(client)
        room = client.memory.allocate(16384)
        self.header = (room.gpa, HEADER.size)
        self.data = (room.gpa + 4096, SECTOR)
        self.status = (room.gpa + 8192, 1)
        self.table = room.gpa + 12288
        client.memory.write(room.gpa, HEADER.pack(RequestType.IN, 0, 0))

    def ring(self, *descriptors: tuple[int, int, int], head: int = 3) -> None:
        """Make a chain available in the ring's first round; each is address, length, flags."""
        for slot, (gpa, length, flags) in enumerate(descriptors):
            self.driver.write_descriptor(slot, gpa, length, head, flags | AVAIL)
        self.client.queues[0].kick()

    def indirect(self, *descriptors: tuple[int, int, int], flags: int = INDIRECT) -> None:
        """The same in a table."""
        for index, (gpa, length, entry_flags) in enumerate(descriptors):
            entry = DESC.pack(gpa, length, 0xBEEF, entry_flags)
            self.client.memory.write(self.table + 16 * index, entry)
        self.ring((self.table, 16 * len(descriptors), flags))

    def good(self) -> list[tuple[int, int, int]]:
        return [(*self.header, NEXT), (*self.data, NEXT | WRITE), (*self.status, WRITE)]


ATTACKS: dict[str, Callable[[Hostile], None]] = {
    "a chain longer than the ring": lambda h: h.ring(*[(*h.header, NEXT)] * 16),
    "a status outside of memory": lambda h: h.ring(*h.good()[:2], (1 << 63, 1, WRITE)),
    "readable behind writable": lambda h: h.ring(h.good()[1], h.good()[0], h.good()[2]),
    "nowhere to put the status": lambda h: h.ring((*h.header, 0)),
    "a table behind a buffer": lambda h: h.ring(h.good()[0], (h.table, 32, INDIRECT)),
    "a table with NEXT": lambda h: h.indirect(*h.good(), flags=INDIRECT | NEXT),
    "an empty table": lambda h: h.ring((h.table, 0, INDIRECT)),
    "a table of an odd length": lambda h: h.ring((h.table, 24, INDIRECT)),
    "a table that is too long": lambda h: h.ring((h.table, 16 * 131, INDIRECT)),
    "a table outside of memory": lambda h: h.ring((1 << 63, 32, INDIRECT)),
}


LOST_BUFFERS: dict[str, Callable[[Hostile], None]] = {
    "header": lambda h: h.ring((1 << 63, 16, NEXT), *h.good()[1:]),
    "data": lambda h: h.ring(h.good()[0], (2**64 - 8, 512, NEXT | WRITE), h.good()[2]),
    "in a table": lambda h: h.indirect(h.good()[0], (1 << 63, 512, WRITE), h.good()[2]),
}


@pytest.mark.parametrize("name", LOST_BUFFERS)
def test_buffer_that_is_not_in_memory_costs_its_request_only(disks: Disks, name: str) -> None:
    with elsewhere(disks, features=PACKED, queues=1, queue_size=16, strict=False) as client:
        hostile = Hostile(client)
        status = Buffer(*hostile.status)
        client.memory.write(status.gpa, b"\xff")
        LOST_BUFFERS[name](hostile)
        eventually(lambda: client.memory.read(status) == b"\1", "an answer")
        with pytest.raises(BlockingIOError):
            os.eventfd_read(client.queues[0].err_fd)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_driver_that_breaks_a_packed_ring_costs_itself_one_queue(disks: Disks, name: str) -> None:
    with elsewhere(disks, features=PACKED, queues=2, queue_size=16) as client:
        ATTACKS[name](Hostile(client))
        client.wait_broken(0)
        assert client.get_id(queue=1) == SERIAL
        client.stop_queue(0)
        packed_ring(client).set_place(0)
        client.start_queue(0)
        assert client.get_id() == SERIAL


def test_a_descriptor_that_is_available_again_while_it_is_in_flight_breaks_the_ring(
    disks: Disks,
) -> None:
    def is_broken() -> bool:
        """Unless all was over before the descriptor was made available again, which is in order."""
        with disks.connect("slow", features=PACKED, queues=2, queue_size=16) as client:
            hostile = Hostile(client)
            submit_reads(client, 16)  # each with a table: the ring is full
            barrier(client)
            hostile.driver.write_descriptor(0, *hostile.header, 3, USED | NEXT)  # the second round
            client.queues[0].kick()
            try:
                client.wait_broken(0, timeout=2)
            except TimeoutError:
                return False
            assert client.get_id(queue=1) == SERIAL
            return True

    eventually(is_broken, "a broken ring", 60)


def test_indirect_tables_mean_nothing_but_their_order_and_write(disks: Disks) -> None:
    """§2.8.7: NEXT, INDIRECT and ids are reserved there."""
    with disks.connect(features=PACKED, queue_size=16) as client:
        hostile = Hostile(client)
        noise = NEXT | INDIRECT | AVAIL | USED | 0x70
        header, data, status = (
            (gpa, length, flags & WRITE | extra)
            for (gpa, length, flags), extra in zip(hostile.good(), (0, noise, noise), strict=True)
        )
        client.memory.write(hostile.status[0], b"\xff")
        hostile.indirect(header, data, status, flags=INDIRECT | WRITE)
        eventually(lambda: client.memory.read(Buffer(*hostile.status)) == b"\0", "the status")
        at = Buffer(hostile.driver.gpa, 16)
        eventually(
            lambda: DESC.unpack(client.memory.read(at))[1:] == (513, 3, AVAIL | USED | WRITE),
            "the used descriptor",
        )
        client.stop_queue(0)


def test_bases_and_sizes_that_are_impossible_are_refused(disks: Disks) -> None:
    with elsewhere(disks, features=PACKED, queues=2, queue_size=16) as client:
        for base in (0x8000_8010, 0x8010_8000, 0x8001_8000):
            client.stop_queue(0)
            with pytest.raises(PeerError):
                client.start_queue(0, base)
        client.start_queue(0)
        assert client.get_id() == client.get_id(queue=1) == SERIAL
