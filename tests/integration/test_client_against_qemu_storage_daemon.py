"""The client against somebody else's back-end, so that ours is not its own judge.

What qemu-storage-daemon 7.2 cannot do is left out here: several segments, RESET_DEVICE, resize
notifications, buffers in two regions within an indirect chain (it takes those for loops), a client
that vanishes while the back-end works for it (an assertion fails now and then), and almost
everything hostile.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemons import split_ring
from tests.left_behind import left_behind
from tests.requirements import require
from vhostblk.client.client import FEATURES, Client, segments
from vhostblk.client.shared_memory import Kind, SharedMemory
from vhostblk.client.workload import Workload
from vhostblk.errors import BlockError, SessionError, StateError
from vhostblk.vhost.message import ProtocolFeature
from vhostblk.virtio.blk import RequestType, Status
from vhostblk.virtio.features import Feature

CAPACITY = 8 << 20
QUEUES = 4


class StorageDaemon:
    """A running qemu-storage-daemon that exports one image of zeroes."""

    def __init__(self, program: str, folder: Path) -> None:
        self.image = folder / "disk"
        self.socket = folder / "socket"
        started = folder / "pid"
        with self.image.open("wb") as image:
            image.truncate(CAPACITY)
        self.process = subprocess.Popen(
            [
                program,
                "--blockdev",
                f"driver=file,node-name=disk,filename={self.image},discard=unmap",
                "--export",
                f"type=vhost-user-blk,id=export,addr.type=unix,addr.path={self.socket},"
                f"node-name=disk,writable=on,num-queues={QUEUES}",
                # Written when all options are done; the socket's file is there before it listens.
                "--pidfile",
                str(started),
            ]
        )
        deadline = time.monotonic() + 10
        while not started.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                pytest.fail("qemu-storage-daemon did not start")
            time.sleep(0.01)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StorageDaemon]:
    running = StorageDaemon(require("qemu-storage-daemon", group="qemu"), tmp_path)
    yield running
    running.stop()


def test_every_kind_of_request(daemon: StorageDaemon) -> None:
    with Client.connect(daemon.socket) as client:
        assert client.capacity == CAPACITY
        assert client.get_id() == "vhost_user_blk"
        client.write(4096, b"\xa5" * 8192)
        client.flush()
        assert daemon.image.read_bytes()[4096:12288] == b"\xa5" * 8192
        assert client.read(0, 16384) == bytes(4096) + b"\xa5" * 8192 + bytes(4096)
        client.write_zeroes((4096, 512))
        client.discard((8192, 4096))
        assert client.read(4096, 4096) == bytes(512) + b"\xa5" * 3584


def test_requests_in_flight_on_all_queues(daemon: StorageDaemon) -> None:
    with Client.connect(daemon.socket, queues=QUEUES, queue_size=64) as client:
        pending = [
            client.submit(RequestType.OUT, n * 512, out=bytes([n]) * 512, queue=n % QUEUES)
            for n in range(64)
        ]
        finished = client.wait(pending)
        assert sorted(map(id, finished)) == sorted(map(id, pending))
        assert client.read(0, 64 * 512) == b"".join(bytes([n]) * 512 for n in range(64))


@pytest.mark.parametrize("kind", ["memfd", "posix"])
@pytest.mark.parametrize("one_file", [False, True])
@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize(
    "features", [0, Feature.VIRTIO_F_EVENT_IDX, Feature.VIRTIO_F_INDIRECT_DESC]
)
def test_verified_workload_with_all_ways_to_share_memory(
    daemon: StorageDaemon, kind: Kind, one_file: bool, one_by_one: bool, features: int
) -> None:
    ring = Feature.VIRTIO_F_EVENT_IDX | Feature.VIRTIO_F_INDIRECT_DESC
    # Mapping is told apart from adding regions by whether memory slots are negotiated.
    protocol = ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG
    if one_by_one:
        protocol |= ProtocolFeature.CONFIGURE_MEM_SLOTS
    with Client.connect(
        daemon.socket,
        queues=2,
        features=FEATURES & ~ring | features,
        protocol_features=protocol,
        memory=SharedMemory([4 << 20] * 3, kind=kind, one_file=one_file, spread=True),
    ) as client:
        assert client.control.features & ring == features
        workload = Workload(client, seed=features, span=(1 << 20, 1 << 20), depth=8)
        counts = workload.run(300)
        workload.verify()
        assert counts.compared > 256 << 10


def test_client_without_acknowledgements_and_protocol_features(daemon: StorageDaemon) -> None:
    with Client.connect(
        daemon.socket,
        features=FEATURES & ~Feature.VHOST_USER_F_PROTOCOL_FEATURES,
        protocol_features=ProtocolFeature.CONFIG,
    ) as client:
        client.write(0, b"x" * 512)
        assert client.read(0, 512) == b"x" * 512


def test_queue_stops_where_it_is_and_starts_again_there(daemon: StorageDaemon) -> None:
    with Client.connect(daemon.socket, queues=2) as client:
        client.write(0, b"1" * 512)
        client.write(512, b"2" * 512)
        assert client.stop_queue(0) == 2
        client.write(1024, b"3" * 512, queue=1)
        client.start_queue(0)
        assert client.read(0, 1536) == b"1" * 512 + b"2" * 512 + b"3" * 512
        assert client.stop_queue(0) == 3


def test_cache_mode_can_be_chosen(daemon: StorageDaemon) -> None:
    with Client.connect(daemon.socket) as client:
        for mode in (True, False):
            client.set_writeback(mode)
            assert client.read_config().writeback == mode


def test_failed_requests_are_os_errors(daemon: StorageDaemon) -> None:
    with Client.connect(daemon.socket, strict=False, features=FEATURES) as client:
        with pytest.raises(BlockError) as caught:
            client.read(CAPACITY, 512)
        assert caught.value.errno == errno.EIO
        pending = client.submit(99)
        client.wait([pending])
        assert pending.status == Status.UNSUPP
        with pytest.raises(BlockError) as caught:
            client.discard((0, 512), (1024, 512))
        assert caught.value.errno == errno.EOPNOTSUPP


def test_strict_client_refuses_what_a_driver_must_not_ask(daemon: StorageDaemon) -> None:
    used = FEATURES & ~Feature.VIRTIO_BLK_F_DISCARD
    with Client.connect(daemon.socket, features=used) as client:
        for refused in (
            lambda: client.read(1, 512),
            lambda: client.read(0, 513),
            lambda: client.read(CAPACITY - 512, 1024),
            lambda: client.discard((0, 512)),
            lambda: client.submit(99),
        ):
            with pytest.raises(StateError):
                refused()
        assert client.queues[0].driver.in_flight == 0
    with pytest.raises(StateError, match="has 4"):
        Client.connect(daemon.socket, queues=5)


def test_death_of_the_back_end_ends_a_wait_at_once(daemon: StorageDaemon) -> None:
    with Client.connect(daemon.socket, timeout=60) as client:
        client.write(0, b"x" * 512)
        daemon.process.send_signal(signal.SIGSTOP)
        os.waitpid(daemon.process.pid, os.WUNTRACED)  # all its threads: the request stays in flight
        pending = client.submit(RequestType.IN, 0, room=512)
        with pytest.raises(TimeoutError):
            client.wait([pending], 0.05)
        daemon.stop()
        with pytest.raises(SessionError, match="1 requests in flight"):
            client.wait([pending])
        client.abandon()


def test_client_that_vanishes_with_requests_in_flight_lets_the_next_one_in(
    daemon: StorageDaemon,
) -> None:
    for turn in range(5):
        client = Client.connect(daemon.socket)
        client.write(0, bytes([turn]) * 512)
        for _ in range(8):
            client.submit(RequestType.IN, 0, room=4096, notify=False)
        client.abandon()
        with pytest.raises(StateError):
            client.wait_until(lambda: False)
        client.close()
    with Client.connect(daemon.socket) as client:
        assert client.read(0, 512) == bytes([4]) * 512


def test_raw_message_reaches_the_back_end(daemon: StorageDaemon) -> None:
    """It ends the connection over a request that does not exist, and is there for the next one."""
    with Client.connect(daemon.socket) as client:
        assert client.control.is_alive()
        client.control.send_raw(200, b"what?")
        assert not client.control.is_alive()
        client.abandon()
    with Client.connect(daemon.socket) as client:
        assert client.control.is_alive()


def test_raw_descriptors_reach_the_back_end(daemon: StorageDaemon) -> None:
    """A chain that is a loop breaks its device; nothing of it is ever completed."""
    with Client.connect(daemon.socket) as client:
        driver = split_ring(client)
        driver.write_descriptor(0, driver.gpa, 1, 1, 0)
        driver.write_avail(0, 0)
        driver.write_avail_idx(1)
        client.queues[0].kick()
        with pytest.raises(SessionError):
            client.wait_until(lambda: False)
        client.abandon()


def test_clients_leave_nothing_behind(daemon: StorageDaemon) -> None:
    before = left_behind()
    for kind in ("memfd", "posix"):
        memory = SharedMemory([1 << 20] * 2, kind=kind)
        with Client.connect(daemon.socket, queues=3, memory=memory) as client:
            client.read(0, 512)
            assert left_behind() > before
    client = Client.connect(daemon.socket)
    client.submit(RequestType.OUT, 0, out=bytes(512), notify=False)
    client.abandon()
    client.close()
    with pytest.raises(StateError):
        Client.connect(daemon.socket, queues=QUEUES + 1)
    assert left_behind() == before


def test_memory_is_added_and_removed_while_a_queue_runs(daemon: StorageDaemon) -> None:
    with Client.connect(daemon.socket, memory=SharedMemory([1 << 20])) as client:
        client.write(0, b"first" + bytes(507))
        region = client.add_memory(4 << 20)
        client.write(0, b"big" * (1 << 19), queue=0)
        assert client.read(0, 512) == b"big" * 170 + b"bi"
        client.remove_memory(region)
        with pytest.raises(StateError):
            client.read(0, 3 << 19)
        assert client.read(0, 512) == b"big" * 170 + b"bi"


def test_segments_are_encoded_in_sectors() -> None:
    assert segments([(512, 1024)], unmap=True).hex() == "01000000000000000200000001000000"
