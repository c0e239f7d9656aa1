"""The write cache that a guest is told of is the one it has: what reaches the disk, and when.

VIRTIO 1.2 §5.2.5 and §5.2.6.2. A back-end that gets this wrong loses what a guest has flushed, and nobody notices
before the power fails; so the probes are outside of the daemon: strace, and the flush counter of a block device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemons import eventually
from tests.probes import Trace, loop_device
from vhostblk.client.client import FEATURES, Client
from vhostblk.errors import PeerError
from vhostblk.testing.daemon_process import VHOSTBLK, DaemonProcess
from vhostblk.testing.plugin import DaemonStarter
from vhostblk.virtio.features import Feature

SIZE = 4 << 20
NO_FLUSH = FEATURES & ~Feature.VIRTIO_BLK_F_FLUSH
CALLS = ("fdatasync", "fsync", "pwritev2", "pwritev", "pwrite64")

Serve = Callable[..., "Served"]


class Served:
    """A daemon with a disk, and a count of how often that was made durable."""

    def __init__(self, process: DaemonProcess, socket: Path, count: Callable[[], int]) -> None:
        self.process = process
        self.socket = socket
        self._count = count
        self._before = 0

    def connect(self, features: int = FEATURES) -> Client:
        client = Client.connect(self.socket, features=features)
        self.syncs()
        return client

    def syncs(self) -> int:
        """How often since the last look."""
        now = self._count()
        new, self._before = now - self._before, now
        return new


def durable(text: str) -> int:
    """Syncs, and writes that are durable by themselves, in strace's output."""
    return sum(
        ("fdatasync(" in line or "fsync(" in line or "RWF_DSYNC" in line)
        and "<unfinished" not in line
        for line in text.replace(" <unfinished ...>", "").splitlines()
        if " resumed>" not in line
    )


@pytest.fixture(params=["native", "native without io_uring", "python"])
def serve(
    request: pytest.FixtureRequest, daemon: DaemonStarter, tmp_path: Path, socket_directory: Path
) -> Iterator[Serve]:
    """Starts `vhostblk serve` on a block device, or on a file under strace."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    socket = socket_directory / "s"
    if request.param != "native":
        # strace sees nothing of io_uring, so there is none where it looks.
        trace = Trace(tmp_path / "trace", *CALLS, io_uring=False)
        path = request.param.partition(" ")[0]

        def start_traced(*words: str) -> Served:
            process = daemon(
                *["serve", image, "--socket", socket, "--data-path", path, *words],
                sockets=[socket],
                command=[*trace.command, *VHOSTBLK],
            )
            return Served(process, socket, lambda: durable(trace.text()))

        yield start_traced
        return
    with loop_device(image) as device:
        processes = []

        def start(*words: str) -> Served:
            process = daemon("serve", device.path, "--socket", socket, *words, sockets=[socket])
            processes.append(process)
            return Served(process, socket, lambda: device.flushes)

        yield start
        for process in processes:
            process.close()  # before the device goes


def fill(client: Client) -> None:
    """Writes small and large, and zeroes, so that both the engine and the block layer have written."""
    client.write(0, b"a" * 512)
    client.write(65536, b"b" * 65536)
    client.write_zeroes((131072, 65536))


def test_flush_reaches_the_disk_with_default_options(serve: Serve) -> None:
    served = serve()
    with served.connect() as client:
        assert client.config.writeback == 1
        for _ in range(3):
            fill(client)
            assert served.syncs() == 0
            client.flush()
            assert served.syncs() == 1


def test_flush_without_a_write_succeeds(serve: Serve) -> None:
    served = serve()
    with served.connect() as client:
        client.flush()
        client.flush()


@pytest.mark.parametrize("cache", ["writeback", "none", "writethrough"])
def test_without_flush_every_write_is_durable_when_it_completes(serve: Serve, cache: str) -> None:
    served = serve("--cache", cache)
    with served.connect(NO_FLUSH) as client:
        for offset in (0, 4096, 1 << 20):
            client.write(offset, b"w" * 4096)
            assert served.syncs() >= 1
        client.write_zeroes((8192, 4096))
        assert served.syncs() >= 1
    # The next driver does flush, and is served accordingly.
    with served.connect() as client:
        client.set_writeback(True)
        served.syncs()
        fill(client)
        assert served.syncs() == 0
        client.flush()
        assert served.syncs() == 1


def test_turning_the_cache_off_makes_all_durable_before_it_is_acknowledged(serve: Serve) -> None:
    served = serve()
    with served.connect() as client:
        fill(client)
        assert served.syncs() == 0
        client.set_writeback(False)
        assert served.syncs() >= 1
        assert client.read_config().writeback == 0
        for offset in (0, 512, 1 << 20):
            client.write(offset, b"w" * 512)
            assert served.syncs() >= 1
        client.write_zeroes((8192, 4096))
        assert served.syncs() >= 1
        client.flush()
        served.syncs()
        client.set_writeback(True)
        assert client.read_config().writeback == 1
        client.write(0, b"c" * 4096)
        assert served.syncs() == 0
        client.flush()
        assert served.syncs() == 1


def test_turning_the_cache_off_waits_for_what_is_in_flight(serve: Serve) -> None:
    """Writes are on their way on all queues when the mode changes: each was flushed or is durable by itself."""
    served = serve()
    with Client.connect(served.socket, queues=4) as client:
        served.syncs()
        pending = [
            client.submit(1, (index * 4 + queue) * 65536 % SIZE, out=b"w" * 65536, queue=queue)
            for index in range(16)
            for queue in range(4)
        ]
        client.set_writeback(False)
        client.wait(pending)
        assert all(p.status == 0 for p in pending)
        assert served.syncs() >= 1


@pytest.mark.parametrize("cache", ["writethrough", "directsync"])
def test_write_through_modes_start_without_a_cache(serve: Serve, cache: str) -> None:
    served = serve("--cache", cache)
    with served.connect() as client:
        assert client.config.writeback == 0
        for offset in (0, 4096):
            client.write(offset, b"w" * 4096)
            assert served.syncs() >= 1
        client.set_writeback(True)
        served.syncs()
        client.write(0, b"w" * 4096)
        assert served.syncs() == 0


def test_unsafe_never_flushes(serve: Serve) -> None:
    served = serve("--cache", "unsafe")
    with served.connect() as client:
        assert client.config.writeback == 1
        fill(client)
        client.flush()
        client.set_writeback(False)
        fill(client)
        client.flush()
        assert served.syncs() == 0
    with served.connect(NO_FLUSH) as client:
        fill(client)
        assert served.syncs() == 0
    assert served.process.stop() == 0
    assert served.syncs() == 0


def test_what_was_not_flushed_is_when_the_daemon_stops(serve: Serve) -> None:
    served = serve()
    with served.connect() as client:
        fill(client)
        assert served.syncs() == 0
    assert served.process.stop() == 0
    assert served.syncs() >= 1


def test_sigterm_flushes_what_a_connected_guest_has_written(serve: Serve) -> None:
    served = serve()
    with served.connect() as client:
        fill(client)
        assert served.syncs() == 0
        assert served.process.stop() == 0
        assert served.syncs() >= 1
        client.abandon()


# ---------------------------------------------------------------- what the guest is told

ONCE = " (logged once, counted from now on)"
BOTH = pytest.mark.parametrize("path", ["native", "python"])


@pytest.fixture
def start(daemon: DaemonStarter, tmp_path: Path, socket_directory: Path) -> Callable[..., Path]:
    """Starts `vhostblk serve`; gives the socket."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    socket = socket_directory / "s"

    def run(*words: str) -> Path:
        daemon("serve", image, "--socket", socket, *words, sockets=[socket])
        return socket

    return run


@pytest.mark.parametrize(
    ("cache", "writeback"),
    [("writeback", 1), ("none", 1), ("unsafe", 1), ("writethrough", 0), ("directsync", 0)],
)
def test_writeback_starts_as_the_cache_mode_says(
    start: Callable[..., Path], cache: str, writeback: int
) -> None:
    with Client.connect(start("--cache", cache)) as client:
        assert client.config.writeback == writeback
        assert client.offered & Feature.VIRTIO_BLK_F_FLUSH
        assert client.offered & Feature.VIRTIO_BLK_F_CONFIG_WCE


@pytest.mark.parametrize(("writethrough", "writeback"), [("", 1), (",writethrough=on", 0)])
def test_export_option_writethrough(
    storage_daemon: DaemonStarter, socket_directory: Path, writethrough: str, writeback: int
) -> None:
    socket = socket_directory / "s"
    export = f"vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={socket},writable=on"
    storage_daemon(
        *["--blockdev", "memory,node-name=d,size=1M", "--export", export + writethrough],
        sockets=[socket],
    )
    with Client.connect(socket) as client:
        assert client.config.writeback == writeback


@BOTH
@pytest.mark.parametrize("initial", [0, 1])
def test_what_the_driver_set_outlives_the_connection_and_ends_with_a_reset(
    start: Callable[..., Path], path: str, initial: int
) -> None:
    socket = start("--data-path", path, "--cache", "writeback" if initial else "writethrough")
    with Client.connect(socket) as client:
        assert client.config.writeback == initial
        client.set_writeback(not initial)
    with Client.connect(socket) as client:
        assert client.config.writeback == 1 - initial
        client.abandon()
    with Client.connect(socket) as client:
        assert client.config.writeback == 1 - initial
        client.reset_device()
        assert client.read_config().writeback == initial
        client.make_queues(1, 64)
        client.start_queue(0)
        client.write(0, bytes(512))
        client.flush()


@BOTH
@pytest.mark.parametrize("value", [2, 255])
def test_writeback_is_0_or_1(start: Callable[..., Path], path: str, value: int) -> None:
    with Client.connect(start("--data-path", path)) as client:
        with pytest.raises(PeerError):
            client.control.set_config(32, bytes([value]))
        assert client.read_config().writeback == 1
        client.flush()


@BOTH
def test_the_log_says_what_the_guest_did_to_its_cache(
    daemon: DaemonStarter, tmp_path: Path, socket_directory: Path, path: str
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    socket = socket_directory / "s"
    process = daemon(*("serve", image, "--socket", socket, "--data-path", path), sockets=[socket])
    with Client.connect(socket) as client:
        for _ in range(10):  # or all day
            client.set_writeback(False)
            client.set_writeback(False)
            client.set_writeback(True)
    eventually(lambda: "has left" in process.output, "the daemon sees its client leave")
    for mode in ("write through", "write back"):
        first, last = (line for line in process.output.splitlines() if f"cache {mode}" in line)
        assert first.endswith(f"INFO: export disk: the guest made its write cache {mode}{ONCE}")
        assert last.endswith("10 times in all")
