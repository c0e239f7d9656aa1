"""rerror and werror under load: what fails is tried again when it was mended, and the guest never knows (row B39).

Real failures: file systems that are full and get more room, files that are cut and made whole again. On the engine,
which serves these requests alone and has to ask what to do about an error, and on the Python data path.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import eventually
from tests.probes import loop_device, mounted
from vhostblk.client.client import Client
from vhostblk.errors import BlockError
from vhostblk.testing.daemon_process import VHOSTBLK, DaemonProcess
from vhostblk.testing.plugin import DaemonStarter
from vhostblk.testing.requirements import require
from vhostblk.virtio.blk import RequestType, Status

MIB = 1 << 20
SIZE = 4 * MIB
OPTIONS = {
    "native": ["--data-path", "native"],
    "threads": ["--data-path", "native", "--aio", "threads"],
    "python": ["--data-path", "python"],
}
PAUSED = "its queues are paused"


@pytest.fixture(params=OPTIONS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def stack(_nothing_leaks: None) -> Iterator[ExitStack]:
    """For what must outlive the daemon: `serve` comes after it, and so ends before it."""
    with ExitStack() as stack:
        yield stack


class Served:
    """A daemon with one disk."""

    def __init__(self, process: DaemonProcess, socket: Path) -> None:
        self.process = process
        self.socket = socket

    def connect(self, **options: Any) -> Client:
        return Client.connect(self.socket, **options)

    @property
    def pauses(self) -> int:
        return self.process.output.count(PAUSED)

    def wait_paused(self, times: int = 1) -> None:
        eventually(lambda: self.pauses >= times, "the pause", 30)

    def resume(self) -> None:
        os.kill(self.process.pid, signal.SIGHUP)


Serve = Callable[..., Served]


@pytest.fixture
def serve(stack: ExitStack, daemon: DaemonStarter, socket_directory: Path, path: str) -> Serve:
    def start(image: Path | str, *options: str) -> Served:
        socket = socket_directory / "s"
        words = ["serve", str(image), "--socket", str(socket), *OPTIONS[path], *options]
        return Served(daemon(*words, sockets=[socket]), socket)

    return start


# ---------------------------------------------------------------- full file systems


class SmallFileSystem:
    """One that is too small for the image on it, and can be given more room."""

    def __init__(self, kind: str, folder: Path, stack: ExitStack) -> None:
        self.image = folder / "mnt" / "disk.img"
        self._filler = folder / "mnt" / "filler"
        if kind == "tmpfs":
            stack.enter_context(mounted("none", folder / "mnt", "-t", "tmpfs", "-o", "size=8m"))
        else:
            fs = folder / "fs.img"
            with fs.open("wb") as file:
                file.truncate(12 * MIB)
            subprocess.run([require("mkfs.ext4"), "-q", "-O", "^has_journal", str(fs)], check=True)
            stack.enter_context(mounted(str(fs), folder / "mnt", "-o", "loop"))
        self._filled = 7 * MIB
        self._filler.write_bytes(bytes(self._filled))
        with self.image.open("wb") as file:
            file.truncate(SIZE)

    def enlarge(self) -> None:
        self._filled = max(self._filled - MIB, 0)
        with self._filler.open("r+b") as file:
            file.truncate(self._filled)
            os.fsync(file.fileno())


# By default (auto), writes stop for want of room.
_SMALL = {
    "tmpfs": ["--werror", "stop"],
    "ext4": ["--werror", "auto"],
    "ext4 with O_DIRECT": ["--cache", "none", "--werror", "enospc"],
}


@pytest.fixture(params=_SMALL)
def small(
    request: pytest.FixtureRequest, tmp_path: Path, stack: ExitStack
) -> tuple[SmallFileSystem, list[str]]:
    return SmallFileSystem(request.param.split()[0], tmp_path, stack), _SMALL[request.param]


@pytest.mark.timeout(120)
def test_full_file_system_pauses_and_after_more_room_and_a_resume_no_write_is_lost(
    small: tuple[SmallFileSystem, list[str]], serve: Serve
) -> None:
    fs, options = small
    served = serve(fs.image, *options)
    load = subprocess.Popen(
        [
            *(*VHOSTBLK, "bench", str(served.socket), "--verify", "--queues", "4", "--depth", "32"),
            *("--requests", "4000", "--block-size", "4k-64k"),
            *("--pattern", "read=30,write=60,flush=3,write-zeroes=7"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with load:
        seen = 0

        def paused_again_or_done() -> bool:
            return served.pauses > seen or load.poll() is not None

        while load.poll() is None:
            eventually(paused_again_or_done, "a pause, or the end", 60)
            if served.pauses > seen:
                seen = served.pauses
                fs.enlarge()
                served.resume()
        _, error = load.communicate()
    # It has verified every byte, and no request has failed.
    assert load.returncode == 0, error
    assert seen >= 1
    assert "failed: " not in served.process.output.replace("a write failed: No space left", "")
    served.process.stop()


def test_everything_that_fails_is_reported_if_the_policy_says_so(
    tmp_path: Path, stack: ExitStack, serve: Serve
) -> None:
    fs = SmallFileSystem("tmpfs", tmp_path, stack)
    served = serve(fs.image, "--werror", "report")
    with served.connect() as client:
        with pytest.raises(BlockError, match="status 1"):
            client.write(0, bytes(b"w" * 2 * MIB))
        assert client.read(SIZE - 512, 512) == bytes(512)
    assert not served.pauses


def test_ignored_errors_are_successes_for_the_guest_and_in_the_log(
    tmp_path: Path, stack: ExitStack, serve: Serve
) -> None:
    fs = SmallFileSystem("tmpfs", tmp_path, stack)
    served = serve(fs.image, "--werror", "ignore", "--rerror", "ignore")
    with served.connect() as client:
        client.read(0, 512)
        client.write(0, bytes(b"w" * 2 * MIB))
        os.truncate(fs.image, 0)
        client.read(MIB, 512)
        client.flush()
    assert "write (ignored) failed: No space left on device" in served.process.output
    assert "read (ignored) failed: Input/output error" in served.process.output
    assert not served.pauses


# ---------------------------------------------------------------- files that were cut


def pattern(number: int) -> bytes:
    return number.to_bytes(4, "little") * 128


@pytest.mark.timeout(120)
def test_thousands_of_reads_that_fail_at_once_are_all_answered_after_the_resume(
    tmp_path: Path, stack: ExitStack, serve: Serve
) -> None:
    """More than there is room for between engine and control loop."""
    image = tmp_path / "disk.img"
    content = b"".join(pattern(number) for number in range(SIZE // 512))
    image.write_bytes(content)
    # A device keeps its size when its storage is cut, so a resume finds that nothing was mended.
    device = stack.enter_context(loop_device(image)).path
    served = serve(device, "--rerror", "stop", "--cache", "none")
    with served.connect(queues=8, queue_size=1024, alignment=512) as client:
        for queue in range(8):
            assert client.read(0, 512, queue=queue) == pattern(0)
        os.truncate(image, 0)
        requests = [
            (number, client.submit(RequestType.IN, number * 512, room=512, queue=number % 8))
            for number in range(5000)  # there is room for 4096
        ]
        served.wait_paused()
        served.resume()  # nothing was mended
        served.wait_paused(2)
        client.poll()
        assert not any(pending.is_done for _, pending in requests)
        with image.open("r+b") as file:
            file.write(content)
        seen = 0

        def finished() -> bool:
            nonlocal seen
            if served.pauses > seen:  # once more for what was on its way before it was mended
                seen = served.pauses
                served.resume()
            client.poll()
            return all(pending.is_done for _, pending in requests)

        eventually(finished, "all requests", 60)
        for number, pending in requests:
            assert pending.result() == pattern(number)


# ---------------------------------------------------------------- what must not wait for people


@pytest.fixture
def paused(tmp_path: Path, serve: Serve) -> tuple[Served, Path]:
    """An export whose image is cut."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    served = serve(image, "--rerror", "stop", "--queues", "4")
    with served.connect() as client:
        client.read(0, 512)
    os.truncate(image, 0)
    return served, image


def test_queue_that_stops_reports_what_waits_for_a_resume(paused: tuple[Served, Path]) -> None:
    served, image = paused
    with served.connect(queues=2) as client:
        requests = [client.submit(RequestType.IN, 512 * i, room=512, queue=i % 2) for i in range(8)]
        served.wait_paused()
        taken = client.stop_queue(0)
        client.wait(requests[::2][:taken])
        assert all(pending.status == Status.IOERR for pending in requests[::2][:taken])
        os.truncate(image, SIZE)
        # The other queue, whose requests were reported or parked anew, is as good as before; and so is what this one
        # had not taken.
        served.resume()
        client.start_queue(0, taken)
        client.wait(requests)
        assert all(pending.result() == bytes(512) for pending in requests[::2][taken:])
        assert client.read(0, 512, queue=1) == bytes(512)


def test_session_that_ends_while_paused_leaves_an_export_that_works(
    paused: tuple[Served, Path],
) -> None:
    served, image = paused
    client = served.connect()
    client.submit(RequestType.IN, 0, room=512)
    served.wait_paused()
    client.abandon()
    client.close()
    os.truncate(image, SIZE)
    with served.connect() as client:
        assert client.read(0, 512) == bytes(512)


def test_memory_is_added_while_paused_and_what_waited_is_reported(
    paused: tuple[Served, Path],
) -> None:
    served, _ = paused
    with served.connect() as client:
        pending = client.submit(RequestType.IN, 0, room=512)
        served.wait_paused()
        client.add_memory(MIB)
        client.wait([pending])
        assert pending.status == Status.IOERR


def test_daemon_stops_while_paused(paused: tuple[Served, Path]) -> None:
    served, _ = paused
    client = served.connect()
    pending = client.submit(RequestType.IN, 0, room=512)
    served.wait_paused()
    served.process.stop()
    eventually(lambda: client.poll() is not None and pending.is_done, "the answer")
    assert pending.status == Status.IOERR
    client.close()
    served.process.expect_end(0)


def test_write_cache_is_switched_while_paused(paused: tuple[Served, Path]) -> None:
    served, image = paused
    with served.connect() as client:
        pending = client.submit(RequestType.IN, 0, room=512)
        served.wait_paused()
        client.set_writeback(False)
        os.truncate(image, SIZE)
        served.resume()
        client.wait([pending])
        assert pending.result() == bytes(512)
