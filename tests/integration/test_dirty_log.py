"""The log of dirty memory: whoever copies the pages that are marked has all of the guest's memory in the end."""

from __future__ import annotations

import os
import random
import select
from collections.abc import Callable, Iterator

import pytest

from tests.daemons import ALL_PATHS, BOTH_PATHS, Disks, eventually, finish
from tests.schedule import HUNT
from vhostblk.client.client import Client
from vhostblk.client.memory_copy import LOG_PAGE, MemoryCopy
from vhostblk.client.queue import Pending
from vhostblk.client.shared_memory import SharedMemory
from vhostblk.errors import SessionError
from vhostblk.vhost.message import ProtocolFeature
from vhostblk.virtio.blk import RequestType
from vhostblk.virtio.features import Feature

_SIZE = 2 << 20  # of the disk that is used
_QUEUE_SIZE = 1024  # its used ring has pages that nothing else is in
_DEPTH = 12


class Guest:
    """Requests of all kinds that make the device write, and which pages the guest writes itself."""

    def __init__(self, client: Client, seed: int) -> None:
        self.client = client
        self.random = random.Random(seed)
        self.pending: list[Pending] = []
        self.written: set[int] = client.memory.written or set()
        self.ring_pages = {
            page
            for queue in client.queues
            for start, end in (
                (queue.driver.gpa, queue.driver.gpa + queue.driver.used_offset),
                # An indirect table may be behind the used ring.
                (
                    queue.driver.gpa + queue.driver.used_offset + 6 + 8 * _QUEUE_SIZE,
                    queue._area.gpa + queue._area.length,
                ),
            )
            for page in range(start & -LOG_PAGE, end, LOG_PAGE)
        }

    def work(self) -> None:
        """Some requests more; some of those before have finished."""
        self.pending = [pending for pending in self.pending if not pending.is_done]
        while len(self.pending) < _DEPTH:
            queue = self.random.randrange(len(self.client.queues))
            length = 512 * self.random.randint(1, 160)
            sector = self.random.randrange((_SIZE - length) // 512)
            kind = self.random.choice([RequestType.IN] * 5 + [RequestType.OUT, RequestType.GET_ID])
            out = self.random.randbytes(length) if kind is RequestType.OUT else b""
            room = {RequestType.IN: length, RequestType.GET_ID: 20}.get(kind, 0)
            if self.random.random() < 0.05:
                sector = 1 << 40  # refused: there is only a status
            self.pending.append(
                self.client.submit(kind, 512 * sector, out=out, room=room, queue=queue)
            )
        self.client.poll()

    def end(self) -> None:
        """All have finished."""
        finish(self.client, self.pending)


@pytest.fixture
def guest(disks: Disks) -> Iterator[Callable[[str, int], Guest]]:
    clients: list[Client] = []

    def connect(export: str, seed: int) -> Guest:
        memory = SharedMemory([4 << 20, 4 << 20], gap=0, spread=True)
        memory.written = set()
        client = disks.connect(
            export, queues=2, queue_size=_QUEUE_SIZE, memory=memory, strict=False
        )
        clients.append(client)
        return Guest(client, seed)

    yield connect
    for client in clients:
        client.close()


def copy_rounds(guest: Guest, copy: MemoryCopy, rounds: int) -> None:
    for _ in range(rounds):
        guest.work()
        match guest.random.randrange(6):
            case 0 | 1:
                pages, guest.written = sorted(guest.written), set()
                guest.client.memory.written = guest.written
                copy.round()
                for page in pages:
                    copy.copy(page)
            case 2 if guest.random.random() < 0.2:
                copy.stop()
                guest.work()
                copy.start()


@ALL_PATHS
@pytest.mark.parametrize("export", ["disk", "direct", "memory"])
def test_copy_of_marked_pages_equals_memory(
    guest: Callable[[str, int], Guest], disks: Disks, export: str
) -> None:
    for seed in range(HUNT):
        running = guest(export, seed)
        copy = MemoryCopy(running.client)
        running.work()
        copy.start()
        copy_rounds(running, copy, 60)
        running.end()
        for index in range(2):
            running.client.stop_queue(index)
        copy.round()
        for page in running.written | running.ring_pages:
            copy.copy(page)
        assert copy.differences() == []
        copy.close()
        running.client.close()


@BOTH_PATHS
def test_ring_that_starts_while_logging_is_on_is_logged(
    guest: Callable[[str, int], Guest], disks: Disks
) -> None:
    running = guest("disk", 1)
    client = running.client
    copy = MemoryCopy(client)
    client.stop_queue(0)
    copy.start()
    client.start_queue(0)
    client.read(0, 4096)
    client.stop_queue(0)
    copy.round()
    for page in running.written | running.ring_pages:
        copy.copy(page)
    assert copy.differences() == []
    copy.close()


@BOTH_PATHS
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("log_first", [False, True], ids=["QEMU", "log first"])
def test_what_a_killed_daemon_wrote_to_its_ring_without_a_mark_is_logged_by_the_next(
    disks: Disks, packed: bool, log_first: bool
) -> None:
    features = int(Feature.VIRTIO_F_VERSION_1) | (int(Feature.VIRTIO_F_RING_PACKED) * packed)
    with disks.connect(queue_size=_QUEUE_SIZE, features=features) as client:
        copy = MemoryCopy(client)
        if log_first:
            client.stop_queue(0)
            copy.start()
        else:
            # QEMU tells of the log when the rings are started, and enables these afterwards.
            copy.start()
            copy.stop()
            client.stop_queue(0)
            client.start_queue(0)
        driver = client.queues[0].driver
        # In a used element, or the id of a descriptor, that nobody comes to again in this test.
        start = driver.desc_offset if packed else driver.used_offset + 4
        place = driver.gpa + start + (16 if packed else 8) * (_QUEUE_SIZE - 1) + 8 * packed
        region = client.memory.region_of(place)
        region.view[place - region.gpa : place - region.gpa + 4] = b"\xc3" * 4
        if log_first:
            client.start_queue(0)
        else:
            client.log_rings(True)
        copy.round()
        page = place & -LOG_PAGE
        assert page not in copy.differences()
        copy.close()


@BOTH_PATHS
def test_front_end_is_told_when_there_are_marks(
    guest: Callable[[str, int], Guest], disks: Disks
) -> None:
    client = guest("disk", 1).client
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    copy = MemoryCopy(client, fd=fd)
    client.read(0, 4096)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fd)
    copy.start()
    client.read(0, 4096)
    eventually(lambda: copy.round() > 0, "pages are marked")
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(10_000)  # told of after the request, and the marks, can be seen
    copy.close()
    os.close(fd)


# ---------------------------------------------------------------- front-ends that do it wrong


def _file(size: int) -> int:
    fd = os.memfd_create("log")
    os.ftruncate(fd, size)
    return fd


@BOTH_PATHS
@pytest.mark.parametrize(
    ("size", "offset", "real"),
    [
        *[(4096, 0, 4095), (4096, 1, 4096), (1, 1 << 20, 4096), (0, 0, 4096)],
        *[(1 << 63, 1 << 63, 4096), (2**64 - 1, 0, 4096), (4096, 2**64 - 4096, 4096)],
    ],
)
def test_log_that_is_not_in_its_file_ends_the_session(
    disks: Disks, size: int, offset: int, real: int
) -> None:
    fd = _file(real)
    with disks.connect() as client:
        with pytest.raises(SessionError):
            client.control.ask(client.control.frontend.set_log_base(size, offset, fd))
        client.abandon()
    os.close(fd)
    with disks.connect() as client:
        client.read(0, 512)


@BOTH_PATHS
def test_log_that_is_no_file_ends_the_session(disks: Disks) -> None:
    fd = os.eventfd(0)
    with disks.connect() as client:
        with pytest.raises(SessionError):
            client.control.ask(client.control.frontend.set_log_base(4096, 0, fd))
        client.abandon()
    os.close(fd)


@BOTH_PATHS
@pytest.mark.parametrize("case", ["too short", "truncated"])
def test_log_that_lacks_what_was_written_ends_the_session_and_nobody_elses(
    disks: Disks, case: str
) -> None:
    """The front-end would go on with a copy of the guest that is wrong, and not know."""
    with disks.connect("memory") as other, disks.connect() as client:
        size = 64 if case == "too short" else 1 << 20
        fd = _file(size)
        client.control.ask(client.control.frontend.set_log_base(size, 0, fd))
        client.control.set_features(client.control.features | 1 << 26)
        os.ftruncate(fd, 0)
        client.submit(RequestType.IN, 0, room=4096)
        eventually(lambda: not client.control.is_alive(), "the session ends")
        client.abandon()
        os.close(fd)
        assert len(other.read(0, 512)) == 512
    with disks.connect() as client:
        client.read(0, 512)
    assert "log of dirty memory is too short, or was truncated" in disks.said


@BOTH_PATHS
def test_log_is_offered_with_its_feature_bit(disks: Disks) -> None:
    with disks.connect() as client:
        assert client.offered & 1 << 26
        assert client.control.protocol_features & ProtocolFeature.LOG_SHMFD
