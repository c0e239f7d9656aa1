"""In-flight tracking through a socket: what is left is finished once, nonsense costs its ring or session.

vhost-user, "Inflight I/O tracking". The regions are what a killed daemon has left, or what no daemon ever wrote; that
daemons leave such regions wherever they are killed is test_inflight_recovery.py's.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.daemons import (
    ALL_PATHS,
    BOTH_PATHS,
    CAPACITY,
    Disks,
    barrier,
    eventually,
    finish,
    split_ring,
)
from vhostblk.client.client import Client
from vhostblk.client.inflight import InflightFile
from vhostblk.client.queue import Pending
from vhostblk.errors import PeerError, SessionError
from vhostblk.vhost.inflight import SPLIT_ENTRY, SPLIT_HEADER, VERSION_OFFSET, part_size
from vhostblk.vhost.message import InflightDescription, ProtocolFeature, Request
from vhostblk.vhost.vring import VringFd
from vhostblk.virtio.blk import RequestType, Status

SIZE = 128


@contextmanager
def stopped(disks: Disks, export: str = "disk") -> Iterator[Client]:
    """A client whose ring 0 is set up and not started; it was, so the region is in use."""
    with disks.connect(export, queue_size=SIZE) as client:
        client.stop_queue(0)
        yield client


def region(client: Client) -> InflightFile:
    """Where the client has its requests tracked."""
    assert client.inflight is not None
    return client.inflight


def pretend_in_flight(client: Client, heads: list[int]) -> None:
    """Write what a daemon leaves that is killed when it has popped these, and completed nothing since."""
    view = region(client).view
    for order, head in enumerate(heads):
        SPLIT_ENTRY.pack_into(view, SPLIT_HEADER.size + head * SPLIT_ENTRY.size, 1, 0, 70 + order)


def submitted(
    client: Client, count: int, first: int = 0, length: int = 512
) -> tuple[list[Pending], list[int]]:
    """Writes that a ring has, and their heads."""
    pending = []
    driver = split_ring(client)
    before = driver.avail_idx
    for i in range(count):
        offset = first + 512 * i
        data = pattern(offset, length)
        pending.append(client.submit(RequestType.OUT, offset, out=data, notify=False))
    client.queues[0].notify()
    memory = client.memory.region_of(driver.gpa).view
    start = driver.gpa - client.memory.region_of(driver.gpa).gpa + driver.avail_offset + 4
    heads = [
        struct.unpack_from("<H", memory, start + 2 * ((before + i) % SIZE))[0] for i in range(count)
    ]
    return pending, heads


@ALL_PATHS
@pytest.mark.parametrize("left", [0, 1, 3, 5])
def test_what_a_killed_daemon_had_popped_is_served_once_and_so_is_the_rest(
    disks: Disks, left: int
) -> None:
    with stopped(disks) as client:
        pending, heads = submitted(client, 5)
        pretend_in_flight(client, heads[:left])
        client.start_queue(0, base=client.queues[0].driver.visible_base)
        client.wait(pending)
        assert [p.result() for p in pending] == [b""] * 5
        assert client.read(0, 5 * 512) == b"".join(bytes([i + 1]) * 512 for i in range(5))
        assert client.queues[0].driver.in_flight == 0
    if left:
        assert f"queue 0: {left} requests were in flight" in disks.said


@ALL_PATHS
def test_what_was_in_flight_behind_the_end_that_a_disk_has_now_fails_and_the_ring_goes_on(
    disks: Disks,
) -> None:
    small = CAPACITY // 2
    with stopped(disks, "grows") as client:
        before = client.read_config().capacity
        disks.resize(CAPACITY)
        eventually(lambda: client.read_config().capacity * 512 == CAPACITY, "the size before")
        places = [0, small - 512, small - 256 * 512, small, CAPACITY - 512, 4096]
        lengths = [512, 512, 512 * 512, 512, 512, 512]  # the third one is across the new end
        pending = []
        heads = []
        for place, length in zip(places, lengths, strict=True):
            request, head = one_write(client, place, length)
            pending.append(request)
            heads.append(head)
        pretend_in_flight(client, heads[:5])
        disks.resize(small)
        eventually(lambda: client.read_config().capacity * 512 == small, "the size now")
        client.start_queue(0, base=client.queues[0].driver.visible_base)
        finish(client, pending)
        good, bad = Status.OK, Status.IOERR
        assert [one.status for one in pending] == [good, good, bad, bad, bad, good]
        assert client.read(small - 512, 512) == pattern(small - 512, 512)
        assert os.stat(disks.image("grows")).st_size == small
        disks.resize(before * 512)
    assert "queue 0: 5 requests were in flight" in disks.said


def pattern(offset: int, length: int) -> bytes:
    return bytes([1 + offset // 512 % 255]) * length


def one_write(client: Client, offset: int, length: int) -> tuple[Pending, int]:
    """A write that a ring has, and its head."""
    pending, heads = submitted(client, 1, offset, length)
    return pending[0], heads[0]


@ALL_PATHS
def test_ring_that_is_stopped_before_it_was_enabled_finishes_what_was_in_flight(
    disks: Disks,
) -> None:
    with stopped(disks) as client:
        frontend, control = client.control.frontend, client.control
        pending, heads = submitted(client, 4)
        pretend_in_flight(client, heads[:3])
        control.ask(frontend.set_vring_enable(0, False))
        base = client.queues[0].driver.visible_base
        queue = client.queues[0]
        start_disabled(client, base)
        barrier(client)
        assert not client.poll()  # a ring that is disabled is not processed
        assert client.stop_queue(0) == base + 3
        finish(client, pending[:3])
        assert not pending[3].is_done
        client.start_queue(0, base=queue.driver.visible_base)
        client.wait(pending)


def start_disabled(client: Client, base: int) -> None:
    """`start_queue` but for its last message."""
    frontend, control, driver = client.control.frontend, client.control, client.queues[0].driver
    control.ask(frontend.set_vring_num(0, driver.size))
    control.ask(frontend.set_vring_base(0, base))
    control.ask(frontend.set_vring_fd(0, VringFd.CALL, client.queues[0].call_fd))
    control.ask(frontend.set_vring_fd(0, VringFd.KICK, client.queues[0].kick_fd))


@ALL_PATHS
def test_nothing_is_in_flight_in_the_region_of_a_ring_that_was_stopped(disks: Disks) -> None:
    with disks.connect(queue_size=SIZE) as client:
        client.wait([client.submit(RequestType.IN, 0, room=512) for _ in range(50)])
        client.stop_queue(0)
        view = region(client).view
        _, version, entries, _, used_idx = SPLIT_HEADER.unpack_from(view)
        assert (version, entries, used_idx) == (1, SIZE, 50)
        step = SPLIT_ENTRY.size
        assert not any(view[SPLIT_HEADER.size : SPLIT_HEADER.size + SIZE * step : step])


@BOTH_PATHS
def test_in_flight_is_seen_in_the_region_while_it_is(disks: Disks) -> None:
    with disks.connect("slow", queue_size=SIZE) as client:
        pending = [client.submit(RequestType.IN, 0, room=512) for _ in range(7)]
        view = region(client).view[SPLIT_HEADER.size : SPLIT_HEADER.size + SIZE * SPLIT_ENTRY.size]
        marked = view[:: SPLIT_ENTRY.size]
        eventually(lambda: sum(marked) == 7 or all(p.is_done for p in pending), "7 in flight")
        client.wait(pending)
        client.stop_queue(0)
        assert sum(marked) == 0
        marked.release()
        view.release()


@ALL_PATHS
def test_reset_makes_a_region_one_that_was_never_used(disks: Disks) -> None:
    with disks.connect(queue_size=SIZE) as client:
        client.read(0, 512)
        assert SPLIT_HEADER.unpack_from(region(client).view)[1] == 1
        client.reset_device()
        assert SPLIT_HEADER.unpack_from(region(client).view)[1] == 0
        client.make_queues(1, SIZE)
        client.start_queue(0)
        client.read(0, 512)


@ALL_PATHS
def test_tracking_goes_on_when_the_memory_map_changes(disks: Disks) -> None:
    with disks.connect(queue_size=SIZE) as client:
        pending = [client.submit(RequestType.IN, 0, room=512) for _ in range(20)]
        added = client.add_memory(1 << 20)
        pending += [client.submit(RequestType.IN, 0, room=512) for _ in range(20)]
        client.remove_memory(added)
        client.wait(pending)
        client.stop_queue(0)
        assert SPLIT_HEADER.unpack_from(region(client).view)[4] == 40


@ALL_PATHS
def test_without_a_region_nothing_is_tracked_and_all_is_served(disks: Disks) -> None:
    with disks.connect(protocol_features=ProtocolFeature.MQ | ProtocolFeature.CONFIG) as client:
        assert client.inflight is None
        client.write(0, b"x" * 512)
        assert client.read(0, 512) == b"x" * 512


# ---------------------------------------------------------------- hostile


def entry(head: int) -> int:
    """Where an entry is."""
    return SPLIT_HEADER.size + head * SPLIT_ENTRY.size


NONSENSE: dict[str, tuple[int, bytes]] = {
    "another version": (VERSION_OFFSET, b"\7\0"),
    "features that nobody knows": (0, b"\1"),
    "fewer descriptors than the ring has": (10, b"\1\0"),
    "more descriptors than there is room for": (10, b"\xff\xff"),
    "a flag that is neither 0 nor 1": (entry(9), b"\xee"),
    "in flight what was never made available": (entry(9), b"\1"),
}


@BOTH_PATHS
@pytest.mark.parametrize("name", NONSENSE)
def test_region_that_makes_no_sense_keeps_its_ring_from_starting(disks: Disks, name: str) -> None:
    with stopped(disks) as client:
        offset, data = NONSENSE[name]
        before = bytes(region(client).view)
        region(client).view[offset : offset + len(data)] = data
        with pytest.raises(PeerError, match="refused"):
            client.start_queue(0)
        assert client.control.is_alive()
        region(client).view[:] = before
        client.start_queue(0)
        client.read(0, 512)
    assert "in-flight region" in disks.said


@BOTH_PATHS
def test_any_bytes_in_a_region_are_refused_or_bounded_work(disks: Disks) -> None:
    rnd = random.Random(7)
    disks.max_lines = 200
    for _ in range(25):
        with stopped(disks) as client:
            view = region(client).view
            kind = rnd.randrange(3)
            if kind == 0:
                view[:] = rnd.randbytes(len(view))
            else:
                SPLIT_HEADER.pack_into(view, 0, 0, 1, SIZE, rnd.randrange(200), rnd.randrange(200))
                for head in range(SIZE):
                    flag = int(rnd.random() < (0.02 if kind == 1 else 1))
                    fields = (flag, rnd.randrange(140), rnd.getrandbits(64))
                    SPLIT_ENTRY.pack_into(view, entry(head), *fields)
            # What is replayed are descriptors that make no sense, too.
            split_ring(client).write_avail_idx(rnd.randrange(SIZE))
            try:
                client.start_queue(0)
            except PeerError:
                assert client.control.is_alive()
            client.abandon()
    with disks.connect() as client:
        client.read(0, 512)


@BOTH_PATHS
def test_front_end_that_changes_a_region_in_use_harms_only_itself(disks: Disks) -> None:
    rnd = random.Random(8)
    with disks.connect("memory", queue_size=SIZE) as client:
        for _ in range(30):
            pending = [client.submit(RequestType.IN, 0, room=512) for _ in range(8)]
            view = region(client).view
            view[:] = rnd.randbytes(len(view))
            client.wait(pending)
        client.stop_queue(0)
    with disks.connect("memory") as client:
        client.read(0, 512)


def keep_reading(client: Client) -> None:
    """Until it fails."""
    for _ in range(1000):
        client.wait([client.submit(RequestType.IN, 0, room=512)])


@BOTH_PATHS
def test_region_whose_file_is_truncated_in_use_ends_the_session(disks: Disks) -> None:
    with disks.connect(queue_size=SIZE) as client:
        description = region(client).description
        fd = os.memfd_create("another")
        try:
            os.ftruncate(fd, description.mmap_size)
            client.stop_queue(0)
            client.control.ask(client.control.frontend.set_inflight_fd(description, fd))
            client.start_queue(0)
            client.read(0, 512)
            os.ftruncate(fd, 0)
        finally:
            os.close(fd)
        with pytest.raises((SessionError, PeerError)):
            keep_reading(client)
        client.abandon()
    with disks.connect() as client:
        client.read(0, 512)


@BOTH_PATHS
@pytest.mark.parametrize("what", ["short", "socket", "closed for writing"])
def test_region_that_cannot_be_mapped_is_refused_and_its_ring_not_started(
    disks: Disks, what: str
) -> None:
    size = part_size(SIZE, packed=False)
    with stopped(disks) as client:
        frontend, control = client.control.frontend, client.control
        fd = os.memfd_create("another")
        os.ftruncate(fd, size - 1 if what == "short" else size)
        if what == "socket":
            os.close(fd)
            fd = os.eventfd(0)
        elif what == "closed for writing":
            reopened = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
            os.close(fd)
            fd = reopened
        try:
            with pytest.raises(PeerError, match="refused"):
                control.ask(frontend.set_inflight_fd(InflightDescription(size, 0, 1, SIZE), fd))
        finally:
            os.close(fd)
        with pytest.raises(PeerError, match="refused"):
            client.start_queue(0)
        control.share_inflight(region(client))
        client.start_queue(0)
        client.read(0, 512)


@BOTH_PATHS
def test_region_at_an_odd_place_of_a_file_is_used(disks: Disks) -> None:
    size, offset = part_size(SIZE, packed=False), 4096 + 8
    with stopped(disks) as client:
        fd = os.memfd_create("another")
        try:
            os.ftruncate(fd, 3 * 4096 + size)
            message = client.control.frontend.set_inflight_fd(
                InflightDescription(size, offset, 1, SIZE), fd
            )
            client.control.ask(message)
            client.start_queue(0)
            client.read(0, 512)
            client.stop_queue(0)
            assert os.pread(fd, 2, offset + VERSION_OFFSET) == b"\1\0"
        finally:
            os.close(fd)


@BOTH_PATHS
def test_a_hundred_files_cost_the_daemon_nothing(disks: Disks) -> None:
    with disks.connect() as client:
        for _ in range(100):
            file = client.control.create_inflight(8, 1024)
            assert file is not None
            file.close()
        client.control.ask(client.control.frontend.request(Request.GET_FEATURES))
