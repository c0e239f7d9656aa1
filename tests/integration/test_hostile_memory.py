"""A front-end whose shared memory is not what it says: it costs its session, or a queue, and nobody anything else.

Memory tables that cannot be, files that are none, files that shrink under rings and under data (SIGBUS), and regions
that go away while rings are in them. The fixture `disks` checks the daemon after every test.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.daemons import BOTH_PATHS, SERIAL, Disks, barrier, eventually
from vhostblk.client.client import FEATURES, Client
from vhostblk.client.shared_memory import SharedMemory
from vhostblk.errors import PeerError, SessionError
from vhostblk.vhost.message import U64, MemoryRegion, Request
from vhostblk.vhost.vring import VringFd
from vhostblk.virtio.blk import RequestType, Status
from vhostblk.virtio.driver import Buffer

pytestmark = BOTH_PATHS

PAGE = 4096
FAR = 1 << 44


def next_client_is_served(disks: Disks, export: str = "disk") -> None:
    with disks.connect(export) as client:
        assert len(client.read(0, 512)) == 512


@contextmanager
def memory_file(size: int) -> Iterator[int]:
    fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.truncate(fd, size)
    yield fd
    os.close(fd)


# ---------------------------------------------------------------- tables

TABLES: dict[str, list[MemoryRegion]] = {
    "empty region": [MemoryRegion(FAR, 0, FAR, 0)],
    "longer than its file": [MemoryRegion(FAR, 1 << 20, FAR, PAGE)],
    "behind its file": [MemoryRegion(FAR, PAGE, FAR, 1 << 30)],
    "wraps in the guest": [MemoryRegion(2**64 - PAGE, 2 * PAGE, FAR, 0)],
    "wraps in the front-end": [MemoryRegion(FAR, 2 * PAGE, 2**64 - PAGE, 0)],
    "offset wraps": [MemoryRegion(FAR, 2 * PAGE, FAR, 2**64 - PAGE)],
    "all there is": [MemoryRegion(0, 2**64 - 1, 0, 0)],
    "half of all there is": [MemoryRegion(0, 1 << 63, 0, 0)],
    "overlap": [MemoryRegion(FAR, 2 * PAGE, FAR, 0), MemoryRegion(FAR + PAGE, PAGE, 2 * FAR, 0)],
    "the same twice": [MemoryRegion(FAR, PAGE, FAR, 0)] * 2,
    "one good, one bad": [MemoryRegion(FAR, PAGE, FAR, 0), MemoryRegion(2 * FAR, 0, FAR, 0)],
}


@pytest.mark.parametrize("case", TABLES)
def test_impossible_memory_is_refused_and_what_was_there_stays(disks: Disks, case: str) -> None:
    with memory_file(1 << 20) as fd, disks.connect() as client:
        regions = TABLES[case]
        frontend, ask = client.control.frontend, client.control.ask
        with pytest.raises(PeerError):
            ask(frontend.set_mem_table(regions, [fd] * len(regions)))
        if len(regions) == 1:
            with pytest.raises(PeerError):
                ask(frontend.add_mem_reg(regions[0], fd))
        assert client.get_id() == SERIAL


@pytest.mark.parametrize("count", [0, 9, 2**32 - 1])
def test_region_counts_that_a_message_cannot_hold_are_refused(disks: Disks, count: int) -> None:
    with memory_file(1 << 20) as fd, disks.connect() as client:
        region = b"".join(n.to_bytes(8, "little") for n in (FAR, PAGE, FAR, 0))
        for fds in ((), (fd,), (fd,) * 8):
            data = count.to_bytes(4, "little") + bytes(4) + region * min(count, 8)
            client.control.send_raw(Request.SET_MEM_TABLE, data, fds, flags=9)
            assert client.control.receive().payload.pack() != bytes(8)
        assert client.get_id() == SERIAL


def test_a_table_with_fewer_or_more_fds_than_regions_is_refused(disks: Disks) -> None:
    with memory_file(1 << 20) as fd, disks.connect() as client:
        region = b"".join(n.to_bytes(8, "little") for n in (FAR, PAGE, FAR, 0))
        data = (2).to_bytes(8, "little") + region * 2
        for count in (1, 3, 8, 100):
            client.control.send_raw(Request.SET_MEM_TABLE, data, (fd,) * count, flags=9)
            assert client.control.receive().payload.pack() != bytes(8)
        assert client.get_id() == SERIAL


def test_more_regions_than_slots_are_refused(disks: Disks) -> None:
    with memory_file(1 << 20) as fd, disks.connect() as client:
        frontend, ask = client.control.frontend, client.control.ask
        slots = ask(frontend.request(Request.GET_MAX_MEM_SLOTS))
        assert isinstance(slots, U64)
        assert slots.value >= 32
        for i in range(slots.value - len(client.memory.regions)):
            ask(frontend.add_mem_reg(MemoryRegion(FAR + i * PAGE, PAGE, FAR, 0), fd))
        with pytest.raises(PeerError):
            ask(frontend.add_mem_reg(MemoryRegion(2 * FAR, PAGE, FAR, 0), fd))
        assert client.get_id() == SERIAL


def test_removing_what_was_never_added_is_refused(disks: Disks) -> None:
    with disks.connect() as client:
        region = client.memory.regions[0].description
        for wrong in (
            MemoryRegion(FAR, PAGE, FAR, 0),
            MemoryRegion(region.gpa, PAGE, region.uva, 0),
            MemoryRegion(region.gpa, region.size, region.uva + PAGE, 0),
        ):
            with pytest.raises(PeerError):
                client.control.ask(client.control.frontend.rem_mem_reg(wrong))
        assert client.get_id() == SERIAL


def _socket() -> int:
    return socket.socket(socket.AF_UNIX).detach()


def _pipe() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def _sealed() -> int:
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.truncate(fd, 1 << 20)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    return fd


def _read_only() -> int:
    fd = os.memfd_create("read-only")
    os.truncate(fd, 1 << 20)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.close(fd)
    return again


NOT_MEMORY: dict[str, Callable[[], int]] = {
    "socket": _socket,
    "pipe": _pipe,
    "eventfd": lambda: os.eventfd(0),
    "/dev/null": lambda: os.open("/dev/null", os.O_RDWR),
    "/dev/zero": lambda: os.open("/dev/zero", os.O_RDWR),
    "directory": lambda: os.open("/", os.O_RDONLY),
    "empty file": lambda: os.memfd_create("empty"),
    "sealed file": _sealed,
    "read-only file": _read_only,
    "path only": lambda: os.open("/proc/self/exe", os.O_PATH),
}


@pytest.mark.parametrize("case", NOT_MEMORY)
def test_what_is_not_memory_is_refused(disks: Disks, case: str) -> None:
    fd = NOT_MEMORY[case]()
    with disks.connect() as client:
        frontend, ask = client.control.frontend, client.control.ask
        region = MemoryRegion(FAR, 1 << 20, FAR, 0)
        with pytest.raises(PeerError):
            ask(frontend.add_mem_reg(region, fd))
        with pytest.raises(PeerError):
            ask(frontend.set_mem_table([region], [fd]))
        assert client.get_id() == SERIAL
    os.close(fd)


# ---------------------------------------------------------------- memory goes away in an orderly way


def test_removing_the_memory_of_a_running_ring_breaks_that_ring(disks: Disks) -> None:
    memory = SharedMemory([1 << 20, 8 << 20])
    with disks.connect(queues=1, queue_size=64, memory=memory, strict=False) as client:
        first = memory.regions[0].description
        assert memory.regions[0].gpa <= client.queues[0].driver.gpa < memory.regions[0].end
        client.control.ask(client.control.frontend.rem_mem_reg(first))
        client.wait_broken(0)
        assert client.control.is_alive()
        client.stop_queue(0)
        with pytest.raises(PeerError):
            client.start_queue(0, 0)
    next_client_is_served(disks)


def test_removing_all_memory_breaks_all_rings(disks: Disks) -> None:
    with disks.connect(queues=2, strict=False) as client:
        region = client.memory.regions[0].description
        client.control.ask(client.control.frontend.rem_mem_reg(region))
        for index in (0, 1):
            client.wait_broken(index)
        assert client.control.is_alive()
    next_client_is_served(disks)


def test_removing_memory_waits_for_the_requests_that_use_it(disks: Disks) -> None:
    with shrinking(disks, "slow") as client:
        pending = [client.submit(RequestType.IN, room=256 << 10) for _ in range(8)]
        driver = client.queues[0].driver
        word = Buffer(driver.gpa + driver.used_offset + 4 + 8 * driver.size, 2)
        eventually(lambda: client.memory.read(word) == b"\x08\0", "all to be taken")
        client.control.remove_region(client.memory.regions[1])
        assert all(p.buffer.gpa >= client.memory.regions[1].gpa for p in pending)
        client.poll()
        assert {p.status for p in pending} == {Status.OK}
    next_client_is_served(disks, "slow")


def test_a_request_to_memory_that_was_removed_breaks_the_queue(disks: Disks) -> None:
    with shrinking(disks, "disk") as client:
        client.control.remove_region(client.memory.regions[1])
        client.submit(RequestType.IN, room=64 << 10)
        client.wait_broken(0)
        client.control.add_region(client.memory.regions[1])
        assert client.get_id(queue=1) == SERIAL


# ---------------------------------------------------------------- memory is truncated: SIGBUS


def shrinking(
    disks: Disks, export: str, *, alignment: int = 4096, features: int = FEATURES
) -> Client:
    """Rings in the first region, data of requests in the second one."""
    memory = SharedMemory([1 << 20, 4 << 20])
    client = disks.connect(
        export,
        queues=2,
        queue_size=64,
        features=features,
        memory=memory,
        alignment=alignment,
        strict=False,
    )
    client.memory.allocate(_room_left(client), contiguous=True)
    return client


def _room_left(client: Client) -> int:
    region = client.memory.regions[0]
    return max(b - a for a, b in client.memory._free if region.gpa <= a < region.end)


def leave(client: Client) -> None:
    """Close without touching what is not there any more."""
    client.abandon()
    for region in client.memory.regions:
        os.ftruncate(region.fd, region.size)
    client.close()


@pytest.mark.parametrize("export", ["disk", "direct", "slow", "memory"])
def test_memory_is_truncated_under_the_rings(disks: Disks, export: str) -> None:
    with disks.connect("read-only") as other:
        client = shrinking(disks, export)
        for _ in range(8):
            client.submit(RequestType.IN, room=4096, notify=False)
        client.queues[0].notify()
        client.memory.regions[0].truncate(0)
        for index in (0, 1):
            client.queues[index].kick()
        # The session ends, or at least the queues do: the rings are no more.
        eventually(lambda: is_over(client) or _are_broken(client), "the end")
        assert len(other.read(0, 4096)) == 4096
        leave(client)
        next_client_is_served(disks, export)
        assert len(other.read(0, 4096)) == 4096


def is_over(client: Client) -> bool:
    try:
        return not client.control.is_alive()
    except (PeerError, OSError):
        return True


def _are_broken(client: Client) -> bool:
    # Not read, because it may be so of one a moment before the other.
    poll = select.poll()
    for queue in client.queues:
        poll.register(queue.err_fd, select.POLLIN)
    return len(poll.poll(0)) == len(client.queues)


@pytest.mark.parametrize("kind", [RequestType.IN, RequestType.OUT, RequestType.WRITE_ZEROES])
@pytest.mark.parametrize("export", ["disk", "direct", "slow", "memory"])
def test_memory_is_truncated_under_data(disks: Disks, export: str, kind: RequestType) -> None:
    client = shrinking(disks, export)
    for i in range(16):
        if kind == RequestType.IN:
            client.submit(kind, i * 65536, room=65536 - 512 * (i % 2), notify=False)
        else:
            out = bytes(65536) if kind == RequestType.OUT else bytes(16)
            client.submit(kind, i * 65536, out=out, notify=False)
    client.memory.regions[1].truncate(0)
    client.queues[0].notify()
    try:
        barrier(client)
        client.control.get_config(0, 8)
    except (SessionError, PeerError):
        pass  # its memory is gone, and so is its session
    leave(client)
    next_client_is_served(disks, export)


def test_memory_is_truncated_while_requests_are_in_flight(disks: Disks) -> None:
    for export in ("slow", "direct", "disk"):
        client = shrinking(disks, export)
        for i in range(30):
            client.submit(RequestType.IN, i * 65536, room=65536)
        client.memory.regions[1].truncate(PAGE)
        client.memory.regions[0].truncate(0)
        leave(client)
        next_client_is_served(disks, export)


def test_memory_is_truncated_before_a_ring_starts(disks: Disks) -> None:
    with disks.connect(queues=1, strict=False) as client:
        client.reset_device()
        client.make_queues(1, 64)
        region = client.memory.regions[0]
        region.truncate(0)
        size = region.size
        try:
            frontend, ask = client.control.frontend, client.control.ask
            ask(frontend.set_vring_num(0, 64))
            ask(frontend.set_vring_addr(0, desc=region.uva, avail=region.uva, used=region.uva))
            ask(frontend.set_vring_fd(0, VringFd.KICK, client.queues[0].kick_fd))
            ask(frontend.set_vring_enable(0, True))
            client.queues[0].kick()
            barrier(client)
        except (SessionError, PeerError):
            pass
        os.ftruncate(region.fd, size)
        client.abandon()
    next_client_is_served(disks)


@pytest.mark.parametrize("export", ["disk", "direct", "memory"])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_memory_that_was_truncated_never_reaches_the_disk_as_zeroes(
    disks: Disks, export: str, aligned: bool
) -> None:
    with disks.connect(export) as client:
        client.write(0, b"#" * (1 << 20))
    client = shrinking(disks, export, alignment=4096 if aligned else 16)
    request = client.queues[0].submit(RequestType.OUT, 0, out=b"@" * 66048)
    assert request.buffer.gpa == client.memory.regions[1].gpa
    # The header stays, so the daemon comes as far as the data.
    client.memory.regions[1].truncate(PAGE)
    client.queues[0].notify()
    try:
        barrier(client)
    except (SessionError, PeerError):
        pass
    leave(client)
    with disks.connect(export) as client:
        assert set(client.read(0, 70000 // 512 * 512)) <= set(b"#@")
