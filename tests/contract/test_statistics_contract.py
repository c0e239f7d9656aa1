"""Every data path counts the same requests in the same way, where others can see it."""

from __future__ import annotations

import os
import time
from collections import Counter

import pytest

from tests.daemons import ALL_PATHS, CAPACITY, SERIAL, Disks, eventually
from vhostblk.client.client import Client, segments
from vhostblk.client.queue import Pending
from vhostblk.errors import BlockError
from vhostblk.export.statistics import QueueStatistics
from vhostblk.export.stats_layout import OPERATIONS
from vhostblk.export.stats_reader import PageCopy, read_page
from vhostblk.virtio.blk import SECTOR, RequestType
from vhostblk.virtio.driver import Buffer

pytestmark = ALL_PATHS

END = 16 << 20
NOTHING = (0, 0, 0)


def page_of(disks: Disks, export: str = "disk") -> PageCopy:
    return read_page(f"vhostblk-{disks.process.pid}-{export}")


class Watched:
    """What an export counts from here on."""

    def __init__(self, disks: Disks, export: str = "disk") -> None:
        self._disks = disks
        self._export = export
        self._before = page_of(disks, export)

    def since(self, queue: int = 0) -> QueueStatistics:
        nothing = QueueStatistics()
        now = page_of(self._disks, self._export).queues.get(queue, nothing)
        return now.since(self._before.queues.get(queue, nothing))

    def wait_for(self, requests: int, queue: int = 0) -> QueueStatistics:
        """All data paths count some of a request after the driver can see its end."""

        def are_counted() -> bool:
            now = self.since(queue)
            return now.requests >= requests and not now.in_flight

        eventually(are_counted, f"{requests} requests, and none in flight")
        return self.since(queue)


def summary(queue: QueueStatistics) -> dict[str, tuple[int, int, int]]:
    return {
        name: (operation.requests, operation.bytes, operation.errors)
        for name, operation in queue.operations.items()
    }


def run_all(client: Client, times: int, queue: int) -> None:
    """Each type of request so many times, the good ones and the bad ones."""
    for n in range(times):
        client.write(n * 8192, b"x" * 8192, queue=queue)
        client.read(n * 4096, 4096, queue=queue)
        client.flush(queue=queue)
        client.discard((n * 4096, 4096), (1 << 20, 8192), queue=queue)
        client.write_zeroes((n * 4096, 2048), queue=queue)
        assert client.get_id(queue=queue) == SERIAL
        bad = [
            client.submit(RequestType.IN, END, room=512, queue=queue),
            client.submit(RequestType.OUT, END - SECTOR, out=bytes(1024), queue=queue),
            client.submit(RequestType.DISCARD, out=segments([(END, 512)]), queue=queue),
            client.submit(RequestType.WRITE_ZEROES, out=b"", queue=queue),
            client.submit(77, queue=queue),
        ]
        client.wait(bad)
        assert all(pending.status for pending in bad)


def test_requests_of_every_type_are_counted_alike(disks: Disks) -> None:
    times = 7
    watched = Watched(disks)
    with disks.connect(strict=False, queues=3) as client:
        run_all(client, times, queue=2)
        found = watched.wait_for(11 * times, queue=2)
        assert summary(found) == {
            "read": (2 * times, 4096 * times, times),
            "write": (2 * times, 8192 * times, times),
            "flush": (times, 0, 0),
            "discard": (2 * times, (4096 + 8192) * times, times),
            "write_zeroes": (2 * times, 2048 * times, times),
            "get_id": (times, 20 * times, 0),
            "other": (times, 0, times),
        }
        assert found.hits + found.misses == found.requests == 11 * times
        assert found.in_flight == 0
        # Every bad one broke a rule; none was failed by the disk.
        assert all(operation.invalid == operation.errors for operation in found.operations.values())
        assert (found.hits == 0) == (disks.kind == "python")
        for operation in found.operations.values():
            assert sum(operation.latency) == operation.requests
            assert operation.latency_ns <= operation.requests * operation.latency_max_ns
        assert 0 < found.kicks <= found.requests
        assert 0 < found.calls + found.calls_suppressed <= found.requests + 1
        assert watched.since(1).requests == 0


def test_requests_that_miss_once_are_counted_once(disks: Disks) -> None:
    """A read that Python maps and gives back to the engine, and one that Python serves."""
    watched = Watched(disks, "memory")
    with disks.connect("memory") as client:
        client.discard((0, 1 << 20))
        for _ in range(20):
            client.read(4096, 4096)
        found = watched.wait_for(21)
    assert summary(found)["read"] == (20, 20 * 4096, 0)
    assert (found.hits + found.misses, found.in_flight) == (21, 0)
    assert found.misses == 21 if disks.kind == "python" else 1 <= found.misses < 21


def test_a_header_that_is_too_short_is_one_other_request(disks: Disks) -> None:
    watched = Watched(disks)
    with disks.connect() as client:
        memory, queue = client.memory, client.queues[0]
        room = memory.allocate(4096)
        queue.driver.add([Buffer(room.gpa, 3)], [Buffer(room.gpa + 100, 1)])
        queue.notify()
        found = watched.wait_for(1)
    assert summary(found) == dict.fromkeys(OPERATIONS, NOTHING) | {"other": (1, 0, 1)}


def test_what_is_in_flight_can_be_seen(disks: Disks) -> None:
    watched = Watched(disks, "slow")
    sent: list[Pending] = []
    with disks.connect("slow") as client:

        def are_seen() -> bool:
            """Five requests; whoever looks too late sees none of them."""
            pending = [client.submit(RequestType.IN, n * 4096, room=4096) for n in range(5)]
            sent.extend(pending)
            most = 0
            while not all(request.is_done for request in pending):
                most = max(most, watched.since().in_flight)
                client.poll()
            return most == 5

        eventually(are_seen, "five requests in flight", 60)
        found = watched.wait_for(len(sent))
    assert found.operations["read"].requests == len(sent)
    assert found.operations["read"].latency_max_ns >= 50_000_000


def test_sessions_are_counted(disks: Disks) -> None:
    before = page_of(disks).header
    assert page_of(disks).is_native == (disks.kind != "python")
    for number in (1, 2):
        with disks.connect() as client:
            client.get_id()
            header = page_of(disks).header
            assert (header.sessions, header.connected) == (before.sessions + number, 1)
        eventually(lambda: page_of(disks).header.connected == 0, "the front-end left")


def test_random_workload_adds_up(disks: Disks) -> None:
    """Mixed sizes, in flight together, over two queues."""
    watched = Watched(disks)
    sent: Counter[int] = Counter()
    with disks.connect(queues=2) as client:
        pending = []
        for n in range(400):
            kind, length = (RequestType.IN, 512 * (1 + n % 9)) if n % 3 else (RequestType.OUT, 4096)
            queue = n % 2
            if kind == RequestType.IN:
                request = client.submit(kind, n * 512, room=length, queue=queue)
            else:
                request = client.submit(kind, n * 512, out=bytes(length), queue=queue)
            pending.append(request)
            sent[queue] += length
            if len(pending) == 40:
                client.wait(pending)
                pending.clear()
        client.wait(pending)
        for queue, length in sent.items():
            found = watched.wait_for(200, queue)
            assert sum(operation.bytes for operation in found.operations.values()) == length
            assert found.hits + found.misses == found.requests == 200


def test_idle_time_begins_with_the_last_answer(disks: Disks) -> None:
    with disks.connect("memory") as client:
        watched = Watched(disks, "memory")
        before = time.monotonic_ns()
        client.read(0, 4096)
        served = watched.wait_for(1)
        eventually(lambda: watched.since().last_ns >= before, "the last answer")
        assert served.last_ns <= time.monotonic_ns()
        idle = watched.since().idle_ns
        assert idle is not None
        assert idle <= time.monotonic_ns() - before


def test_what_the_disk_fails_is_an_error_and_not_invalid(disks: Disks) -> None:
    """Also where the engine fails the request by itself."""
    watched = Watched(disks, "grows")
    os.truncate(disks.image("grows"), 1 << 20)
    with disks.connect("grows") as client:
        try:
            for _ in range(5):
                with pytest.raises(BlockError):
                    client.read(2 << 20, 4096)
            found = watched.wait_for(5).operations["read"]
        finally:
            os.truncate(disks.image("grows"), CAPACITY)
    assert (found.requests, found.errors, found.invalid, found.bytes) == (5, 5, 0, 0)
