"""Rings that stop with requests in flight: what is not done stays marked, the next one does it.

vhost-user, GET_VRING_BASE_SKIP_DRAIN and the protocol feature GET_VRING_BASE_INFLIGHT. What hangs here hangs for ever:
a stop that waited for it would not be answered.
"""

from __future__ import annotations

import random
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemons import ALL_PATHS, Disks, barrier, eventually, split_ring, taken
from tests.requirements import require
from tests.schedule import HUNT
from vhostblk.client.client import FEATURES, Client
from vhostblk.client.control import PROTOCOL_FEATURES
from vhostblk.client.queue import Pending
from vhostblk.client.shared_memory import SharedMemory
from vhostblk.testing.daemon_process import VHOSTBLK, DaemonProcess
from vhostblk.vhost.inflight import PACKED_ENTRY, PACKED_HEADER, SPLIT_ENTRY, SPLIT_HEADER
from vhostblk.vhost.message import ProtocolFeature
from vhostblk.virtio.blk import RequestType
from vhostblk.virtio.features import Feature

SIZE = 64
CAPACITY = 1 << 20
FORMATS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


def features(packed: bool) -> int:
    """Rings of that format."""
    bit = int(Feature.VIRTIO_F_RING_PACKED)
    return FEATURES | bit if packed else FEATURES & ~bit


class Daemon:
    """Three disks: one never answers, one is full, one works; with one data path."""

    def __init__(self, folder: Path, data_path: str) -> None:
        self.folder = folder
        image = folder / "image"
        image.write_bytes(bytes(CAPACITY))
        nodes = {
            "stuck": f"driver=null-co,size={CAPACITY},latency-ns=3600000000000",
            "good": f"driver=file,filename={image}",
        }
        nodes["full"] = f"driver=blkdebug,image.driver=null-co,image.size={CAPACITY}"
        nodes["full"] += ",inject-error.0.event=none,inject-error.0.errno=28"
        words: list[str] = ["--data-path", data_path]
        for name, options in nodes.items():
            words += ["--blockdev", f"node-name={name},{options}"]
            words += [
                "--export",
                f"type=vhost-user-blk,id={name},node-name={name},writable=on,num-queues=4,"
                f"addr.type=unix,addr.path={self.socket(name)},werror=stop,rerror=stop",
            ]
        self.process = DaemonProcess(
            [*VHOSTBLK, "storage-daemon", *words], sockets=[self.socket(name) for name in nodes]
        )

    def socket(self, name: str) -> Path:
        return self.folder / f"{name}.sock"

    @contextmanager
    def connect(
        self,
        export: str,
        *,
        packed: bool = False,
        queues: int = 1,
        protocol_features: ProtocolFeature = PROTOCOL_FEATURES,
    ) -> Iterator[Client]:
        with Client.connect(
            self.socket(export),
            queues=queues,
            queue_size=SIZE,
            features=features(packed),
            protocol_features=protocol_features,
        ) as client:
            yield client


@pytest.fixture(scope="module", params=["native", "python"])
def daemon(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    if request.param == "native":
        require("engine")
    with tempfile.TemporaryDirectory(prefix="vb-") as folder:
        daemon = Daemon(Path(folder), request.param)
        daemon.process.start()
        try:
            yield daemon
        finally:
            daemon.process.kill()  # a disk that hangs is never closed in order
            daemon.process.close()


def in_flight(client: Client, queue: int = 0) -> int:
    """How many requests the region says are in flight."""
    assert client.inflight is not None
    packed = client.control.features & Feature.VIRTIO_F_RING_PACKED
    header, entry = (PACKED_HEADER, PACKED_ENTRY) if packed else (SPLIT_HEADER, SPLIT_ENTRY)
    part = -(-(header.size + SIZE * entry.size) // 64) * 64
    start = queue * part + header.size
    return sum(bytes(client.inflight.view[start : start + SIZE * entry.size : entry.size]))


def some_of_each(client: Client, queue: int = 0) -> list[Pending]:
    """Requests of every kind that waits for a disk."""
    return [
        client.submit(RequestType.IN, 0, room=4096, queue=queue),
        client.submit(RequestType.OUT, 8192, out=b"w" * 4096, queue=queue),
        client.submit(RequestType.FLUSH, queue=queue),
        client.submit(RequestType.OUT, 512, out=b"u" * 512, queue=queue),
    ]


@FORMATS
def test_ring_stops_while_its_disk_hangs_and_another_disk_does_what_was_left(
    daemon: Daemon, packed: bool
) -> None:
    with daemon.connect("stuck", packed=packed) as client:
        pending = some_of_each(client)
        eventually(lambda: in_flight(client) == 4, "all were taken")
        client.stop_queue(0, skip_drain=True)
        assert in_flight(client) == 4
        assert not client.poll()
        client.start_queue(0)  # the same disk takes them once more
        pending += [client.submit(RequestType.IN, 8192, room=4096)]
        eventually(lambda: in_flight(client) == 5, "one more was taken")
        client.stop_queue(0, skip_drain=True)
        client.reconnect(daemon.socket("good"))
        client.wait(pending)
        assert [p.result() for p in pending[1:4]] == [b""] * 3
        assert client.read(8192, 4096) == b"w" * 4096
        assert client.read(512, 512) == b"u" * 512
        assert in_flight(client) == 0
        assert client.queues[0].driver.in_flight == 0


@FORMATS
def test_requests_that_wait_for_room_on_the_disk_are_not_failed_by_a_stop_but_done_elsewhere(
    daemon: Daemon, packed: bool
) -> None:
    with daemon.connect("full", packed=packed, queues=2) as client:
        pending = some_of_each(client) + some_of_each(client, queue=1)
        eventually(lambda: in_flight(client) >= 1, "some were taken")
        for queue in (0, 1):
            client.stop_queue(queue, skip_drain=True)
        assert not client.poll()
        client.reconnect(daemon.socket("good"))
        client.wait(pending)
        assert all(p.status == 0 for p in pending)


@FORMATS
def test_older_feature_alone_lets_every_stop_leave_requests_in_flight(
    daemon: Daemon, packed: bool
) -> None:
    agreed = PROTOCOL_FEATURES & ~ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN
    with daemon.connect("stuck", packed=packed, protocol_features=agreed) as client:
        pending = some_of_each(client)
        eventually(lambda: in_flight(client) == 4, "all were taken")
        base = client.stop_queue(0)
        assert in_flight(client) == 4
        assert base == client.queues[0].driver.base or packed
        client.reconnect(daemon.socket("good"))
        client.start_queue(0)
        client.wait(pending)


@ALL_PATHS
@FORMATS
def test_stop_as_of_old_drains_where_it_could_ask_not_to(disks: Disks, packed: bool) -> None:
    with disks.connect("slow", queue_size=SIZE, features=features(packed)) as client:
        pending = some_of_each(client)
        # Or done: whoever looks late sees none in flight.
        eventually(lambda: in_flight(client) > 0 or bool(client.poll()), "some were taken")
        client.stop_queue(0)
        assert in_flight(client) == 0
        client.poll()
        assert any(p.is_done for p in pending)
        client.start_queue(0)
        client.wait(pending)


@ALL_PATHS
def test_without_a_region_a_stop_drains_whatever_was_asked(disks: Disks) -> None:
    agreed = PROTOCOL_FEATURES & ~ProtocolFeature.INFLIGHT_SHMFD
    with disks.connect("slow", queue_size=SIZE, protocol_features=agreed) as client:
        before = taken(disks.process)
        pending = some_of_each(client)
        eventually(lambda: taken(disks.process) > before, "some were taken")
        base = client.stop_queue(0, skip_drain=True)
        assert 0 < base == split_ring(client).visible_base, "all that was taken is used"
        client.start_queue(0, base)
        client.wait(pending)


@ALL_PATHS
@FORMATS
def test_other_queues_go_on(disks: Disks, packed: bool) -> None:
    with disks.connect("slow", queues=2, queue_size=SIZE, features=features(packed)) as client:
        pending = some_of_each(client)
        others = some_of_each(client, queue=1)
        client.stop_queue(0, skip_drain=True)
        client.wait(others)
        client.start_queue(0)
        client.wait(pending)
        barrier(client)


@ALL_PATHS
@FORMATS
@pytest.mark.parametrize("export", ["disk", "direct"])
def test_rings_that_stop_at_any_time_lose_nothing_and_do_nothing_twice(
    disks: Disks, export: str, packed: bool
) -> None:
    rnd = random.Random(f"{export} {packed}")
    disks.max_lines = 200
    memory = SharedMemory([1 << 20])
    with disks.connect(
        export, queues=2, queue_size=SIZE, features=features(packed), memory=memory
    ) as client:
        content = [bytes([block]) * 4096 for block in range(32)]
        for round_ in range(8 * HUNT):
            pending = []
            blocks = range(32) if not round_ else rnd.sample(range(32), 20)
            for block in blocks:
                content[block] = bytes([(round_ * 7 + block) & 255]) * 4096
                queue = rnd.randrange(2)
                pending.append(
                    client.submit(
                        RequestType.OUT, 4096 * block, out=content[block], queue=queue, notify=False
                    )
                )
                if rnd.random() < 0.2:
                    pending.append(client.submit(RequestType.FLUSH, queue=queue, notify=False))
                if rnd.random() < 0.3:
                    pending.append(client.submit(RequestType.IN, 1 << 20, room=4096, queue=queue))
            for ring in client.queues:
                ring.notify()
            stopped = rnd.sample([0, 1], rnd.randrange(1, 3))
            for index in stopped:
                client.stop_queue(index, skip_drain=True)
            before = zlib.crc32(memory.regions[0].view)
            barrier(client)
            assert len(stopped) == 1 or zlib.crc32(memory.regions[0].view) == before
            for index in stopped:
                client.start_queue(index)
            client.wait(pending)
            assert all(p.status == 0 for p in pending)
        assert client.read(0, 32 * 4096) == b"".join(content)
        for index in (0, 1):
            client.stop_queue(index)
            assert in_flight(client, index) == 0
