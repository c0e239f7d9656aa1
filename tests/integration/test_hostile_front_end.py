"""A front-end that breaks vhost-user costs itself its session, and nobody anything else.

Malformed messages, fds of wrong kinds or numbers, rings that cannot be, and front-ends that leave, crowd in or do not
listen. That the daemon lives, leaks nothing, says little and shows no traceback is checked after every test by the
fixture `disks`. Hostile memory has a file of its own.
"""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import BOTH_PATHS, SERIAL, Disks, eventually, split_ring, stops_answering
from vhostblk.client.client import Client
from vhostblk.client.control import PROTOCOL_FEATURES
from vhostblk.client.queue import ClientQueue, Pending
from vhostblk.errors import PeerError, SessionError
from vhostblk.vhost.message import (
    FRONTEND_TABLE,
    U64,
    ConfigSpace,
    Empty,
    MemoryTable,
    ProtocolFeature,
    Request,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
)
from vhostblk.vhost.vring import VringFd
from vhostblk.virtio.blk import RequestType, Status
from vhostblk.virtio.features import Feature

pytestmark = BOTH_PATHS

VERSION, REPLY, NEED_REPLY = 1, 4, 8


def header(request: int, size: int, flags: int = VERSION) -> bytes:
    return struct.pack("=III", request, flags, size)


def next_client_is_served(disks: Disks) -> None:
    with disks.connect() as client:
        assert client.get_id() == SERIAL


def is_answered(queue: ClientQueue, request: Pending) -> bool:
    queue.reap()
    return request.is_done


@contextmanager
def half_client(disks: Disks, **options: Any) -> Iterator[Client]:
    """Negotiated, with memory and queues, but no ring is started."""
    with disks.connect(queues=2, strict=False, **options) as client:
        client.reset_device()
        client.make_queues(2, 64)
        yield client


# ---------------------------------------------------------------- framing

STREAMS: dict[str, bytes] = {
    "one byte": b"\1",
    "half a header": header(Request.GET_FEATURES, 0)[:6],
    "header without its payload": header(Request.SET_FEATURES, 8),
    "half a payload": header(Request.SET_FEATURES, 8) + b"\0" * 4,
    "version 0": header(Request.GET_FEATURES, 0, 0),
    "version 2": header(Request.GET_FEATURES, 0, 2),
    "version 3": header(Request.GET_FEATURES, 0, 3),
    "a reply": header(Request.GET_FEATURES, 8, VERSION | REPLY) + bytes(8),
    "4097 bytes announced": header(Request.SET_FEATURES, 4097),
    "4 GiB announced": header(Request.SET_FEATURES, 2**32 - 1),
    "random bytes": random.Random(1).randbytes(4096),
    "zeroes": bytes(4096),
    "ones": b"\xff" * 4096,
}


@pytest.mark.parametrize("stream", STREAMS)
def test_broken_framing_ends_the_session(disks: Disks, stream: str) -> None:
    with disks.dial() as sock:
        sock.sendall(STREAMS[stream])
        sock.shutdown(socket.SHUT_WR)
        assert stops_answering(sock)
    next_client_is_served(disks)


def test_a_message_that_never_ends_can_be_waited_for_and_left(disks: Disks) -> None:
    for cut in (1, 11, 12, 15):
        with disks.dial() as sock:
            sock.sendall((header(Request.SET_FEATURES, 8) + bytes(8))[:cut])
    next_client_is_served(disks)


def test_a_session_byte_by_byte(disks: Disks) -> None:
    with disks.dial() as sock:
        for byte in header(Request.GET_FEATURES, 0):
            sock.sendall(bytes([byte]))
        assert len(sock.recv(64)) == 20


class Session:
    """A raw connection that has negotiated all there is, and begins anew when it was hung up on."""

    def __init__(self, disks: Disks) -> None:
        self._disks = disks
        self._sock = self._begin()

    def _begin(self) -> socket.socket:
        sock = self._disks.dial()
        for request, value in (
            (Request.GET_PROTOCOL_FEATURES, None),
            (Request.SET_PROTOCOL_FEATURES, int(PROTOCOL_FEATURES)),
            (Request.GET_FEATURES, None),
        ):
            data = b"" if value is None else value.to_bytes(8, "little")
            sock.sendall(header(request, len(data)) + data)
            if value is None:
                assert len(sock.recv(20, socket.MSG_WAITALL)) == 20
        return sock

    def ask(self, request: int, data: bytes, fds: Sequence[int] = ()) -> bytes | None:
        """The payload of the answer; None: the daemon hung up."""
        message = header(request, len(data), VERSION | NEED_REPLY) + data
        try:
            socket.send_fds(self._sock, [message], fds)
            answer = self._sock.recv(12, socket.MSG_WAITALL)
        except (ConnectionResetError, BrokenPipeError):
            answer = b""
        if not answer:
            self.close()
            self._sock = self._begin()
            return None
        number, flags, size = struct.unpack("=III", answer)
        assert (number, flags) == (request, VERSION | REPLY)
        return self._sock.recv(size, socket.MSG_WAITALL) if size else b""

    def close(self) -> None:
        self._sock.close()


def test_messages_of_every_wrong_size_are_refused(disks: Disks) -> None:
    disks.max_lines = 2000
    session = Session(disks)
    for request, row in FRONTEND_TABLE.items():
        # By size alone nothing is wrong with 0 regions, or with 12 bytes of configuration that name none.
        good = {U64: 8, VringState: 8, VringAddress: 40, VringFile: 8, SingleRegion: 40, Empty: 0}
        for size in {0, 1, 7, 8, 9, 39, 41, 100, 4096} - {good.get(row.payload, 0)}:
            if size == 0 and row.payload in (MemoryTable, ConfigSpace):
                continue
            answer = session.ask(request, bytes(size))
            refusal = (1 if row.refusal is None else row.refusal).to_bytes(8, "little")
            assert answer is None or answer in (b"", refusal), (row, size)
            if row.reply is None:
                assert answer, (row, size)
    session.close()
    next_client_is_served(disks)


def test_unknown_requests_are_refused_and_the_log_stays_short(disks: Disks) -> None:
    with disks.connect() as client:
        for request in [0, 46, 99, 2**31, 2**32 - 1, *range(100, 400)]:
            client.control.send_raw(request, b"12345678", flags=VERSION | NEED_REPLY)
            reply = client.control.receive()
            assert reply.payload.pack() != bytes(8)
        assert client.get_id() == SERIAL
    assert disks.said.count("refused") <= 3, disks.said


def test_an_unknown_request_without_a_way_to_refuse_ends_the_session(disks: Disks) -> None:
    with disks.connect(protocol_features=ProtocolFeature.CONFIG | ProtocolFeature.MQ) as client:
        client.control.send_raw(99)
        assert not client.control.is_alive()
        client.abandon()
    next_client_is_served(disks)


def test_random_sessions_of_plausible_messages(disks: Disks) -> None:
    disks.max_lines = 1200
    chance = random.Random(2)
    requests = [*FRONTEND_TABLE, 6, 7, 31, 32, 35, 39, 40]
    small = (0, 1, 2, 7, 64, 255, 256, 2**16, 2**32 - 1)
    for _ in range(60):
        fd = os.memfd_create("x")
        os.truncate(fd, 1 << 16)
        with disks.dial() as sock:
            try:
                for _ in range(chance.randrange(1, 20)):
                    request = chance.choice(requests)
                    words = [
                        chance.choice(small) for _ in range(chance.choice((0, 1, 2, 2, 2, 10)))
                    ]
                    data = b"".join(word.to_bytes(4, "little") for word in words)
                    flags = VERSION | chance.choice((0, NEED_REPLY))
                    fds = [fd] * chance.choice((0, 0, 1, 1, 2, 8))
                    socket.send_fds(sock, [header(request, len(data), flags) + data], fds)
            except (BrokenPipeError, ConnectionResetError):
                pass
        os.close(fd)
    next_client_is_served(disks)


# ---------------------------------------------------------------- fds


@pytest.mark.parametrize("count", [1, 2, 9, 100, 253])
def test_fds_that_do_not_belong_to_a_message_are_closed(disks: Disks, count: int) -> None:
    fds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(count)]
    for request in FRONTEND_TABLE:
        with disks.dial() as sock:
            socket.send_fds(sock, [header(request, 8, VERSION | NEED_REPLY) + bytes(8)], fds)
            sock.shutdown(socket.SHUT_WR)
            assert stops_answering(sock)
    for fd in fds:
        os.close(fd)
    disks.max_lines = 200


def test_fds_in_the_middle_of_a_message_are_closed(disks: Disks) -> None:
    fd = os.eventfd(0)
    data = header(Request.SET_FEATURES, 8) + bytes(8)
    for cut in (1, 11, 12, 13, 19):
        with disks.dial() as sock:
            socket.send_fds(sock, [data[:cut]], [fd])
            socket.send_fds(sock, [data[cut : cut + 1]], [fd] * 50)
            assert stops_answering(sock)
    os.close(fd)


def test_fds_of_a_message_that_never_ends_are_closed(disks: Disks) -> None:
    fd = os.eventfd(0)
    with disks.dial() as sock:
        socket.send_fds(sock, [header(Request.SET_VRING_CALL, 8)], [fd] * 100)
    os.close(fd)


def test_requests_without_the_fds_they_need_are_refused(disks: Disks) -> None:
    with half_client(disks) as client:
        region = client.memory.regions[0].description
        table = struct.pack("=IIQQQQ", 1, 0, region.gpa + (1 << 40), 4096, region.uva, 0)
        slot = struct.pack("=QQQQQ", 0, region.gpa + (1 << 40), 4096, region.uva, 0)
        cases = [
            (Request.SET_MEM_TABLE, table),
            (Request.ADD_MEM_REG, slot),
            (Request.SET_VRING_KICK, bytes(8)),
            (Request.SET_VRING_CALL, bytes(8)),
            (Request.SET_VRING_ERR, bytes(8)),
            (Request.SET_BACKEND_REQ_FD, b""),
        ]
        for request, data in cases:
            client.control.send_raw(request, data, flags=VERSION | NEED_REPLY)
            assert client.control.receive().payload.pack() != bytes(8), Request(request).name
        assert client.control.is_alive()


def _epoll(keep: list[int]) -> int:
    """An epoll instance that is always ready, and cannot be read."""
    poller = select.epoll()
    keep += os.pipe()
    poller.register(keep[-1], select.EPOLLOUT)
    fd = os.dup(poller.fileno())
    poller.close()
    return fd


def _closed_pipe(end: int) -> int:
    ends = os.pipe()
    os.close(ends[1 - end])
    return ends[end]


def _detached(sock: socket.socket) -> int:
    return sock.detach()


def _orphan() -> int:
    left, right = socket.socketpair()
    right.close()
    return left.detach()


def _listening() -> int:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("")  # an abstract name of the kernel's choice
    sock.listen()
    return sock.detach()


def _sealed() -> int:
    import fcntl

    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.truncate(fd, 1 << 20)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW)
    return fd


def _saturated(flags: int) -> int:
    fd = os.eventfd(0, flags)
    os.eventfd_write(fd, 2**64 - 2)
    return fd


WRONG_FDS: dict[str, Callable[[Path, list[int]], int]] = {
    "regular file": lambda folder, keep: os.open(folder / "file", os.O_RDWR | os.O_CREAT),
    "regular file, read-only": lambda folder, keep: os.open(
        folder / "file", os.O_RDONLY | os.O_CREAT
    ),
    "directory": lambda folder, keep: os.open(folder, os.O_RDONLY),
    "path only": lambda folder, keep: os.open(folder, os.O_PATH),
    "/dev/null": lambda folder, keep: os.open("/dev/null", os.O_RDWR),
    "/dev/zero, read-only": lambda folder, keep: os.open("/dev/zero", os.O_RDONLY),
    "/dev/full": lambda folder, keep: os.open("/dev/full", os.O_RDWR),
    "pipe nobody writes to": lambda folder, keep: _closed_pipe(0),
    "pipe nobody reads": lambda folder, keep: _closed_pipe(1),
    "socket whose peer is gone": lambda folder, keep: _orphan(),
    "socket that is not connected": lambda folder, keep: _detached(socket.socket(socket.AF_UNIX)),
    "datagram socket": lambda folder, keep: _detached(
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    ),
    "listening socket": lambda folder, keep: _listening(),
    "sealed memfd": lambda folder, keep: _sealed(),
    "epoll": lambda folder, keep: _epoll(keep),
    "saturated eventfd": lambda folder, keep: _saturated(os.EFD_NONBLOCK),
    "saturated blocking eventfd": lambda folder, keep: _saturated(0),
    "semaphore eventfd": lambda folder, keep: os.eventfd(5, os.EFD_SEMAPHORE),
}


@pytest.fixture
def wrong_fd(tmp_path: Path, _nothing_leaks: None) -> Iterator[Callable[[str], int]]:
    """Makes an fd of one of these kinds."""
    keep: list[int] = []

    def make(kind: str) -> int:
        fd = WRONG_FDS[kind](tmp_path, keep)
        keep.append(fd)
        return fd

    yield make
    for fd in keep:
        os.close(fd)


@pytest.mark.parametrize("running", [False, True], ids=["at the start", "while running"])
@pytest.mark.parametrize("wrong", WRONG_FDS)
def test_vring_fd_of_the_wrong_kind_is_refused_or_endured(
    disks: Disks, wrong_fd: Callable[[str], int], wrong: str, running: bool
) -> None:
    with disks.connect(queues=4) as client:
        for index, which in enumerate(VringFd):
            queue, fd = client.queues[index], wrong_fd(wrong)
            if not running:
                client.stop_queue(index)
            try:
                client.control.ask(client.control.frontend.set_vring_fd(index, which, fd))
                if not running:
                    _start_with(client, index, which, fd)
            except PeerError:
                assert client.control.is_alive()
            # This ring may work or not; it must not hang, spin, or take another with it.
            client.submit(RequestType.GET_ID, room=20, queue=index, notify=False)
            queue.driver.publish()
            queue.kick()
            if which is VringFd.ERR:
                driver = split_ring(client, index)
                driver.write_avail_idx(driver.avail_idx + 1000)
                queue.kick()
        for _ in range(10):
            other = client.submit(RequestType.GET_ID, room=20, queue=3)
            eventually(partial(is_answered, client.queues[3], other), "queue 3")
            assert other.status == Status.OK
        eventually(lambda: _load(disks) < 0.8, "the daemon is idle")
    next_client_is_served(disks)


def _start_with(client: Client, index: int, which: VringFd, fd: int) -> None:
    """Start a queue with this fd among the right ones."""
    queue = client.queues[index]
    name = {VringFd.KICK: "kick_fd", VringFd.CALL: "call_fd", VringFd.ERR: "err_fd"}[which]
    right = getattr(queue, name)
    setattr(queue, name, fd)
    try:
        client.start_queue(index)
    finally:
        setattr(queue, name, right)


def _load(disks: Disks, seconds: float = 0.06) -> float:
    """The part of a processor that an idle daemon takes."""

    def used() -> float:
        total = 0
        for task in Path(f"/proc/{disks.process.pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # threads of pools end
                total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9

    before, began = used(), time.monotonic()
    select.poll().poll(seconds * 1000)  # nothing is expected to happen
    return (used() - before) / (time.monotonic() - began)


@pytest.mark.parametrize("wrong", WRONG_FDS)
def test_backend_channel_of_the_wrong_kind_is_refused_or_endured(
    disks: Disks, wrong_fd: Callable[[str], int], wrong: str
) -> None:
    fd = wrong_fd(wrong)
    with disks.connect("grows") as client:
        try:
            client.control.ask(client.control.frontend.set_backend_req_fd(fd))
        except SessionError:
            client.abandon()
        except PeerError:
            pass
        disks.resize(os.stat(disks.image("grows")).st_size + 4096)
        eventually(lambda: "has" in disks.said.rsplit("the disk", 1)[-1], "the new size")
    next_client_is_served(disks)


# ---------------------------------------------------------------- impossible orders and values


def _u(index: int, value: int) -> bytes:
    return struct.pack("=II", index, value)


def _address(index: int, desc: int, avail: int, used: int, flags: int = 0) -> bytes:
    return struct.pack("=IIQQQQ", index, flags, desc, used, avail, 0)


IMPOSSIBLE: dict[str, tuple[Request, bytes]] = {
    "size 0": (Request.SET_VRING_NUM, _u(0, 0)),
    "size 3": (Request.SET_VRING_NUM, _u(0, 3)),
    "size 65536": (Request.SET_VRING_NUM, _u(0, 65536)),
    "size of a queue that is none": (Request.SET_VRING_NUM, _u(8, 64)),
    "size of queue 2^32-1": (Request.SET_VRING_NUM, _u(2**32 - 1, 64)),
    "base beyond 16 bits": (Request.SET_VRING_BASE, _u(0, 65536)),
    "base of a queue that is none": (Request.SET_VRING_BASE, _u(256, 0)),
    "enable with 2": (Request.SET_VRING_ENABLE, _u(0, 2)),
    "enable a queue that is none": (Request.SET_VRING_ENABLE, _u(64, 1)),
    "misaligned rings": (Request.SET_VRING_ADDR, _address(0, 8, 1, 2)),
    "addresses of a queue that is none": (Request.SET_VRING_ADDR, _address(8, 0, 0, 0)),
    "a flag that rings do not have": (Request.SET_VRING_ADDR, _address(0, 0, 0, 0, 2)),
    "kick before size and addresses": (Request.SET_VRING_KICK, struct.pack("=Q", 0x100)),
    "kick of a queue that is none": (Request.SET_VRING_KICK, struct.pack("=Q", 0x108)),
    "features that were not offered": (Request.SET_FEATURES, struct.pack("=Q", 1 << 63)),
    "protocol features that were not offered": (
        Request.SET_PROTOCOL_FEATURES,
        struct.pack("=Q", 1 << 63),
    ),
    "write to the capacity": (Request.SET_CONFIG, struct.pack("=III", 0, 8, 0) + bytes(8)),
    "write behind the configuration": (Request.SET_CONFIG, struct.pack("=III", 96, 1, 0) + b"1"),
    "cache mode 2": (Request.SET_CONFIG, struct.pack("=III", 32, 1, 0) + b"\2"),
    "in-flight tracking, not offered": (Request.GET_INFLIGHT_FD, bytes(24)),
    "postcopy, not offered": (Request.POSTCOPY_ADVISE, b""),
    "status, not offered": (Request.SET_STATUS, bytes(8)),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_request_is_refused_and_changes_nothing(disks: Disks, case: str) -> None:
    request, data = IMPOSSIBLE[case]
    with half_client(disks) as client:
        client.control.send_raw(request, data, flags=VERSION | NEED_REPLY)
        assert client.control.receive().payload.pack() != bytes(8)
        for index in (0, 1):
            client.start_queue(index, 0)
            assert client.get_id(queue=index) == SERIAL


def test_the_base_of_a_queue_that_is_none_cannot_be_asked(disks: Disks) -> None:
    with disks.connect() as client:
        client.control.send_raw(Request.GET_VRING_BASE, _u(8, 0))
        with pytest.raises(SessionError):
            client.control.receive()
        client.abandon()
    next_client_is_served(disks)


@pytest.mark.parametrize("place", ["outside memory", "over the end of memory", "wrapping"])
@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_rings_that_are_not_in_memory_do_not_start(disks: Disks, part: str, place: str) -> None:
    with half_client(disks) as client:
        region = client.memory.regions[-1]
        wrong = {
            "outside memory": region.uva + region.size,
            "over the end of memory": region.uva + region.size - 64,
            "wrapping": 2**64 - 64,
        }[place]
        frontend, ask = client.control.frontend, client.control.ask
        addresses = {"desc": region.uva, "avail": region.uva + 2048, "used": region.uva + 4096}
        addresses[part] = wrong
        ask(frontend.set_vring_num(0, 64))
        ask(frontend.set_vring_addr(0, **addresses))
        with pytest.raises(PeerError):
            ask(frontend.set_vring_fd(0, VringFd.KICK, client.queues[0].kick_fd))
        client.start_queue(0, 0)
        assert client.get_id() == SERIAL


def test_two_queues_may_lie_in_the_same_memory(disks: Disks) -> None:
    with half_client(disks) as client:
        client.queues[1].driver, mine = client.queues[0].driver, client.queues[1].driver
        client.start_queue(0, 0)
        client.start_queue(1, 0)
        client.queues[1].driver = mine
        for _ in range(50):
            split_ring(client).write_avail_idx(random.randrange(4))
            client.queues[0].kick()
            client.queues[1].kick()
        assert client.control.is_alive()


def test_features_cannot_change_under_running_rings(disks: Disks) -> None:
    with disks.connect() as client:
        with pytest.raises(PeerError):
            client.control.set_features(client.offered & ~Feature.VIRTIO_F_EVENT_IDX)
        assert client.get_id() == SERIAL


# ---------------------------------------------------------------- leaving, crowding in, not listening


@pytest.mark.parametrize("export", ["slow", "disk", "direct"])
@pytest.mark.parametrize("how", ["hangs up", "while a ring stops", "while the device resets"])
def test_front_end_vanishes_with_hundreds_of_requests_in_flight(
    disks: Disks, export: str, how: str
) -> None:
    for _ in range(2):
        client = disks.connect(export, queues=4, queue_size=256, strict=False)
        for i in range(800):
            kind = RequestType.IN if i % 2 else RequestType.OUT
            data = {"room": 4096} if i % 2 else {"out": bytes(4096)}
            client.submit(kind, i * 4096, queue=i % 4, notify=False, **data)
        for queue in client.queues:
            queue.notify()
        if how == "while a ring stops":
            client.control.send_raw(Request.GET_VRING_BASE, _u(0, 0))
        elif how == "while the device resets":
            client.control.send_raw(Request.RESET_DEVICE, b"")
        client.abandon()
        client.close()
    with disks.connect(export) as client:
        assert len(client.read(0, 4096)) == 4096


def has_answered(sock: socket.socket) -> bool:
    return len(sock.recv(64)) in (0, 20)


def test_a_thousand_connects(disks: Disks) -> None:
    disks.max_lines = 4000
    hello = header(Request.GET_FEATURES, 0)
    fd = os.eventfd(0)
    for i in range(1000):
        with disks.dial() as sock:
            if i % 4 == 1:
                sock.sendall(hello)
            elif i % 4 == 2:
                sock.sendall(hello)
                eventually(partial(has_answered, sock), "an answer")
            elif i % 4 == 3:
                socket.send_fds(sock, [header(Request.SET_VRING_CALL, 8)], [fd] * 8)
    os.close(fd)
    next_client_is_served(disks)


def test_complete_clients_come_and_go(disks: Disks) -> None:
    disks.max_lines = 200
    for i in range(40):
        client = disks.connect(queues=1 + i % 8, queue_size=64)
        assert client.get_id(queue=i % (1 + i % 8)) == SERIAL
        if i % 3:
            client.abandon()
        client.close()


def test_a_second_front_end_is_refused_politely(disks: Disks) -> None:
    with disks.connect() as client:
        for _ in range(5):
            with disks.dial() as second:
                assert second.recv(1) == b""
            assert client.get_id() == SERIAL
        assert "second front-end" in disks.said
    next_client_is_served(disks)


def test_a_front_end_that_crowds_in_all_day_does_not_fill_the_log(disks: Disks) -> None:
    with disks.connect() as client:
        for _ in range(300):
            with disks.dial() as second:
                assert second.recv(1) == b""
        assert client.get_id() == SERIAL


def test_a_front_end_that_never_reads_costs_no_memory_and_can_be_left(disks: Disks) -> None:
    def resident() -> int:
        with open(f"/proc/{disks.process.pid}/statm") as file:
            return int(file.read().split()[1]) * 4096

    ask = header(Request.GET_FEATURES, 0) * 1000
    with disks.dial() as sock, disks.connect("memory") as other:
        before = resident()
        sock.setblocking(False)
        sent = 0
        while sent < 8 << 20:
            _, writable, _ = select.select([], [sock], [], 0.2)
            if not writable:
                break
            sent += sock.send(ask)
        assert sent < 8 << 20, "the daemon took everything"
        assert len(other.read(0, 512)) == 512
        assert resident() - before < 4 << 20
    next_client_is_served(disks)


def test_a_backend_channel_that_is_never_read_does_not_hold_the_daemon(disks: Disks) -> None:
    disks.max_lines = 1000
    with disks.connect("grows") as client:
        start = os.stat(disks.image("grows")).st_size
        for i in range(300):
            disks.resize(start + 4096 * (i % 2 + 1))
            client.control.get_config(0, 8)
        assert client.get_id() == SERIAL


def test_blocking_saturated_call_eventfd_does_not_hang_the_daemon(disks: Disks) -> None:
    with disks.connect(queues=2) as client:
        queue = client.queues[0]
        fd = os.eventfd(0, os.EFD_CLOEXEC)
        os.eventfd_write(fd, 2**64 - 2)
        client.control.ask(client.control.frontend.set_vring_fd(0, VringFd.CALL, fd))
        os.set_blocking(fd, True)
        for _ in range(20):
            pending = client.submit(RequestType.GET_ID, room=20)
            queue.driver.enable_interrupts()
            eventually(partial(is_answered, queue, pending), "a request")
            assert client.get_id(queue=1) == SERIAL
        assert os.get_blocking(fd), "O_NONBLOCK is shared with the front-end"
        assert os.eventfd_read(fd) == 2**64 - 2
        os.close(fd)


def test_flags_of_the_fds_of_a_front_end_are_left_alone(disks: Disks) -> None:
    with disks.connect() as client:
        queue = client.queues[0]
        for fd in (queue.kick_fd, queue.call_fd, queue.err_fd):
            os.set_blocking(fd, True)
        client.stop_queue(0)
        client.start_queue(0)
        assert client.get_id() == SERIAL
        assert all(os.get_blocking(fd) for fd in (queue.kick_fd, queue.call_fd, queue.err_fd))
