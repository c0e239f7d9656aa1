"""A guest that breaks VIRTIO costs itself one queue, and nobody anything else.

Each attack is made on one queue of a daemon that serves others meanwhile. What is promised: the queue's error fd is
signalled, other queues and exports go on, the same front-end can start anew, the next one is served, the daemon says
one line. That it lives, leaks nothing and shows no traceback is checked after every test by the fixture `disks`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest

from tests.daemons import (
    BOTH_PATHS,
    CAPACITY,
    SERIAL,
    Disks,
    barrier,
    eventually,
    finish,
    split_ring,
)
from vhostblk.client.client import FEATURES, Client
from vhostblk.client.shared_memory import SharedMemory
from vhostblk.vhost.vring import VringFd
from vhostblk.virtio.blk import HEADER, RequestType, Status
from vhostblk.virtio.driver import Buffer
from vhostblk.virtio.features import Feature
from vhostblk.virtio.split import DESC, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE

pytestmark = BOTH_PATHS

NEXT, WRITE, INDIRECT = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT
SIZE = 64
END = 2**64


class Hostile:
    """Queue 0 of a client, used without any of the driver's care."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.queue = client.queues[0]
        self.driver = split_ring(client)
        self.memory = client.memory
        self.room = self.memory.allocate(64 << 10)
        self.header = Buffer(self.room.gpa, HEADER.size)
        self.data = Buffer(self.room.gpa + 4096, 4096)
        self.status = Buffer(self.room.gpa + 8192, 1)
        self.table = Buffer(self.room.gpa + 16384, 4096)
        self.describe(RequestType.IN)

    def describe(self, kind: int, sector: int = 0) -> None:
        self.memory.write(self.header.gpa, HEADER.pack(kind, 0, sector))
        self.memory.write(self.status.gpa, b"\xff")

    def direct(self, *descriptors: tuple[int, int, int, int]) -> None:
        """Fill the queue's table from its start."""
        for index, (gpa, length, flags, following) in enumerate(descriptors):
            self.driver.write_descriptor(index, gpa, length, flags, following)

    def indirect(self, *descriptors: tuple[int, int, int, int], flags: int = INDIRECT) -> None:
        """Fill a table of indirect descriptors, and the one that names it."""
        for index, descriptor in enumerate(descriptors):
            self.memory.write(self.table.gpa + 16 * index, DESC.pack(*descriptor))
        self.direct((self.table.gpa, 16 * len(descriptors), flags, 1))

    def offer(self, *heads: int) -> None:
        position = self.driver.avail_idx
        for i, head in enumerate(heads):
            self.driver.write_avail(position + i, head)
        self.driver.write_avail_idx(position + len(heads))
        self.queue.kick()

    def good(self) -> list[tuple[int, int, int, int]]:
        """A request as it should be."""
        return [
            (*self.header, NEXT, 1),
            (*self.data, NEXT | WRITE, 2),
            (*self.status, WRITE, 0),
        ]


def _bad_buffer(gpa: int, length: int, flags: int = WRITE) -> Callable[[Hostile], None]:
    def attack(h: Hostile) -> None:
        head, _, status = h.good()
        h.direct(head, (gpa, length, NEXT | flags, 2), status)
        h.offer(0)

    return attack


def _bad_header(gpa: int, length: int) -> Callable[[Hostile], None]:
    def attack(h: Hostile) -> None:
        h.direct((gpa, length, NEXT, 1), (*h.status, WRITE, 0))
        h.offer(0)

    return attack


def _bad_status(gpa: int) -> Callable[[Hostile], None]:
    def attack(h: Hostile) -> None:
        head, data, _ = h.good()
        h.direct(head, data, (gpa, 1, WRITE, 0))
        h.offer(0)

    return attack


def _over_the_end(h: Hostile) -> None:
    region = h.memory.regions[-1]
    _bad_buffer(region.end - 8, 16)(h)


def _between_regions(h: Hostile) -> None:
    _bad_buffer(h.memory.regions[0].end + 4096, 512)(h)


def _chain(*links: tuple[int, int]) -> Callable[[Hostile], None]:
    """Readable descriptors with these (flags, next)."""

    def attack(h: Hostile) -> None:
        h.direct(*((*h.header, flags, following) for flags, following in links))
        h.offer(0)

    return attack


def _loop_of_all(h: Hostile) -> None:
    h.direct(*((*h.header, NEXT, (i + 1) % SIZE) for i in range(SIZE)))
    h.offer(0)


def _writable_loop(h: Hostile) -> None:
    h.direct((*h.header, NEXT, 1), (*h.data, NEXT | WRITE, 1))
    h.offer(0)


def _order(h: Hostile) -> None:
    h.direct((*h.status, NEXT | WRITE, 1), (*h.header, 0, 0))
    h.offer(0)


def _order_of_nothing(h: Hostile) -> None:
    h.direct((*h.header, NEXT, 1), (*h.status, NEXT | WRITE, 2), (h.data.gpa, 512, 0, 0))
    h.offer(0)


def _no_status(h: Hostile) -> None:
    h.direct((*h.header, NEXT, 1), (*h.data, 0, 0))
    h.offer(0)


def _empty_status(h: Hostile) -> None:
    h.direct((*h.header, NEXT, 1), (h.status.gpa, 0, WRITE, 0))
    h.offer(0)


def _table(gpa: int | None, length: int, flags: int = INDIRECT) -> Callable[[Hostile], None]:
    def attack(h: Hostile) -> None:
        h.indirect(*h.good())
        h.direct((h.table.gpa if gpa is None else gpa, length, flags, 1), *h.good())
        h.offer(0)

    return attack


def _in_table(*descriptors: tuple[int, int]) -> Callable[[Hostile], None]:
    def attack(h: Hostile) -> None:
        h.indirect(*((*h.header, flags, following) for flags, following in descriptors))
        h.offer(0)

    return attack


def _nested(h: Hostile) -> None:
    h.indirect((h.table.gpa, 48, INDIRECT, 0))
    h.offer(0)


def _bad_buffer_in_table(h: Hostile) -> None:
    head, _, status = h.good()
    h.indirect(head, (END - 4096, 4096, NEXT | WRITE, 2), status)
    h.offer(0)


def _jump(distance: int) -> Callable[[Hostile], None]:
    def attack(h: Hostile) -> None:
        h.direct(*h.good())
        h.driver.write_avail_idx(h.driver.avail_idx + distance)
        h.queue.kick()

    return attack


def _head(index: int) -> Callable[[Hostile], None]:
    return lambda h: h.offer(index)


def _good_then_bad(h: Hostile) -> None:
    h.client.submit(RequestType.GET_ID, room=20, notify=False)
    h.driver.publish()
    h.offer(SIZE)


ATTACKS: dict[str, Callable[[Hostile], None]] = {
    "head just outside the table": _head(SIZE),
    "head far outside the table": _head(65535),
    "good head before a bad one": _good_then_bad,
    "avail index ahead of the ring": _jump(SIZE + 1),
    "avail index goes back": _jump(-1),
    "avail index half way round": _jump(32768),
    "descriptor loops to itself": _chain((NEXT, 0)),
    "two descriptors loop": _chain((NEXT, 1), (NEXT, 0)),
    "all descriptors loop": _loop_of_all,
    "writable descriptors loop": _writable_loop,
    "next just outside the table": _chain((NEXT, SIZE)),
    "next far outside the table": _chain((NEXT, 65535)),
    "readable after writable": _order,
    "data after the status": _order_of_nothing,
    "no status byte": _no_status,
    "status outside memory": _bad_status(1 << 60),
    "status of no bytes": _empty_status,
    "indirect table of no bytes": _table(None, 0),
    "indirect table of an odd length": _table(None, 47),
    "indirect table that is too long": _table(None, 16 * 131),
    "indirect table of 4 GiB": _table(None, 2**32 - 16),
    "indirect table outside memory": _table(1 << 60, 48),
    "indirect table that wraps": _table(END - 16, 48),
    "indirect table with a next": _table(None, 48, INDIRECT | NEXT),
    "indirect table in a table": _nested,
    "loop in a table": _in_table((NEXT, 1), (NEXT, 0)),
    "next outside a table": _in_table((NEXT, 1), (NEXT, 2)),
}


LOST_BUFFERS: dict[str, Callable[[Hostile], None]] = {
    "buffer at 0": _bad_buffer(0, 512),
    "readable buffer at 0": _bad_buffer(0, 512, 0),
    "buffer at the end of the address space": _bad_buffer(END - 1, 1),
    "buffer that wraps": _bad_buffer(END - 4096, 8192),
    "buffer of the largest length": _bad_buffer(0x1000_0000, 2**32 - 1),
    "buffer over the end of memory": _over_the_end,
    "buffer between two regions": _between_regions,
    "header outside memory": _bad_header(1 << 60, 16),
    "header of 4 GiB": _bad_header(0x1000_0000, 2**32 - 1),
    "buffer outside memory in a table": _bad_buffer_in_table,
}


def connect(disks: Disks, export: str = "disk", *, features: int = FEATURES) -> Client:
    memory = SharedMemory([8 << 20] * 2)
    return disks.connect(export, queues=2, queue_size=SIZE, memory=memory, features=features)


def start_anew(client: Client) -> None:
    """What a guest does that reboots."""
    client.reset_device()
    client.make_queues(2, SIZE)
    for index in (0, 1):
        client.start_queue(index, 0)


def serves(client: Client, index: int = 1) -> None:
    """A queue of a client whose other queue cannot be reaped any more."""
    queue = client.queues[index]
    pending = client.submit(RequestType.GET_ID, room=20, queue=index)
    eventually(lambda: bool(queue.reap()) or pending.is_done, "a request")
    assert pending.result().rstrip(b"\0") == SERIAL.encode()


@pytest.mark.parametrize("buffer", LOST_BUFFERS)
def test_buffer_that_is_not_in_memory_costs_its_request_only(disks: Disks, buffer: str) -> None:
    with connect(disks) as client:
        hostile = Hostile(client)
        hostile.describe(RequestType.OUT if "readable" in buffer else RequestType.IN)
        client.memory.write(hostile.data.gpa, b"#" * 4096)
        LOST_BUFFERS[buffer](hostile)
        eventually(lambda: client.memory.read(hostile.status) == b"\1", "an answer")
        assert client.memory.read(hostile.data) == b"#" * 4096
        hostile.describe(RequestType.IN)
        hostile.direct(*hostile.good())
        hostile.driver.write_avail(hostile.driver.avail_idx + 1, 0)
        hostile.driver.write_avail_idx(hostile.driver.avail_idx + 2)
        hostile.queue.kick()
        eventually(lambda: client.memory.read(hostile.status) == b"\0", "the next answer")
        with pytest.raises(BlockingIOError):
            os.eventfd_read(client.queues[0].err_fd)


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_costs_its_queue_only(disks: Disks, attack: str) -> None:
    with connect(disks) as client, disks.connect("slow") as other:
        flying = other.submit(RequestType.IN, room=512)
        ATTACKS[attack](Hostile(client))
        client.wait_broken(0)
        assert client.get_id(queue=1) == SERIAL
        client.write(0, b"x" * 512, queue=1)
        other.wait([flying])
        start_anew(client)
        assert disks.said.count("broken") == 1, disks.said
        for index in (0, 1):
            assert client.get_id(queue=index) == SERIAL
    with disks.connect() as client:
        assert client.read(0, 512) == b"x" * 512


def test_indirect_descriptors_that_were_not_negotiated_break_the_queue(disks: Disks) -> None:
    features = FEATURES & ~Feature.VIRTIO_F_INDIRECT_DESC
    with connect(disks, features=features) as client:
        hostile = Hostile(client)
        hostile.indirect(*hostile.good())
        hostile.offer(0)
        client.wait_broken(0)
        assert client.get_id(queue=1) == SERIAL


def test_a_broken_queue_stays_broken_whatever_else_changes(disks: Disks) -> None:
    with connect(disks) as client:
        ATTACKS["next far outside the table"](Hostile(client))
        client.wait_broken(0)
        control = client.control
        control.share(client.memory, one_by_one=False)
        for enabled in (False, True):
            control.ask(control.frontend.set_vring_enable(0, enabled))
            client.set_writeback(enabled)
        client.queues[0].kick()
        client.remove_memory(client.add_memory(4096))
        barrier(client)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(client.queues[0].err_fd)
        assert disks.said.count("broken") == 1
        assert client.get_id(queue=1) == SERIAL
        assert client.stop_queue(0) == 0


def test_what_was_taken_before_the_attack_is_finished(disks: Disks) -> None:
    with connect(disks, "slow") as client:
        pending = [client.submit(RequestType.IN, 0, room=512) for _ in range(10)]
        eventually(lambda: _taken(client, 10), "all to be taken")
        Hostile(client).offer(SIZE)
        client.wait_broken(0)
        finish(client, pending)
        assert {p.status for p in pending} == {Status.OK}
        assert client.stop_queue(0) == 10


def _taken(client: Client, count: int) -> bool:
    driver = client.queues[0].driver
    word = driver.gpa + driver.used_offset + 4 + 8 * driver.size
    return int.from_bytes(client.memory.read(Buffer(word, 2)), "little") == count


def test_a_queue_broken_without_an_error_fd_is_just_idle(disks: Disks) -> None:
    with connect(disks) as client:
        ask, frontend = client.control.ask, client.control.frontend
        ask(frontend.set_vring_fd(0, VringFd.ERR, None))
        Hostile(client).offer(SIZE)
        eventually(lambda: "broken" in disks.said, "the daemon's log")
        assert client.get_id(queue=1) == SERIAL


def test_a_polled_queue_that_is_broken_is_not_looked_at_any_more(disks: Disks) -> None:
    with connect(disks) as client:
        client.stop_queue(0)
        client.start_queue(0, kick=False, call=False)
        Hostile(client).offer(SIZE)
        client.wait_broken(0)
        eventually(lambda: "broken" in disks.said, "the daemon's log")
        barrier(client)
        assert client.get_id(queue=1) == SERIAL
        assert disks.said.count("broken") == 1


def test_a_guest_that_breaks_its_queue_all_day_does_not_fill_the_log(disks: Disks) -> None:
    with connect(disks) as client:
        for i in range(100):
            hostile = Hostile(client)
            hostile.direct((i << 40, 512, WRITE, 0))
            hostile.offer(0)
            client.wait_broken(0)
            client.memory.free(hostile.room)
            start_anew(client)
    assert disks.said.count("broken") <= 10


def test_requests_that_fail_all_day_do_not_fill_the_log(disks: Disks) -> None:
    with disks.connect(strict=False) as client:
        for i in range(50):
            pending = [
                client.submit(RequestType.IN, CAPACITY + (i + j) * 512, room=512) for j in range(10)
            ]
            client.wait(pending)
            assert {p.status for p in pending} == {Status.IOERR}


def test_a_queue_may_be_broken_with_hundreds_in_flight_and_left(disks: Disks) -> None:
    with disks.connect("slow", queues=2, queue_size=512) as client:
        for queue in (0, 1):
            for _ in range(300):
                client.submit(RequestType.IN, room=512, queue=queue)
        split_ring(client).write_avail_idx(12345)
        client.queues[0].kick()
        client.wait_broken(0)
        client.abandon()


# ---------------------------------------------------------------- legal, but not nice


def test_a_chain_may_name_the_same_memory_again_and_again(disks: Disks) -> None:
    with connect(disks) as client:
        hostile = Hostile(client)
        data = [(*hostile.data, NEXT | WRITE, i + 2) for i in range(SIZE - 2)]
        hostile.direct(
            (*hostile.header, NEXT, 1), *data[:-1], (*hostile.data, NEXT | WRITE, SIZE - 1)
        )
        hostile.driver.write_descriptor(SIZE - 1, *hostile.status, WRITE, 0)
        hostile.offer(0)
        eventually(lambda: client.memory.read(hostile.status) == b"\0", "the status")


def test_terabytes_in_one_chain_are_beyond_the_disk(disks: Disks) -> None:
    with connect(disks) as client:
        hostile = Hostile(client)
        hostile.describe(RequestType.OUT)
        all_of_it = (client.memory.regions[0].gpa, 8 << 20)
        data = [(*all_of_it, NEXT, i + 2) for i in range(SIZE - 2)]
        hostile.direct((*hostile.header, NEXT, 1), *data)
        hostile.driver.write_descriptor(SIZE - 1, *hostile.status, WRITE, 0)
        hostile.offer(0)
        eventually(lambda: client.memory.read(hostile.status) == b"\1", "the status")
        serves(client)


@pytest.mark.parametrize("kind", [RequestType.IN, RequestType.GET_ID, RequestType.OUT])
def test_data_may_lie_in_the_rings_themselves(disks: Disks, kind: RequestType) -> None:
    with connect(disks, "memory") as client:
        client.write(0, random.Random(12).randbytes(8192), queue=1)
        hostile = Hostile(client)
        hostile.describe(kind)
        ring = (hostile.driver.gpa, 1024 + 512)
        flags = 0 if kind == RequestType.OUT else WRITE
        hostile.direct(
            (*hostile.header, NEXT, 1), (*ring, NEXT | flags, 2), (*hostile.status, WRITE, 0)
        )
        hostile.offer(0)
        hostile.queue.kick()
        serves(client)
        start_anew(client)
        assert client.get_id() == SERIAL


@pytest.mark.parametrize("place", ["header", "avail index", "used index", "descriptor"])
def test_the_status_may_be_written_where_it_hurts(disks: Disks, place: str) -> None:
    with connect(disks) as client:
        hostile = Hostile(client)
        driver = hostile.driver
        gpa = {
            "header": hostile.header.gpa,
            "avail index": driver.gpa + driver.avail_offset + 2,
            "used index": driver.gpa + driver.used_offset + 2,
            "descriptor": driver.gpa,
        }[place]
        hostile.direct((*hostile.header, NEXT, 1), (gpa, 1, WRITE, 0))
        hostile.offer(0)
        hostile.queue.kick()
        serves(client)
        start_anew(client)
        assert client.get_id() == SERIAL


@pytest.mark.parametrize("seed", range(4))
def test_rings_that_change_while_they_are_read(disks: Disks, seed: int) -> None:
    chance = random.Random(seed)
    with connect(disks, "memory") as client:
        for _ in range(8):
            hostile = Hostile(client)
            hostile.direct(*hostile.good())
            view = client.memory.views(Buffer(hostile.driver.gpa, 16 * SIZE + 6 + 2 * SIZE))[0]
            for _ in range(150):
                at = chance.randrange(len(view))
                view[at] = chance.choice((0, 1, 2, 3, 4, view[at] ^ 1 << chance.randrange(8)))
                hostile.describe(chance.randrange(16), chance.choice((0, 1, 2**40)))
                hostile.driver.write_avail_idx(chance.randrange(1 << 16))
                hostile.queue.kick()
            view.release()
            serves(client)
            client.memory.free(hostile.room)
            start_anew(client)
    disks.max_lines = 100
