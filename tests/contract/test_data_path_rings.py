"""What every data path owes a ring: notifications, states, exchanges of fds and memory while requests are in flight.

VIRTIO 1.2 §2.7 and vhost-user, "Ring states". The requests themselves are in test_data_path_contract.py.
"""

from __future__ import annotations

import itertools
import os
import random

import pytest

from tests.daemons import ALL_PATHS, SERIAL, Disks, barrier, eventually, finish, split_ring
from vhostblk.block.host_io import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from vhostblk.client.client import FEATURES, Client
from vhostblk.client.queue import Pending, whole
from vhostblk.client.shared_memory import SharedMemory
from vhostblk.client.workload import Workload
from vhostblk.errors import PeerError
from vhostblk.vhost.message import Request
from vhostblk.vhost.vring import VringFd
from vhostblk.virtio.blk import RequestType, Status
from vhostblk.virtio.driver import Buffer
from vhostblk.virtio.features import Feature

pytestmark = ALL_PATHS

WITHOUT_EVENT_IDX = FEATURES & ~Feature.VIRTIO_F_EVENT_IDX
SECTOR = 512


def used_word(client: Client, offset: int, index: int = 0) -> int:
    driver = client.queues[index].driver
    word = Buffer(driver.gpa + driver.used_offset + offset, 2)
    return int.from_bytes(client.memory.read(word), "little")


def used_idx(client: Client, index: int = 0) -> int:
    return used_word(client, 2, index)


def avail_event(client: Client, index: int = 0) -> int:
    return used_word(client, 4 + 8 * client.queues[index].driver.size, index)


def calls(client: Client, index: int = 0) -> int:
    """How often the device has called since the last time this was asked."""
    barrier(client, index)
    try:
        return os.eventfd_read(client.queues[index].call_fd)
    except BlockingIOError:
        return 0


def submit(client: Client, count: int = 1, *, queue: int = 0, notify: bool = True) -> list[Pending]:
    pending = [
        client.submit(RequestType.GET_ID, room=20, queue=queue, notify=False) for _ in range(count)
    ]
    if notify:
        client.queues[queue].driver.publish()
        client.queues[queue].kick()
    return pending


def quiet(client: Client) -> None:
    """One request is through and the device has told all it has to tell."""
    finish(client, submit(client))
    calls(client)


# ---------------------------------------------------------------- the ring goes round


def go_round(client: Client, depth: int, rounds: int) -> None:
    """So many writes at a time, so many times; the last one is read back."""
    offset = 0
    for _ in range(rounds):
        batch = []
        for _ in range(depth):
            data = offset.to_bytes(8, "little") * 64
            batch.append(client.submit(RequestType.OUT, offset, out=data, framing=whole))
            offset = (offset + SECTOR) % (1 << 20)
        client.wait(batch)
        assert all(p.result() == b"" and p.written == 1 for p in batch)
    last = (offset - SECTOR) % (1 << 20)
    read = client.submit(RequestType.IN, last, room=SECTOR, framing=whole)
    client.wait([read])
    assert read.result() == last.to_bytes(8, "little") * 64


@pytest.mark.parametrize("size", [1, 2, 4, 64, 1024, 32768])
@pytest.mark.parametrize("event_idx", [True, False], ids=["event_idx", "flags"])
def test_rings_of_every_size_go_round_and_their_counters_wrap(
    disks: Disks, size: int, event_idx: bool
) -> None:
    features = FEATURES if event_idx else WITHOUT_EVENT_IDX
    if size > 1:
        features &= ~Feature.VIRTIO_F_INDIRECT_DESC  # of 32768 tables there is no room for
    with disks.connect(features=features, queue_size=size) as client:
        client.stop_queue(0)
        split_ring(client).set_indices(65530)
        client.start_queue(0)
        depth = max(1, min(size // 2, 500))
        go_round(client, depth, max(3, 40 // depth))
        assert split_ring(client).used_idx < 65530
        assert client.stop_queue(0) == split_ring(client).avail_idx


def test_a_ring_can_be_full_of_the_smallest_requests(disks: Disks) -> None:
    with disks.connect(queue_size=256) as client:
        for _ in range(3):
            pending = submit(client, 256)
            assert client.queues[0].driver.free_descriptors == 0
            client.wait(pending)
            assert {p.result().rstrip(b"\0") for p in pending} == {SERIAL.encode()}


# ---------------------------------------------------------------- notifications


def test_the_first_completion_after_a_start_is_always_told(disks: Disks) -> None:
    with disks.connect() as client:
        calls(client)
        split_ring(client).write_used_event(1000)
        finish(client, submit(client))
        assert calls(client) == 1


def test_event_idx_is_told_of_exactly_the_element_it_asked_for(disks: Disks) -> None:
    with disks.connect() as client:
        quiet(client)
        driver = split_ring(client)
        for ahead in (0, 1, 4):
            driver.write_used_event(driver.used_idx + ahead)
            for _ in range(ahead):
                finish(client, submit(client))
            assert calls(client) == 0
            finish(client, submit(client))
            assert calls(client) == 1
            finish(client, submit(client, 3))
            assert calls(client) == 0


def test_event_idx_is_told_once_of_a_batch_that_passes_it(disks: Disks) -> None:
    with disks.connect() as client:
        quiet(client)
        driver = split_ring(client)
        driver.write_used_event(driver.used_idx + 5)
        finish(client, submit(client, 16))
        assert calls(client) == 1


def test_event_idx_is_exact_when_the_counters_wrap(disks: Disks) -> None:
    with disks.connect() as client:
        client.stop_queue(0)
        split_ring(client).set_indices(65533)
        client.start_queue(0)
        quiet(client)
        driver = split_ring(client)
        driver.write_used_event(1)
        for expected in (0, 0, 0, 1, 0):
            finish(client, submit(client))
            assert calls(client) == expected


def test_without_event_idx_the_flag_decides(disks: Disks) -> None:
    with disks.connect(features=WITHOUT_EVENT_IDX) as client:
        quiet(client)
        driver = split_ring(client)
        for _ in range(2):
            driver.write_avail_flags(1)
            finish(client, submit(client, 8))
            assert calls(client) == 0
            driver.write_avail_flags(0)
            finish(client, submit(client))
            assert calls(client) == 1


def test_without_event_idx_used_event_means_nothing(disks: Disks) -> None:
    with disks.connect(features=WITHOUT_EVENT_IDX) as client:
        quiet(client)
        split_ring(client).write_used_event(12345)
        split_ring(client).write_avail_flags(0)
        finish(client, submit(client))
        assert calls(client) == 1


@pytest.mark.parametrize("event_idx", [True, False], ids=["event_idx", "flags"])
def test_an_idle_device_asks_to_be_kicked_for_the_very_next_request(
    disks: Disks, event_idx: bool
) -> None:
    with disks.connect(features=FEATURES if event_idx else WITHOUT_EVENT_IDX) as client:
        driver = split_ring(client)
        for count in (1, 3, 100):
            finish(client, submit(client, count))
            if event_idx:
                eventually(lambda: avail_event(client) == driver.avail_idx, "avail_event")
            else:
                eventually(lambda: used_word(client, 0) == 0, "the flag to go")
            driver.kick_needed()  # for what was kicked without asking
            pending = submit(client, notify=False)
            driver.publish()
            assert driver.kick_needed()
            client.queues[0].kick()
            finish(client, pending)


def test_kicks_that_nobody_needs_do_no_harm(disks: Disks) -> None:
    with disks.connect(queues=2) as client:
        for _ in range(200):
            client.queues[0].kick()
        os.eventfd_write(client.queues[1].kick_fd, 2**64 - 2)
        assert client.get_id(queue=0) == client.get_id(queue=1) == SERIAL


def test_no_wakeup_is_lost_in_many_short_sleeps(disks: Disks) -> None:
    with disks.connect(queues=2) as client:
        for i in range(300):
            assert client.get_id(queue=i % 2) == SERIAL


@pytest.mark.parametrize("kick", [True, False], ids=["kick", "no kick"])
@pytest.mark.parametrize("call", [True, False], ids=["call", "no call"])
def test_rings_without_a_kick_or_call_fd_are_polled(disks: Disks, kick: bool, call: bool) -> None:
    with disks.connect(queues=2) as client:
        client.stop_queue(0)
        client.start_queue(0, kick=kick, call=call)
        for _ in range(20):
            pending = client.submit(RequestType.GET_ID, room=20, notify=False)
            client.queues[0].driver.publish()
            if kick:
                client.queues[0].kick()
            client.wait([pending])
            assert client.get_id(queue=1) == SERIAL
        client.stop_queue(0)
        client.start_queue(0)
        assert client.get_id() == SERIAL


def test_a_ring_starts_with_a_call_so_that_nothing_told_before_is_missed(disks: Disks) -> None:
    # QEMU's tests wait for it.
    with disks.connect() as client:
        assert calls(client) == 1


# ---------------------------------------------------------------- fds change while requests are in flight


def exchange(client: Client, which: VringFd, index: int = 0) -> int:
    """Give the daemon a new fd; the old one is returned, still open."""
    queue = client.queues[index]
    new = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    client.control.ask(client.control.frontend.set_vring_fd(index, which, new))
    if which is VringFd.CALL:
        old, queue.call_fd = queue.call_fd, new
    else:
        old, queue.kick_fd = queue.kick_fd, new
    return old


def test_a_call_fd_may_be_exchanged_while_requests_are_in_flight(disks: Disks) -> None:
    with disks.connect("slow") as client:
        pending = submit_reads(client, 20)
        old = exchange(client, VringFd.CALL)
        try:
            os.eventfd_read(old)
        except BlockingIOError:
            pass
        client.wait(pending)
        assert len(pending) == sum(p.status == Status.OK for p in pending)
        barrier(client)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(old)
        os.close(old)


def test_a_new_call_fd_is_called_at_once(disks: Disks) -> None:
    # What was called through the old one may not have been seen: QEMU does this on every reset of a vector.
    with disks.connect() as client:
        calls(client)
        os.close(exchange(client, VringFd.CALL))
        assert calls(client) == 1


def test_a_kick_fd_may_be_exchanged_while_requests_are_in_flight(disks: Disks) -> None:
    with disks.connect("slow") as client:
        pending = submit_reads(client, 10)
        old = exchange(client, VringFd.KICK)
        more = submit_reads(client, 10)
        client.wait(pending + more)
        os.eventfd_write(old, 1)
        os.close(old)
        client.wait(submit_reads(client, 1))


def test_fds_may_be_taken_away_and_given_back_while_running(disks: Disks) -> None:
    with disks.connect() as client:
        queue, frontend = client.queues[0], client.control.frontend
        for which, fd in itertools.product((VringFd.CALL, VringFd.KICK), (None, "its own")):
            mine = queue.call_fd if which is VringFd.CALL else queue.kick_fd
            client.control.ask(frontend.set_vring_fd(0, which, mine if fd else None))
            queue.is_polled = which is VringFd.CALL and fd is None
            for _ in range(5):
                assert client.get_id() == SERIAL


def submit_reads(client: Client, count: int, queue: int = 0) -> list[Pending]:
    return [client.submit(RequestType.IN, 0, room=SECTOR, queue=queue) for _ in range(count)]


# ---------------------------------------------------------------- states


def test_a_disabled_ring_takes_nothing_until_it_is_enabled(disks: Disks) -> None:
    with disks.connect(queues=2) as client:
        frontend = client.control.frontend
        for _ in range(3):
            client.control.ask(frontend.set_vring_enable(0, False))
            before = used_idx(client)
            pending = submit(client, 5)
            barrier(client)
            assert client.get_id(queue=1) == SERIAL
            barrier(client)
            assert used_idx(client) == before
            client.control.ask(frontend.set_vring_enable(0, True))
            finish(client, pending)


def test_what_a_disabled_ring_had_taken_is_finished(disks: Disks) -> None:
    with disks.connect("slow") as client:
        pending = submit_reads(client, 10)
        barrier(client)
        client.control.ask(client.control.frontend.set_vring_enable(0, False))
        later = submit_reads(client, 5)
        client.wait(pending)
        assert not any(p.is_done for p in later)
        client.control.ask(client.control.frontend.set_vring_enable(0, True))
        client.wait(later)


def test_reset_owner_disables_all_rings(disks: Disks) -> None:
    with disks.connect(queues=2) as client:
        client.control.ask(client.control.frontend.request(Request.RESET_OWNER))
        pending = [*submit(client, 2, queue=0), *submit(client, 2, queue=1)]
        barrier(client)
        assert used_idx(client, 0) == used_idx(client, 1) == 0
        for index in (0, 1):
            client.control.ask(client.control.frontend.set_vring_enable(index, True))
        finish(client, pending)


def test_stopping_a_ring_finishes_what_it_took_and_tells_where_it_was(disks: Disks) -> None:
    with disks.connect("slow", queues=2) as client:
        others = submit_reads(client, 5, queue=1)
        pending = submit_reads(client, 40)
        base = client.stop_queue(0)
        assert used_idx(client) == base <= 40
        client.poll()
        assert sum(p.is_done for p in pending) == base
        client.start_queue(0, base)
        client.wait(pending + others)
        assert {p.status for p in pending + others} == {Status.OK}


def test_stopping_a_disabled_ring_tells_what_it_never_took(disks: Disks) -> None:
    with disks.connect() as client:
        finish(client, submit(client, 7))
        client.control.ask(client.control.frontend.set_vring_enable(0, False))
        pending = submit(client, 5)
        barrier(client)
        assert client.stop_queue(0) == 7
        client.start_queue(0, 7)
        finish(client, pending)


def test_a_ring_is_stopped_and_started_under_load(disks: Disks) -> None:
    with disks.connect(queues=2) as client:
        data = random.Random(4).randbytes(4096)
        pending: list[Pending] = []
        for i in range(30):
            pending += [
                client.submit(RequestType.OUT, i * 65536 + j * 4096, out=data) for j in range(10)
            ]
            base = client.stop_queue(0)
            client.start_queue(0, base)
            if i % 5 == 4:
                client.wait(pending)
                pending.clear()
        assert client.read(29 * 65536 + 9 * 4096, 4096, queue=1) == data


def test_stopping_a_stopped_ring_gives_the_base_it_has(disks: Disks) -> None:
    with disks.connect() as client:
        assert client.get_id() == SERIAL
        assert client.stop_queue(0) == 1
        assert client.control.vring_base(0) == 1
        client.start_queue(0)
        assert client.get_id() == SERIAL


def test_a_running_ring_cannot_be_given_another_shape(disks: Disks) -> None:
    with disks.connect() as client:
        frontend = client.control.frontend
        for message in (
            frontend.set_vring_num(0, 64),
            frontend.set_vring_base(0, 3),
            frontend.set_vring_addr(0, desc=0, avail=0, used=0),
        ):
            with pytest.raises(PeerError):
                client.control.ask(message)
        assert client.get_id() == SERIAL


def test_a_device_can_be_reset_with_requests_in_flight(disks: Disks) -> None:
    with disks.connect("slow", queues=2) as client:
        for _ in range(3):
            submit_reads(client, 20)
            submit_reads(client, 20, queue=1)
            client.reset_device()
            client.make_queues(2, 128)
            client.start_queue(0)
            client.start_queue(1)
            client.read(0, 512, queue=1)


def test_reset_device_forgets_what_the_driver_chose(disks: Disks) -> None:
    with disks.connect() as client:
        client.set_writeback(False)
        assert client.read_config().writeback == 0
        client.reset_device()
        assert client.read_config().writeback == 1


# ---------------------------------------------------------------- memory changes


def test_memory_is_added_and_removed_under_way(disks: Disks) -> None:
    with disks.connect("disk", queues=2, memory=SharedMemory([16 << 20], spread=True)) as client:
        workload = Workload(client, seed=11, span=(0, 1 << 20), depth=16)
        for _ in range(6):
            workload.run(30)
            flying = submit_reads(client, 20)
            region = client.add_memory(4 << 20)
            room = client.memory.allocate(4096)
            client.wait(flying)
            client.memory.free(room)
            workload.run(30)
            client.remove_memory(region)
        workload.verify()


def test_memory_that_is_added_is_used_for_requests(disks: Disks) -> None:
    with disks.connect("direct", memory=SharedMemory([2 << 20])) as client:
        blocked = client.memory.allocate(1 << 20)
        client.add_memory(4 << 20)
        data = random.Random(5).randbytes(2 << 20)  # fits only into the new region
        client.write(0, data)
        assert client.read(0, len(data)) == data
        client.memory.free(blocked)


@pytest.mark.parametrize("export", ["disk", "direct"])
def test_pages_that_a_balloon_took_and_gave_back_are_read_into(disks: Disks, export: str) -> None:
    """The VMM punches a hole in the file; what is at that address afterwards is another page."""
    with disks.connect(export, queue_size=8) as client:
        data = random.Random(6).randbytes(4096)
        client.write(0, data)
        region = client.memory.regions[0]
        written = bytes(region.view).index(data)
        # Nothing around them: the device writes to its rings when it pleases.
        region.view[written : written + 4096] = bytes(4096)
        assert client.read(0, 4096) == data
        at = bytes(region.view).index(data)
        assert at % 4096 == 0
        fallocate(region.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, region.offset + at, 4096)
        assert not any(region.view[at : at + 4096])
        assert client.read(0, 4096) == data
        assert region.view[at : at + 4096] == data


@pytest.mark.parametrize("export", ["slow", "direct", "pinned"])
def test_the_memory_table_is_replaced_while_rings_run(disks: Disks, export: str) -> None:
    with disks.connect(export, queues=2, memory=SharedMemory([8 << 20] * 2)) as client:
        for _ in range(4):
            pending = submit_reads(client, 30) + submit_reads(client, 30, queue=1)
            client.control.share(client.memory, one_by_one=False)
            client.wait(pending)
            assert {p.status for p in pending} == {Status.OK}
            assert client.get_id(queue=1) == SERIAL


def test_memory_is_replaced_while_a_ring_is_disabled(disks: Disks) -> None:
    with disks.connect() as client:
        client.control.ask(client.control.frontend.set_vring_enable(0, False))
        pending = submit(client, 3)
        client.control.share(client.memory, one_by_one=False)
        barrier(client)
        assert used_idx(client) == 0
        client.control.ask(client.control.frontend.set_vring_enable(0, True))
        finish(client, pending)


def test_a_polled_ring_goes_on_after_the_memory_was_replaced(disks: Disks) -> None:
    with disks.connect() as client:
        client.stop_queue(0)
        client.start_queue(0, kick=False, call=False)
        assert client.get_id() == SERIAL
        client.control.share(client.memory, one_by_one=False)
        assert client.get_id() == SERIAL
