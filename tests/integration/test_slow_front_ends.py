"""A front-end that is slow, or silent, costs itself its session at most, and keeps nobody out.

The daemon of this module has time-outs of a few milliseconds, where something has to happen when they are over, and
generous ones where nothing must. What it holds is checked after every test.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemons import eventually, stops_answering
from vhostblk.cli.stats import collect
from vhostblk.client.client import Client
from vhostblk.errors import SessionError
from vhostblk.export.lobby import MAX_WAITING
from vhostblk.export.statistics import total
from vhostblk.testing.daemon_process import TRACEBACK, VHOSTBLK, DaemonProcess
from vhostblk.testing.resources import Resources, wait_until_released
from vhostblk.vhost.message import FRONTEND_TABLE, Request
from vhostblk.virtio.blk import RequestType, Status

# name: options of the export
_EXPORTS = {
    "patient": "handshake-timeout=600,message-timeout=600",
    "impatient": "handshake-timeout=0.05,message-timeout=0.05",
    "other": "",
    "slow": "message-timeout=0.05",
}
_LATENCY_NS = 30_000_000
HELLO = struct.pack("=III", Request.GET_FEATURES, 1, 0)


class Daemon:
    """The daemon of this module."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        words: list[str] = []
        for name, options in _EXPORTS.items():
            latency = f",latency-ns={_LATENCY_NS}" if name == "slow" else ""
            words += [
                "--blockdev",
                f"driver=null-co,node-name={name},size=1M,read-zeroes=on{latency}",
            ]
            words += [
                "--export",
                f"type=vhost-user-blk,id={name},node-name={name},addr.type=unix,"
                f"addr.path={self.path(name)},num-queues=2,{options}",
            ]
        sockets = [self.path(name) for name in _EXPORTS]
        self.process = DaemonProcess([*VHOSTBLK, "storage-daemon", *words], sockets=sockets)
        self.process.start()
        for name in _EXPORTS:
            self.is_served(name)
        self.baseline = Resources.of(self.process.pid)
        self._said = len(self.process.output)

    def path(self, export: str) -> Path:
        return self._folder / export

    def dial(self, export: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.connect(os.fspath(self.path(export)))  # blocking: its backlog may be full for a moment
        sock.settimeout(10)
        return sock

    def connect(self, export: str, queues: int = 1) -> Client:
        """A client; where the daemon is impatient, and we have had no turn in time, one that has tried again."""
        clients: list[Client] = []

        def connects() -> bool:
            try:
                clients.append(Client.connect(self.path(export), queues=queues))
            except (SessionError, ConnectionError):
                return False
            return True

        eventually(connects, f"a client of {export}")
        return clients[0]

    def speaking(self, export: str) -> socket.socket:
        """A connection that has the disk: something was said, and answered; as for trying again, see `connect`."""
        socks: list[socket.socket] = []

        def speaks() -> bool:
            sock = self.dial(export)
            try:
                sock.sendall(HELLO)
                is_heard = len(sock.recv(64)) == 20
            except ConnectionError:
                is_heard = False
            if is_heard:
                socks.append(sock)
            else:
                sock.close()
            return is_heard

        eventually(speaks, f"an answer of {export}")
        return socks[0]

    def is_served(self, export: str) -> None:
        with self.connect(export) as client:
            assert client.read(0, 512) == bytes(512)

    @property
    def said(self) -> str:
        return self.process.output[self._said :]

    def fds(self) -> int:
        return Resources.of(self.process.pid).descriptors.total()

    def begin(self) -> None:
        self._said = len(self.process.output)

    def check(self) -> None:
        assert self.process.status is None, self.process.output
        assert not (leaks := wait_until_released(self.baseline, pid=self.process.pid)), leaks
        assert TRACEBACK not in self.said, self.said
        assert len(self.said.splitlines()) <= 60, self.said


@pytest.fixture(scope="module")
def _daemon() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="vb-") as folder:
        daemon = Daemon(Path(folder))
        yield daemon
        daemon.process.close()


@pytest.fixture
def slow(_daemon: Daemon) -> Iterator[Daemon]:
    _daemon.begin()
    yield _daemon
    _daemon.check()


def speak(sock: socket.socket) -> None:
    """Say something, and hear the answer: whoever does that has the disk."""
    sock.sendall(HELLO)
    assert len(sock.recv(64)) == 20


def has_hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


# ---------------------------------------------------------------- silence


@pytest.mark.parametrize("beginning", [b"", HELLO[:1], HELLO[:11]], ids=["", "byte", "header"])
def test_connection_that_says_nothing_keeps_nobody_out(slow: Daemon, beginning: bytes) -> None:
    with slow.dial("patient") as silent:
        silent.sendall(beginning)
        slow.is_served("patient")
        slow.is_served("patient")


def test_connection_that_says_nothing_is_hung_up_on_when_its_time_is_over(slow: Daemon) -> None:
    with slow.dial("impatient") as silent, slow.dial("impatient") as half:
        half.sendall(HELLO[:5])
        assert stops_answering(silent)
        assert stops_answering(half)
    said = slow.process.output
    assert said.count("before its first message") == 1, said  # once, then counted


def test_who_speaks_first_has_the_disk_and_the_others_are_hung_up_on(slow: Daemon) -> None:
    with slow.dial("patient") as first, slow.dial("patient") as second:
        speak(second)
        assert stops_answering(first)
        speak(second)


def test_hundred_connections_cost_few_fds_and_nobody_else_anything(slow: Daemon) -> None:
    before = slow.fds()
    crowd = [slow.dial("patient") for _ in range(100)]
    try:
        eventually(
            lambda: sum(has_hung_up(sock) for sock in crowd) == len(crowd) - MAX_WAITING,
            "all but a few are hung up on",
        )
        assert slow.fds() - before <= MAX_WAITING
        slow.is_served("other")
        slow.is_served("patient")
        eventually(lambda: all(map(has_hung_up, crowd)), "they are hung up on")
    finally:
        for sock in crowd:
            sock.close()


def test_guest_that_is_paused_for_longer_than_every_timeout_keeps_its_disk(slow: Daemon) -> None:
    with slow.connect("impatient") as paused:
        # These time-outs are those of the paused one, and begin after its last message.
        for _ in range(3):
            with slow.dial("slow") as other:
                speak(other)
                other.sendall(HELLO[:3])
                assert stops_answering(other)
        assert paused.read(0, 512) == bytes(512)
        assert paused.control.is_alive()


def test_front_end_that_never_kicks_costs_nothing_and_may_begin_to(slow: Daemon) -> None:
    with slow.connect("impatient", queues=2) as client:
        pending = client.submit(RequestType.IN, 0, room=512, queue=1, notify=False)
        for _ in range(20):
            assert client.read(0, 512) == bytes(512)
        client.queues[1].notify()
        eventually(lambda: bool(client.poll()) or pending.is_done, "its request")
        assert pending.status == Status.OK


# ---------------------------------------------------------------- messages that do not end


def test_half_a_message_ends_the_session_when_its_time_is_over(slow: Daemon) -> None:
    with slow.speaking("impatient") as sock:
        sock.sendall(HELLO[:7])
        assert stops_answering(sock)
        slow.is_served("impatient")
    assert "a message is not whole after 0.05 s" in slow.said


def test_front_end_may_close_in_the_middle_of_each_message(slow: Daemon) -> None:
    fd = os.memfd_create("x")
    os.truncate(fd, 1 << 16)
    for request, row in FRONTEND_TABLE.items():
        data = struct.pack("=III", request, 1, 40) + bytes(40)
        fds = [fd] * row.fds[1]
        for cut in (1, 12, 13, 51):
            with slow.dial("patient") as sock:
                speak(sock)
                socket.send_fds(sock, [data[:cut]], fds)
    os.close(fd)
    slow.is_served("patient")
    assert slow.said.count("inside a message") > 100
    slow.begin()


# ---------------------------------------------------------------- answers that nobody reads


def stuff(sock: socket.socket, message: bytes) -> None:
    """Send messages until the daemon hangs up, and read no answer."""
    sock.setblocking(False)

    def is_over() -> bool:
        try:
            sock.send(message)
        except BlockingIOError:
            pass  # it takes no more, or has no turn
        except ConnectionError:
            return True
        return has_hung_up(sock)

    eventually(is_over, "it is hung up on")


def test_front_end_that_reads_no_answers_is_hung_up_on(slow: Daemon) -> None:
    with slow.speaking("impatient") as sock:
        stuff(sock, HELLO * 100)
        slow.is_served("impatient")
    assert "cannot send GET_FEATURES: nobody has read for 0.05 s" in slow.said


def test_front_end_that_does_not_read_where_its_ring_stopped_has_it_stopped_nevertheless(
    slow: Daemon,
) -> None:
    client = Client.connect(slow.path("slow"), queues=2)
    pending = [client.submit(RequestType.IN, 0, room=512, queue=n % 2) for n in range(8)]

    def are_taken() -> bool:
        client.poll()  # first: what is done in between is missed, and not counted twice
        done = sum(request.is_done for request in pending)
        (page,) = collect(pid=slow.process.pid, export="slow").copies.values()
        return done + total(page.queues.values()).in_flight == len(pending)

    eventually(are_taken, "all are taken: what was not stays in the ring")
    sock = socket.socket(fileno=os.dup(client.control.connection.fileno()))
    # Many questions, of which only the first stops the ring.
    stuff(sock, struct.pack("=IIIII", Request.GET_VRING_BASE, 1, 8, 0, 0) + HELLO * 100)
    sock.close()
    client.poll()
    assert all(request.is_done for request in pending)
    client.abandon()
    client.close()
    slow.is_served("slow")
