"""Daemons that many tests share, one for each way of moving data, and the checks that each test ends with.

A daemon takes half a second to start, so a session has one per data path, with exports for every purpose. What makes
sharing safe is also what is promised: after every test, whatever it did, the same process must still be there, hold no
fd, mapping or thread more than before its first client, have said little, and have shown no traceback.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vhostblk.client.client import Client
from vhostblk.client.queue import ClientQueue, Pending
from vhostblk.errors import SessionError
from vhostblk.export.stats_reader import page_names, pid_in, read_page
from vhostblk.testing.daemon_process import TRACEBACK, VHOSTBLK, DaemonProcess
from vhostblk.testing.resources import Resources
from vhostblk.vhost.vring import VringFd
from vhostblk.virtio.driver import DriverQueue
from vhostblk.virtio.packed_driver import PackedDriverQueue

__all__ = [
    "ALL_PATHS",
    "BOTH_PATHS",
    "CAPACITY",
    "Disks",
    "barrier",
    "eventually",
    "finish",
    "packed_ring",
    "split_ring",
    "stops_answering",
    "taken",
    "terminate",
    "wait_until_taken",
]

_Socket = socket.socket  # `Disks.socket` is a path

CAPACITY = 16 << 20
QUEUES = 8
SERIAL = "contract"
SLOW_NS = 50_000_000
"""How long a request to the export `slow` takes."""

_KINDS = ("native", "threads", "python")
ALL_PATHS = pytest.mark.parametrize("disks", _KINDS, indirect=True)
"""The engine, the engine with its thread pool instead of io_uring, and the reference."""
BOTH_PATHS = pytest.mark.parametrize("disks", ["native", "python"], indirect=True)

# name: (driver and its options, options of the export)
_FILE = "driver=file,filename={image},discard=unmap"
_EXPORTS = {
    "disk": (_FILE + "{aio}", "writable=on,max-segments=32,iothread=io0"),
    "direct": (_FILE + ",cache.direct=on{aio}", "writable=on,max-segments=32,iothread=io1"),
    "pinned": (_FILE + ",cache.direct=on{aio}", "writable=on,pin-memory=on,iothread=io1"),
    "big-blocks": (_FILE + "{aio}", "writable=on,logical-block-size=4096,iothread=io1"),
    "read-only": ("driver=file,filename={image},read-only=on{aio}", "iothread=io0"),
    "grows": (_FILE + "{aio}", "writable=on,iothread=io1"),
    "write-through": (_FILE + "{aio}", "writable=on,writethrough=on,iothread=io1"),
    "memory": (
        f"driver=memory,size={CAPACITY},discard=unmap",
        "writable=on,max-segments=32,iothread=io1",
    ),
    "slow": (
        f"driver=null-co,size={CAPACITY},latency-ns={SLOW_NS},read-zeroes=on",
        "writable=on,iothread=io0",
    ),
}
# What a test that misbehaves all the time may make the daemon say.
_MAX_LINES = 60
# Threads of pools: the engine's, and those of Python's executors, which Linux knows by the process's name.
_POOLS = ("vhostblk-io", "python", "python3")
_MAX_WORKERS = 3 * 16 + 16  # a pool per engine thread, and two of the control loop


class Disks:
    """One daemon with all the exports."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.folder = folder
        aio = ",aio=threads" if kind == "threads" else ""
        words = ["--data-path", "python" if kind == "python" else "native"]
        words += ["--object", "iothread,id=io0", "--object", "iothread,id=io1"]
        for name, (driver, options) in _EXPORTS.items():
            image = self.image(name)
            with image.open("wb") as file:
                file.truncate(CAPACITY)
            words += ["--blockdev", f"node-name={name},{driver.format(image=image, aio=aio)}"]
            words += [
                "--export",
                f"type=vhost-user-blk,id={name},node-name={name},addr.type=unix,"
                f"addr.path={self.socket(name)},num-queues={QUEUES},serial={SERIAL},{options}",
            ]
        sockets = [self.socket(name) for name in _EXPORTS]
        self.process = DaemonProcess([*VHOSTBLK, "storage-daemon", *words], sockets=sockets)
        self.process.start()
        self.is_sound = True
        # Every export has had a client once: what is made on first use is made.
        for name in _EXPORTS:
            with self.connect(name) as client:
                client.read(0, 512)
        self.baseline = self._resources()
        self.mark()

    def image(self, export: str) -> Path:
        return self.folder / f"{export}.img"

    def socket(self, export: str) -> Path:
        return self.folder / f"{export}.sock"

    def connect(self, export: str = "disk", **options: Any) -> Client:
        """As `Client.connect`; a predecessor that has just left may still be being seen off."""
        return Client.connect(self.socket(export), **options)

    def dial(self, export: str = "disk") -> _Socket:
        """A connection on which nothing is said."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # Blocking: with a timeout of Python's a full backlog would be an error.
            sock.connect(os.fspath(self.socket(export)))
        except BaseException:
            sock.close()
            raise
        sock.settimeout(10)
        return sock

    def mark(self) -> None:
        """What the daemon has said up to now is not this test's."""
        self._said = len(self.process.output)
        self.max_lines = _MAX_LINES

    @property
    def said(self) -> str:
        """What the daemon has said during this test."""
        return self.process.output[self._said :]

    def resize(self, size: int) -> None:
        """Give the image of `grows` another size, and tell the daemon."""
        os.truncate(self.image("grows"), size)
        os.kill(self.process.pid, signal.SIGHUP)

    def _resources(self) -> Resources:
        """What the daemon holds; its pools of I/O threads grow on demand, and are bounded by themselves."""
        now = Resources.of(self.process.pid)
        workers = sum(now.threads.pop(name, 0) for name in _POOLS)
        assert workers <= _MAX_WORKERS, f"{workers} threads for I/O"
        return now

    def _leaks(self, seconds: float = 3.0) -> list[str]:
        """What is held beyond the baseline, even after a while."""
        deadline = time.monotonic() + seconds
        while leaks := self._resources().beyond(self.baseline):
            if time.monotonic() > deadline:
                break
            os.sched_yield()
        return leaks

    def check(self) -> None:
        """Fail unless the daemon is as it was before its clients."""
        assert self.process.status is None, f"the daemon is dead:\n{self.process.output[-4000:]}"
        leaks = self._leaks()
        assert not leaks, f"the daemon leaked: {leaks}\n{self.said[-2000:]}"
        assert TRACEBACK not in self.said, self.said[-6000:]
        lines = self.said.splitlines()
        assert len(lines) <= self.max_lines, f"{len(lines)} lines:\n{self.said[:3000]}"


class _Daemons:
    """Those of a session, by data path."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._disks: dict[str, Disks] = {}
        self._started = 0

    def get(self, kind: str) -> Disks:
        """The one of this kind; a new one after a test that hurt it, so that a bug fails one test only."""
        disks = self._disks.get(kind)
        if disks is None or not disks.is_sound:
            if disks is not None:
                disks.process.close(check=False)
            self._started += 1
            folder = self._folder / f"{kind}{self._started}"
            folder.mkdir()
            disks = self._disks[kind] = Disks(kind, folder)
        return disks

    def close(self) -> None:
        for disks in self._disks.values():
            disks.process.close(check=False)


@pytest.fixture(scope="session")
def _daemons() -> Iterator[_Daemons]:
    with tempfile.TemporaryDirectory(prefix="vb-") as folder:
        daemons = _Daemons(Path(folder))
        for kind in _KINDS:
            daemons.get(kind)  # now: later it would be counted as what a test holds
        yield daemons
        daemons.close()


@pytest.fixture
def disks(request: pytest.FixtureRequest, _daemons: _Daemons) -> Iterator[Disks]:
    """A daemon of the kind the test is parametrised with, checked when the test is over."""
    disks = _daemons.get(request.param)
    disks.mark()
    yield disks
    disks.is_sound = False
    disks.check()
    disks.is_sound = True


# ---------------------------------------------------------------- waiting


def terminate(pid: int, timeout: float = 15.0) -> None:
    """Ends a process that is nobody's child here (a daemonized one) and waits until it is gone.

    Its end comes after everything it still does, such as removing its pid file.

    Raises:
        AssertionError: it is still there after `timeout` seconds.
    """
    fd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(fd, signal.SIGTERM)
        ended, _, _ = select.select([fd], [], [], timeout)
        assert ended, f"process {pid} does not end"
    finally:
        os.close(fd)


def eventually(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Look until `condition` holds; the processor goes to whoever else wants it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds:g} s: {what}"
        os.sched_yield()


def wait_until_taken(daemon: DaemonProcess, requests: int) -> None:
    """Return when so many of this daemon's requests are `taken`."""
    eventually(lambda: taken(daemon) >= requests, f"{requests} requests are taken")


def taken(daemon: DaemonProcess) -> int:
    """How many requests this daemon has taken out of its rings since it was started, done or not.

    What a driver has made available and kicked for is not taken yet: the thread that will has to wake up before.
    """
    pages = [read_page(name) for name in page_names() if pid_in(name) == daemon.pid]
    queues = [queue for page in pages for queue in page.queues.values()]
    return sum(queue.requests + queue.in_flight for queue in queues)


def finish(client: Client, pending: list[Pending], seconds: float = 10.0) -> None:
    """Wait for requests without asking for, or looking at, notifications."""

    def done() -> bool:
        client.poll()
        return all(p.is_done for p in pending)

    eventually(done, f"{len(pending)} requests", seconds)


def barrier(client: Client, index: int = 0) -> None:
    """Return when the data path has done all it had begun for this queue's driver to see."""
    queue: ClientQueue = client.queues[index]
    for _ in range(2):
        client.control.ask(client.control.frontend.set_vring_fd(index, VringFd.ERR, queue.err_fd))


def split_ring(client: Client, index: int = 0) -> DriverQueue:
    """The driver's half of a queue, with all that only split rings have."""
    driver = client.queues[index].driver
    assert isinstance(driver, DriverQueue), "the ring is packed"
    return driver


def packed_ring(client: Client, index: int = 0) -> PackedDriverQueue:
    """The same of a packed ring."""
    driver = client.queues[index].driver
    assert isinstance(driver, PackedDriverQueue), "the ring is split"
    return driver


def stops_answering(sock: socket.socket, seconds: float = 10.0) -> bool:
    """Whether the daemon hangs up; whatever it sends before is dropped."""
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLRDHUP)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        poll.poll(max(deadline - time.monotonic(), 0) * 1000)
        try:
            if not sock.recv(65536):
                return True
        except (ConnectionResetError, SessionError):
            return True
        except TimeoutError:
            return False
    return False
