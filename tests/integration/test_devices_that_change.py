"""Block devices of the host that grow, shrink and go away under a daemon that serves them, on both data paths.

Loop devices, which need root; nobody tells the daemon but the kernel.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.daemons import eventually
from tests.probes import LoopDevice, watched_device
from tests.requirements import require
from vhostblk.client.client import Client
from vhostblk.errors import BlockError
from vhostblk.testing.daemon_process import DaemonProcess
from vhostblk.testing.plugin import DaemonStarter
from vhostblk.virtio.blk import RequestType, Status

MIB = 1 << 20
SIZE = 8 * MIB
SECTOR = 512
PAUSED = "its queues are paused"
# A machine that is busy, and an event that has to be heard first.
PATIENCE = 60.0

BOTH = pytest.mark.parametrize("path", ["native", "python"])


@pytest.fixture
def device(tmp_path: Path) -> Iterator[LoopDevice]:
    with watched_device(tmp_path, SIZE) as found:
        yield found


class Exports:
    """A daemon with exports `a`, `b`, ...: each of the node that is given for it."""

    def __init__(
        self,
        storage_daemon: DaemonStarter,
        folder: Path,
        path: str,
        nodes: list[str],
        exports: dict[str, str],
        *more: str,
    ) -> None:
        self._folder = folder
        words = ["--log-level", "debug", "--data-path", path, *more]
        for node in nodes:
            words += ["--blockdev", node]
        for name, options in exports.items():
            words += [
                "--export",
                f"vhost-user-blk,id={name},writable=on,addr.type=unix,addr.path={folder / name},{options}",
            ]
        sockets = [folder / name for name in exports]
        self.process: DaemonProcess = storage_daemon(*words, sockets=sockets)

    def connect(self, name: str) -> Client:
        return Client.connect(self._folder / name, strict=False)

    def expect(self, text: str) -> None:
        eventually(lambda: text in self.process.output, text, PATIENCE)


def host(device: LoopDevice, more: str = "") -> str:
    return f"host_device,node-name=d,filename={device.path}{more}"


def wait_for_size(client: Client, size: int) -> None:
    """Until a message has said so; each tells of the last change, or is about one that was seen already."""
    eventually(
        lambda: client.wait_config_change(PATIENCE).capacity * SECTOR == size,
        f"{size} bytes",
        PATIENCE,
    )


def fails(client: Client, offset: int) -> None:
    for kind, data in ((RequestType.IN, {"room": 4096}), (RequestType.OUT, {"out": bytes(4096)})):
        pending = client.submit(kind, offset, **data)
        client.wait([pending])
        assert pending.status == Status.IOERR


@BOTH
@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
def test_guest_hears_of_a_device_that_grows_and_shrinks_without_a_signal(
    storage_daemon: DaemonStarter,
    device: LoopDevice,
    socket_directory: Path,
    path: str,
    direct: bool,
) -> None:
    node = host(device, f",cache.direct={'on' if direct else 'off'}")
    exports = Exports(storage_daemon, socket_directory, path, [node], {"a": "node-name=d"})
    with exports.connect("a") as client:
        for size in (2 * SIZE, SIZE, SIZE // 2, SIZE + 4096, 4096):
            before = client.capacity
            device.resize(size)
            wait_for_size(client, size)
            fails(client, max(before, size))
            fails(client, size)
            client.write(size - 4096, b"w" * 4096)
            assert client.read(size - 4096, 4096) == b"w" * 4096
        device.resize(0)
        wait_for_size(client, 0)
        fails(client, 0)
        device.resize(SIZE)
        wait_for_size(client, SIZE)
        client.write(SIZE - 4096, b"z" * 4096)
        assert client.read(SIZE - 4096, 4096) == b"z" * 4096
    assert PAUSED not in exports.process.output


@BOTH
def test_sizes_change_under_a_guest_that_works(
    storage_daemon: DaemonStarter, device: LoopDevice, socket_directory: Path, path: str
) -> None:
    """What is inside at all times is never touched; the rest either succeeds or fails, and nothing waits for ever."""
    exports = Exports(
        storage_daemon, socket_directory, path, [host(device)], {"a": "node-name=d,num-queues=2"}
    )
    over = threading.Event()
    rounds: list[int] = []

    def work() -> tuple[int, int]:
        done = failed = 0
        with Client.connect(socket_directory / "a", queues=2, strict=False) as client:
            number = 0
            while not over.is_set():
                token = b"%15d " % number * 256
                at = number % 64 * 4096
                inside = [
                    client.submit(RequestType.OUT, at, out=token, queue=0),
                    *(
                        client.submit(
                            RequestType.OUT,
                            SIZE - 16 * 65536 + 65536 * n,
                            out=b"t" * 65536,
                            queue=n % 2,
                        )
                        for n in range(32)
                    ),
                ]
                client.wait(inside)
                assert inside[0].status == Status.OK
                for tail in inside[1:]:
                    assert tail.status in (Status.OK, Status.IOERR)
                    done, failed = done + (not tail.status), failed + bool(tail.status)
                assert client.read(at, 4096) == token
                number += 1
                rounds.append(number)
            assert client.read_config().capacity * SECTOR == 2 * SIZE
        return done, failed

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)

        def has_gone_on(before: int) -> bool:
            return len(rounds) > before or working.done()

        try:
            for number in range(12):
                size = (2 * SIZE, SIZE - 8 * 65536, SIZE)[number % 3]
                device.resize(size)
                exports.expect(f"the disk has {size} bytes now")
                eventually(partial(has_gone_on, len(rounds)), "a round", PATIENCE)
            device.resize(2 * SIZE)
            eventually(
                lambda: (
                    exports.process.output.rstrip().rfind(f"has {2 * SIZE} bytes")
                    > exports.process.output.rfind(f"has {SIZE - 8 * 65536} bytes")
                ),
                "the last size",
                PATIENCE,
            )
        finally:
            over.set()
        done, failed = working.result(PATIENCE)
    assert done > 0
    assert failed > 0


@BOTH
def test_all_above_a_device_follow_as_far_as_they_do(
    storage_daemon: DaemonStarter, device: LoopDevice, socket_directory: Path, path: str
) -> None:
    """Two exports of the node itself, one through filters, a window at an offset, and one of a size of its own."""
    nodes = [
        host(device),
        "throttle,node-name=t,throttle-group=g,file=d",
        "copy-on-read,node-name=c,file=t",
        f"raw,node-name=w,offset={MIB},file=d",
        f"raw,node-name=f,offset={MIB},size={MIB},file=d",
    ]
    exports = Exports(
        *(storage_daemon, socket_directory, path, nodes),
        {name: f"node-name={node}" for name, node in zip("abtwf", "ddcwf", strict=True)},
        *("--object", "throttle-group,id=g,limits.iops-total=100000"),
    )
    clients = {name: exports.connect(name) for name in "abtwf"}
    try:
        for size in (2 * SIZE, SIZE, 2 * MIB):
            device.resize(size)
            for name in "abt":
                wait_for_size(clients[name], size)
            wait_for_size(clients["w"], size - MIB)
            assert clients["f"].read_config().capacity * SECTOR == MIB
            clients["t"].write(size - 4096, b"t" * 4096)
            for name, end in (("a", size), ("b", size), ("w", size - MIB)):
                assert clients[name].read(end - 4096, 4096) == b"t" * 4096
                fails(clients[name], end)
        # What no longer holds the window fails its requests, and not the daemon.
        device.resize(MIB + 65536)
        wait_for_size(clients["w"], 65536)
        assert clients["f"].read(0, 65536)
        fails(clients["f"], 65536)
    finally:
        for client in clients.values():
            client.close()


@BOTH
def test_overlay_shows_what_its_backing_device_has_now(
    storage_daemon: DaemonStarter,
    device: LoopDevice,
    socket_directory: Path,
    tmp_path: Path,
    path: str,
) -> None:
    """What was mapped behind the end of a device that is shorter, or longer, now is not believed any more."""
    qemu_img = require("qemu-img")
    overlay = tmp_path / "overlay"
    subprocess.run(
        [qemu_img, "create", "-q", "-f", "qcow2", str(overlay), str(2 * SIZE)], check=True
    )
    node = (
        f"qcow2,node-name=o,file.driver=file,file.filename={overlay},backing.driver=host_device,"
        f"backing.node-name=d,backing.filename={device.path}"
    )
    exports = Exports(storage_daemon, socket_directory, path, [node], {"a": "node-name=o"})
    with exports.connect("a") as client:
        assert client.read(SIZE - 4096, 8192) == b"d" * 4096 + bytes(4096)
        assert client.read(SIZE + MIB, 4096) == bytes(4096)
        # Somebody else writes what comes into view.
        with device.image.open("r+b") as image:
            image.truncate(2 * SIZE)
            image.seek(SIZE)
            image.write(b"n" * SIZE)
        device.resize(2 * SIZE)
        eventually(lambda: client.read(SIZE + MIB, 4096) == b"n" * 4096, "what is new", PATIENCE)
        assert client.read(SIZE - 4096, 8192) == b"d" * 4096 + b"n" * 4096
        device.resize(SIZE // 2)
        end = SIZE // 2
        eventually(lambda: _reads(client, end, bytes(4096)), "zeroes behind the end", PATIENCE)
        assert client.read(end - 4096, 8192) == b"d" * 4096 + bytes(4096)
        assert client.capacity == 2 * SIZE


def stop(process: DaemonProcess) -> None:
    """Return when all threads have."""
    os.kill(process.pid, signal.SIGSTOP)
    for thread in Path(f"/proc/{process.pid}/task").iterdir():
        eventually(partial(is_stopped, thread), "a thread that stops")


def is_stopped(thread: Path) -> bool:
    return ") T " in (thread / "stat").read_text()


def _reads(client: Client, offset: int, expected: bytes) -> bool:
    try:
        return client.read(offset, len(expected)) == expected
    except BlockError:  # the device is shorter, and nobody has heard of it yet
        return False


@BOTH
def test_image_that_filled_its_device_goes_on_when_the_device_grows(
    storage_daemon: DaemonStarter,
    device: LoopDevice,
    socket_directory: Path,
    path: str,
) -> None:
    """As with logical volumes that are extended when an image in them needs more: nobody has to resume the guest."""
    qemu_img = require("qemu-img")
    subprocess.run(
        [qemu_img, "create", "-q", "-f", "qcow2", device.path, str(2 * SIZE)], check=True
    )
    node = f"qcow2,node-name=q,file.driver=host_device,file.filename={device.path}"
    exports = Exports(storage_daemon, socket_directory, path, [node], {"a": "node-name=q"})
    with exports.connect("a") as client:
        writes = [
            client.submit(RequestType.OUT, n * 65536, out=b"%15d " % n * 4096) for n in range(100)
        ]
        more = [
            client.submit(RequestType.OUT, n * 65536, out=b"%15d " % n * 4096)
            for n in range(100, 120)
        ]
        client.wait(writes)
        more += [
            client.submit(RequestType.OUT, n * 65536, out=b"%15d " % n * 4096)
            for n in range(120, 200)
        ]
        exports.expect(PAUSED)
        device.resize(3 * SIZE)
        client.wait(more, timeout=PATIENCE)
        assert not any(write.status for write in writes + more)
        for n in range(200):
            assert client.read(n * 65536, 512) == b"%15d " % n * 32
    output = exports.process.output
    assert output.count("its queues go on") == output.count(PAUSED)


@BOTH
def test_nobody_waits_for_room_behind_the_end_of_a_device_that_was_cut(
    storage_daemon: DaemonStarter, device: LoopDevice, socket_directory: Path, path: str
) -> None:
    """A device says ENOSPC there. It is so even if nobody has heard of the cut when the write fails."""
    exports = Exports(
        *(storage_daemon, socket_directory, path, [host(device)]),
        {"a": "node-name=d,werror=stop,rerror=stop"},
    )
    with exports.connect("a") as client:
        assert client.read(SIZE // 2, 4096) == b"d" * 4096
        stop(exports.process)
        pending = [client.submit(RequestType.OUT, SIZE - 4096, out=bytes(4096))]
        pending += [client.submit(RequestType.IN, SIZE - 8192, room=4096)]
        device.resize(SIZE // 2)
        os.kill(exports.process.pid, signal.SIGCONT)
        client.wait(pending, timeout=PATIENCE)
        assert [one.status for one in pending] == [Status.IOERR] * 2
        wait_for_size(client, SIZE // 2)
        assert client.read(SIZE // 2 - 4096, 4096) == b"d" * 4096
    assert PAUSED not in exports.process.output


def test_events_for_no_reason_change_nothing(
    storage_daemon: DaemonStarter, device: LoopDevice, socket_directory: Path
) -> None:
    exports = Exports(
        storage_daemon, socket_directory, "native", [host(device)], {"a": "node-name=d"}
    )
    with exports.connect("a") as client:
        for action in ("remove", "offline", "add", "online", "change"):
            device.announce(action)
        device.resize(2 * SIZE)  # heard behind them
        wait_for_size(client, 2 * SIZE)
        assert client.read(0, 4096) == b"d" * 4096
    assert "removed" not in exports.process.output


_WITHOUT = "import sys; sys.modules['pyroute2'] = None; from vhostblk.cli.main import main; main()"


@BOTH
def test_without_pyroute2_a_signal_does_the_same_and_the_log_says_so_once(
    daemon: DaemonStarter, device: LoopDevice, socket_directory: Path, path: str
) -> None:
    sock = socket_directory / "s"
    process = daemon(
        *("--log-level", "debug", "serve", device.path, "--socket", sock, "--data-path", path),
        sockets=[sock],
        command=[sys.executable, "-c", _WITHOUT],
    )
    with Client.connect(sock, strict=False) as client:
        for size in (2 * SIZE, SIZE // 2):
            device.resize(size)
            os.kill(process.pid, signal.SIGHUP)
            wait_for_size(client, size)
            fails(client, size)
    assert process.output.count("'pyroute2' is not installed") == 1
