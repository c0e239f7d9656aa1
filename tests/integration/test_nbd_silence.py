"""An NBD server that is stopped (SIGSTOP), so that it keeps its connection and says nothing: a daemon, and tools.

As a disk that hangs (test_stalls.py), but that it is nobody's kernel that waits.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemons import eventually, finish, wait_until_taken
from tests.stuck_disks import (
    AGAIN,
    DEADLINE,
    NO_ANSWER,
    SIZE,
    StuckDaemon,
    end_in_time,
    given_up,
    in_time,
    is_served,
)
from vhostblk.cli.stats import collect
from vhostblk.client.client import Client
from vhostblk.client.queue import Pending
from vhostblk.errors import BlockError
from vhostblk.export.statistics import QueueStatistics, total
from vhostblk.testing.daemon_process import is_listening
from vhostblk.testing.requirements import require
from vhostblk.virtio.blk import RequestType, Status

GIVEN_UP = "stuck: the NBD server has not answered a request for "
BACK = "stuck: the NBD server is back"
PATHS = pytest.mark.parametrize("data_path", ["native", "python"])


class StoppableServer:
    """nbdkit with a disk in memory; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "nbd"
        self.log = folder / "log"
        # Of several threads of a connection one finds that its client has left, and another one's assertion fails.
        command = [require("nbdkit"), "--foreground", "--exit-with-parent", "--threads=1"]
        command += ["-U", str(self.socket), "--filter=log", "memory", str(SIZE)]
        command += [f"logfile={self.log}"]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        eventually(lambda: is_listening(self.socket), "nbdkit listens", DEADLINE)

    def __enter__(self) -> StoppableServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(DEADLINE)

    def stop(self) -> None:
        """Say nothing any more; returns when it does not."""
        self._process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(self._process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vb-") as name:
        yield Path(name)


@pytest.fixture
def server(folder: Path, _nothing_leaks: None) -> Iterator[StoppableServer]:
    with StoppableServer(folder) as one:
        yield one


class Daemon(StuckDaemon):
    """Serves `stuck` from the server, with one thread for both disks."""

    def __init__(
        self, folder: Path, server: StoppableServer, data_path: str, *words: str, nbd: str = ""
    ) -> None:
        disk = f"driver=nbd,server.type=unix,server.path={server.socket}{nbd}"
        super().__init__(
            *(folder, data_path, disk, server.go_on, "--object", "iothread,id=both"),
            *words,
            export=",stall-warning=0.2,iothread=both",
        )


def ask(client: Client, count: int) -> list[Pending]:
    """Reads, writes and flushes on both queues, that are not waited for."""
    pending = []
    for number in range(count):
        offset, queue = number * 512, number % 2
        match number % 3:
            case 0:
                pending.append(client.submit(RequestType.IN, offset, room=512, queue=queue))
            case 1:
                pending.append(client.submit(RequestType.OUT, offset, out=bytes(512), queue=queue))
            case _:
                pending.append(client.submit(RequestType.FLUSH, queue=queue))
    return pending


@PATHS
def test_server_that_is_stopped_is_told_of_and_is_nobody_elses_affair(
    folder: Path, server: StoppableServer, data_path: str
) -> None:
    with (
        Daemon(folder, server, data_path) as daemon,
        Client.connect(daemon.stuck, queues=2) as client,
    ):
        client.write(0, bytes(512))
        in_time(lambda: daemon.output.count(NO_ANSWER) == daemon.output.count(AGAIN), "its answer")
        before = daemon.output.count(NO_ANSWER)
        server.stop()
        pending = ask(client, 100)
        in_time(lambda: daemon.output.count(NO_ANSWER) > before, "the log says so")

        def figures() -> QueueStatistics:
            (page,) = collect(pid=daemon.pid, export="stuck").copies.values()
            return total(page.queues.values())

        in_time(lambda: figures().in_flight == 100, "all are taken")
        assert (figures().oldest_age_ns or 0) >= 200_000_000
        for _ in range(3):
            is_served(daemon.other)
        os.kill(daemon.pid, signal.SIGHUP)  # it looks at the sizes of all disks
        is_served(daemon.other)
        assert not any(request.is_done for request in pending)
        server.go_on()
        finish(client, pending, DEADLINE)
        assert all(request.status == Status.OK for request in pending)
        in_time(lambda: daemon.output.count(AGAIN) > before, "the log says so")


@PATHS
def test_time_out_fails_the_requests_and_the_server_is_used_again_when_it_goes_on(
    folder: Path, server: StoppableServer, data_path: str
) -> None:
    found: list[bytes] = []
    with (
        Daemon(folder, server, data_path, nbd=",request-timeout=0.5") as daemon,
        Client.connect(daemon.stuck, queues=2, timeout=DEADLINE) as client,
    ):
        in_time(lambda: not fails(lambda: client.write(0, b"kept" * 128)), "a fast answer")
        server.stop()
        pending = ask(client, 100)
        finish(client, pending, DEADLINE)
        assert all(request.status == Status.IOERR for request in pending)
        assert f"{GIVEN_UP}0.5 seconds" in daemon.output
        # It is being looked for, which nobody waits for.
        with pytest.raises(BlockError):
            client.read(0, 512)
        is_served(daemon.other)
        server.go_on()
        in_time(lambda: not fails(lambda: client.write(512, b"more" * 128)), "it is back")
        in_time(lambda: not fails(lambda: found.append(client.read(512, 512))), "and stays")
        assert found == [b"more" * 128]


def fails(act: Callable[[], object]) -> bool:
    """As it may for once, if the server has no turn for so long."""
    try:
        act()
    except BlockError:
        return True
    return False


@PATHS
def test_requests_wait_for_a_server_that_was_given_up_if_they_may(
    folder: Path, server: StoppableServer, data_path: str
) -> None:
    options = ",request-timeout=0.5,reconnect-delay=3600"
    with (
        Daemon(folder, server, data_path, nbd=options) as daemon,
        Client.connect(daemon.stuck, queues=2, timeout=DEADLINE) as client,
    ):
        client.write(0, b"kept" * 128)
        server.stop()
        pending = ask(client, 100)
        in_time(lambda: GIVEN_UP in daemon.output, "it is given up")
        assert not any(request.is_done for request in pending)
        server.go_on()
        finish(client, pending, DEADLINE)
        assert all(request.status == Status.OK for request in pending)
        assert BACK in daemon.output


@PATHS
@pytest.mark.parametrize("kind", ["requests", "last flush"])
def test_end_of_a_daemon_whose_server_is_stopped_is_bounded(
    folder: Path, server: StoppableServer, data_path: str, kind: str
) -> None:
    pid_file = folder / "pid"

    def end(seconds: float) -> str:
        words = ("--shutdown-timeout", str(seconds), "--pidfile", os.fspath(pid_file))
        with (
            Daemon(folder, server, data_path, *words) as daemon,
            Client.connect(daemon.stuck, queues=2) as client,
            Client.connect(daemon.other) as other,
        ):
            other.write(0, b"x" * 512)
            client.write(0, bytes(512))
            server.stop()
            pending = ask(client, 40) if kind == "requests" else []
            wait_until_taken(daemon, 2 + len(pending))
            os.kill(daemon.pid, signal.SIGTERM)
            # Nobody's kernel waits: the process is gone, although the server is still stopped.
            said = given_up(daemon, pid_file)
            client.poll()
            assert not any(request.is_done for request in pending)
            for one in (client, other):
                one.abandon()
            server.go_on()
        return said

    said = end_in_time(end)
    what = r"\d+ requests are in flight" if kind == "requests" else "its disk is not flushed"
    assert re.search(what, said), said
    assert (folder / "image").read_bytes().startswith(b"x" * 512)


@PATHS
def test_time_out_makes_the_end_of_a_daemon_an_orderly_one_that_says_what_is_lost(
    folder: Path, server: StoppableServer, data_path: str
) -> None:
    words = ("--shutdown-timeout", "60")
    with (
        Daemon(folder, server, data_path, *words, nbd=",request-timeout=0.5") as daemon,
        Client.connect(daemon.stuck, queues=2) as client,
    ):
        in_time(lambda: not fails(lambda: client.write(0, bytes(512))), "a fast answer")
        server.stop()
        pending = ask(client, 40)
        wait_until_taken(daemon, 41)
        os.kill(daemon.pid, signal.SIGTERM)
        said = daemon.expect_end(1, DEADLINE)
        assert "what was written last may be lost: a flush failed" in said
        assert "given up after" not in said
        client.poll()
        assert all(request.status == Status.IOERR for request in pending)
        client.abandon()


# ---------------------------------------------------------------- tools

IMG = "import sys; from vhostblk.cli.quick_start import img_main; sys.exit(img_main())"
IO = "import sys; from vhostblk.cli.quick_start import io_main; sys.exit(io_main())"
# Looks, one each second, for which closing may take.
SOON = "from vhostblk.cli import interruption; interruption._LOOKS = 2;"


class Tool:
    """A process of an image tool that somebody talks to."""

    def __init__(self, program: str, *words: str) -> None:
        def as_in_a_shell() -> None:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)

        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-c", SOON + program, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=as_in_a_shell,
        )

    def __enter__(self) -> Tool:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def say(self, *commands: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("".join(f"{one}\n" for one in commands).encode())
        self.process.stdin.flush()

    def wait_for(self, words: bytes) -> None:
        assert self.process.stdout is not None
        said = b""
        while words not in said:
            more = os.read(self.process.stdout.fileno(), 4096)
            assert more, said
            said += more

    def ends_by(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        said, _ = self.process.communicate(timeout=DEADLINE)
        assert self.process.returncode == -number, said


def has_clients(server: StoppableServer) -> bool:
    """Whether somebody has connected: the socket that listens is not the only one of that name."""
    name = os.fspath(server.socket)
    with open("/proc/net/unix") as file:
        return sum(line.rstrip().endswith(name) for line in file) > 1


BY_SIGNALS = pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name
)


@BY_SIGNALS
def test_io_whose_server_is_stopped_ends_by_a_signal(
    server: StoppableServer, number: signal.Signals
) -> None:
    with Tool(IO, "-f", "raw", f"nbd+unix:///?socket={server.socket}") as tool:
        tool.say("write 0 512")
        tool.wait_for(b"wrote 512/512")
        server.stop()
        tool.say("aio_read 0 512", "length", "aio_flush")
        tool.wait_for(b"1 MiB")
        tool.ends_by(number)


@BY_SIGNALS
def test_img_whose_server_is_stopped_ends_by_a_signal(
    server: StoppableServer, number: signal.Signals
) -> None:
    # There is always something under way.
    words = ("bench", "-f", "raw", "-c", "1000000000", "-d", "4")
    with Tool(IMG, *words, f"nbd+unix:///?socket={server.socket}") as tool:
        in_time(lambda: " Read id=" in server.log.read_text(), "it is at work")
        server.stop()
        tool.ends_by(number)


@BY_SIGNALS
def test_tool_that_waits_for_a_handshake_ends_by_a_signal(
    server: StoppableServer, number: signal.Signals
) -> None:
    server.stop()
    with Tool(IMG, "info", f"nbd+unix:///?socket={server.socket}") as tool:
        in_time(lambda: has_clients(server), "it has connected")
        tool.ends_by(number)
