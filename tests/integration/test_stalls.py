"""A disk that does not answer: the log and the statistics say so, others do not notice, and the end is bounded.

Files hang as one on a server of NFS that is gone: see tests/hanging_file.py.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemons import finish, wait_until_taken
from tests.hanging_file import HangingFile
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
from vhostblk.export.statistics import total
from vhostblk.testing.plugin import require
from vhostblk.vhost.message import Request
from vhostblk.virtio.blk import RequestType, Status

PATHS = pytest.mark.parametrize("data_path", ["native", "python"])


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vb-") as name:
        yield Path(name)


@pytest.fixture
def hanging(folder: Path, _nothing_leaks: None) -> Iterator[HangingFile]:
    """A file that hangs if it is told to. Everybody who has it open ends before."""
    require("fuse")
    with HangingFile(folder / "hanging", SIZE) as file:
        yield file


class Daemon(StuckDaemon):
    """Serves `stuck` from the file that hangs."""

    def __init__(
        self,
        folder: Path,
        hanging: HangingFile,
        data_path: str,
        *words: str,
        options: str = "",
        other: str = "",
    ) -> None:
        super().__init__(
            *(folder, data_path, f"driver=file,filename={hanging.path}", hanging.go_on),
            *words,
            export=f",stall-warning=0.05{options}",
            other=f",discard=unmap{other}",
        )


def ask(client: Client, kind: str, count: int) -> list[Pending]:
    """Requests on both queues that are not waited for."""
    if kind == "flush":
        return [client.submit(RequestType.FLUSH, queue=number % 2) for number in range(2)]
    if kind == "reads":
        return [client.submit(RequestType.IN, n * 512, room=512, queue=n % 2) for n in range(count)]
    return [
        client.submit(RequestType.OUT, n * 512, out=bytes(512), queue=n % 2) for n in range(count)
    ]


@PATHS
@pytest.mark.parametrize("kind", ["reads", "writes", "flush"])
def test_disk_that_hangs_is_told_of_and_is_nobody_elses_affair(
    folder: Path, hanging: HangingFile, data_path: str, kind: str
) -> None:
    with (
        Daemon(folder, hanging, data_path) as daemon,
        Client.connect(daemon.stuck, queues=2) as client,
    ):
        client.write(0, bytes(512))
        # The machine may be slow, too.
        in_time(lambda: daemon.output.count(NO_ANSWER) == daemon.output.count(AGAIN), "its answer")
        before = daemon.output.count(NO_ANSWER)
        hanging.hang()
        pending = ask(client, kind, 40)
        in_time(lambda: daemon.output.count(NO_ANSWER) > before, "the log says so")
        (page,) = collect(pid=daemon.pid, export="stuck").copies.values()
        whole = total(page.queues.values())
        assert whole.in_flight >= 1
        assert (whole.oldest_age_ns or 0) >= 50_000_000
        for _ in range(3):
            is_served(daemon.other)
        os.kill(daemon.pid, signal.SIGHUP)  # it looks at the sizes of all disks
        is_served(daemon.other)
        assert daemon.output.count(NO_ANSWER) == before + 1
        hanging.go_on()
        finish(client, pending, DEADLINE)
        assert all(request.status == Status.OK for request in pending)
        in_time(lambda: daemon.output.count(AGAIN) > before, "the log says so")


@PATHS
@pytest.mark.parametrize("other", ["", ",cache.direct=on", ",aio=threads"])
def test_disk_that_hangs_has_16_threads_and_others_of_its_iothread_have_theirs(
    folder: Path, hanging: HangingFile, data_path: str, other: str
) -> None:
    with (
        Daemon(
            *(folder, hanging, data_path, "--object", "iothread,id=both"),
            options=",iothread=both",
            other=f",discard=unmap{other}",
        ) as daemon,
        Client.connect(daemon.stuck, queues=2) as client,
        Client.connect(daemon.other, queues=2, timeout=DEADLINE) as neighbour,
    ):
        client.write(0, bytes(512))
        neighbour.write(0, bytes(4096))
        hanging.hang()
        pending = ask(client, "reads", 40)
        in_time(lambda: hanging.waiting == 16, "as many as there may be")
        for _ in range(100):
            neighbour.write(0, b"y" * 4096)
            assert neighbour.read(0, 4096) == b"y" * 4096
            neighbour.write_zeroes((0, 4096))
            neighbour.discard((0, 4096))
        assert hanging.waiting == 16
        hanging.go_on()
        finish(client, pending, DEADLINE)
        assert all(request.status == Status.OK for request in pending)


@PATHS
def test_ring_of_a_disk_that_hangs_stops_when_it_goes_on(
    folder: Path, hanging: HangingFile, data_path: str
) -> None:
    """GET_VRING_BASE is answered then; a front-end that does not wait for that leaves the disk to the next one."""
    with Daemon(folder, hanging, data_path) as daemon:
        client = Client.connect(daemon.stuck, queues=2)
        client.write(0, bytes(512))
        hanging.hang()
        pending = ask(client, "reads", 4)
        in_time(lambda: hanging.waiting == 4, "they are on their way")  # not in the ring any more
        client.control.send_raw(Request.GET_VRING_BASE, bytes(8))
        is_served(daemon.other)
        client.control.connection.timeout = 0.05
        with pytest.raises(TimeoutError):
            client.control.receive()
        client.abandon()
        next_one = Connecting(daemon.stuck)
        is_served(daemon.other)
        assert next_one.is_waiting
        hanging.go_on()
        next_one.join()
        client.poll()
        assert all(request.is_done for request in pending)
        client.close()


@PATHS
def test_size_that_changes_while_a_ring_is_being_stopped_is_told_behind_the_answer(
    folder: Path, hanging: HangingFile, data_path: str
) -> None:
    """A front-end that waits for an answer looks at nothing else, and would have to answer the change, too."""
    with Daemon(folder, hanging, data_path) as daemon:
        client = Client.connect(daemon.stuck, queues=2, timeout=DEADLINE)
        client.write(0, bytes(512))
        hanging.hang()
        pending = ask(client, "reads", 4)
        in_time(lambda: hanging.waiting == 4, "they are on their way")  # not in the ring any more
        client.control.send_raw(Request.GET_VRING_BASE, bytes(8))
        is_served(daemon.other)  # it has come
        hanging.content.extend(bytes(SIZE))
        os.kill(daemon.pid, signal.SIGHUP)
        in_time(lambda: f"export stuck: the disk has {2 * SIZE} bytes now" in daemon.output, "new")
        with pytest.raises(TimeoutError):
            client.control.next_backend_message(0.05)
        hanging.go_on()
        assert client.control.receive().request == Request.GET_VRING_BASE
        # The other ring runs, so it is told at once.
        assert client.wait_config_change(DEADLINE).capacity * 512 == 2 * SIZE
        finish(client, pending, DEADLINE)
        assert all(request.status == Status.OK for request in pending)
        client.abandon()
        client.close()


class Connecting(threading.Thread):
    """A client that needs a while to be served."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._error: BaseException | None = None
        self.is_waiting = True
        self.start()

    def run(self) -> None:
        try:
            is_served(self._path)
        except BaseException as error:
            self._error = error
        self.is_waiting = False

    def join(self, timeout: float | None = DEADLINE) -> None:
        super().join(timeout)
        assert not self.is_alive()
        if self._error is not None:
            raise self._error


# ---------------------------------------------------------------- the end


@PATHS
@pytest.mark.parametrize("kind", ["reads", "writes", "flush"])
def test_end_of_a_daemon_whose_disk_hangs_is_bounded_and_says_what_is_left(
    folder: Path, hanging: HangingFile, data_path: str, kind: str
) -> None:
    pid_file = folder / "pid"

    def end(seconds: float) -> str:
        words = ("--shutdown-timeout", str(seconds), "--pidfile", os.fspath(pid_file))
        with (
            Daemon(folder, hanging, data_path, *words) as daemon,
            Client.connect(daemon.stuck, queues=2) as client,
            Client.connect(daemon.other) as other,
        ):
            other.write(0, b"x" * 512)
            client.write(0, bytes(512))
            hanging.hang()
            pending = ask(client, kind, 4)
            in_time(lambda: hanging.waiting > 0, "they are on their way")
            os.kill(daemon.pid, signal.SIGTERM)
            assert other.control.connection.receive() is None
            in_time(lambda: "vhostblk: given up after" in daemon.output, "it gives up")
            client.poll()
            assert not any(request.is_done for request in pending)
            # A process is gone when none of its threads is inside the kernel any more.
            hanging.go_on()
            said = given_up(daemon, pid_file)
            for one in (client, other):
                one.abandon()
        return said

    assert "requests are in flight, one for" in end_in_time(end)
    assert (folder / "image").read_bytes().startswith(b"x" * 512)


@PATHS
def test_disk_that_goes_on_in_time_makes_it_a_good_end(
    folder: Path, hanging: HangingFile, data_path: str
) -> None:
    with Daemon(folder, hanging, data_path, "--shutdown-timeout", "60") as daemon:
        client = Client.connect(daemon.stuck, queues=2)
        client.write(0, bytes(512))
        hanging.hang()
        pending = ask(client, "writes", 4)
        wait_until_taken(daemon, 5)
        os.kill(daemon.pid, signal.SIGTERM)
        in_time(lambda: "stopping" in daemon.output, "it has begun to end")
        hanging.go_on()
        assert daemon.wait(DEADLINE) == 0
        client.poll()
        assert all(request.status == Status.OK for request in pending)
        client.abandon()
        client.close()


@PATHS
def test_last_flush_that_hangs_is_given_up_and_is_no_good_end(
    folder: Path, hanging: HangingFile, data_path: str
) -> None:
    with Daemon(folder, hanging, data_path, "--shutdown-timeout", "0.2") as daemon:
        with Client.connect(daemon.stuck) as client:
            client.write(0, bytes(512))
        hanging.hang()
        os.kill(daemon.pid, signal.SIGTERM)
        in_time(lambda: "given up after 0.2 s" in daemon.output, "it gives up")
        hanging.go_on()
        said = daemon.expect_end(1, DEADLINE)
    assert "export stuck: given up: its disk is not flushed" in said
