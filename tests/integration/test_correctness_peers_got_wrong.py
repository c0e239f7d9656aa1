"""What other vhost-user-blk back-ends got wrong, each as a regression test by name.

The list is that of the design ("Correctness that peers got wrong"); what needs tracking of requests in flight or packed
rings comes with them. Durability is seen by strace: which system calls a guest's requests become.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemons import BOTH_PATHS, CAPACITY, SERIAL, Disks, eventually
from tests.requirements import require
from vhostblk.client.client import FEATURES, Client
from vhostblk.errors import PeerError, SessionError
from vhostblk.testing.plugin import DaemonStarter
from vhostblk.vhost.message import ProtocolFeature
from vhostblk.virtio.blk import CONFIG_SIZE, SECTOR, WRITEBACK_OFFSET, RequestType, Status
from vhostblk.virtio.driver import Buffer
from vhostblk.virtio.features import Feature

pytestmark = BOTH_PATHS


class Trace:
    """The system calls of a process that write or flush, seen from outside."""

    def __init__(self, pid: int, file: Path) -> None:
        self._file = file
        self._process = subprocess.Popen(
            [
                require("strace"),
                *("-f", "-p", str(pid), "-o", os.fspath(file)),
                *("-e", "trace=pwritev2,pwritev,pwrite64,fdatasync,fsync,sync_file_range"),
            ],
            stderr=subprocess.PIPE,
        )
        assert self._process.stderr is not None
        # It takes one thread after the other, and says so when it has all of them.
        said = self._process.stderr.readline()
        assert b" attached" in said, said

    def calls(self) -> list[str]:
        """Those that have ended so far."""
        return self._file.read_text().splitlines()

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, call)) for call in self.calls())

    def close(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.communicate()


@contextmanager
def served(
    disks: Disks, start: DaemonStarter, folder: Path, *options: str
) -> Iterator[tuple[Path, Callable[[], Trace]]]:
    """A daemon of this test's own whose file I/O is made of system calls: the pool of threads."""
    image, sock = folder / "image", disks.folder / f"own-{time.monotonic_ns()}.sock"
    image.write_bytes(bytes(1 << 20))
    kind = "python" if disks.kind == "python" else "native"
    words = ("serve", image, "--socket", sock, "--aio", "threads", "--data-path", kind)
    process = start(*words, *options, sockets=[sock])
    traces: list[Trace] = []

    def trace() -> Trace:
        traces.append(Trace(process.pid, folder / f"trace{len(traces)}"))
        return traces[-1]

    try:
        yield sock, trace
    finally:
        for each in traces:
            each.close()


DSYNC_WRITE = r"pwritev2\(.*RWF_DSYNC"
FLUSH = r"fdatasync\(|fsync\("


# ---------------------------------------------------------------- the write cache


def test_the_write_cache_that_is_told_is_the_one_there_is(disks: Disks) -> None:
    for export, writeback in (("disk", 1), ("write-through", 0)):
        with disks.connect(export) as client:
            assert client.offered & Feature.VIRTIO_BLK_F_FLUSH
            assert client.offered & Feature.VIRTIO_BLK_F_CONFIG_WCE
            assert client.config.writeback == writeback


def test_a_flush_of_the_guest_reaches_fdatasync_with_default_options(
    disks: Disks, daemon: DaemonStarter, tmp_path: Path
) -> None:
    with served(disks, daemon, tmp_path) as (sock, trace), Client.connect(sock) as client:
        calls = trace()
        client.write(0, b"x" * 4096)
        assert not calls.count(FLUSH)
        assert not calls.count(DSYNC_WRITE)
        for _ in range(3):
            before = calls.count(FLUSH)
            client.write(4096, b"x" * 4096)
            client.flush()
            assert calls.count(FLUSH) > before


def test_writeback_0_makes_every_write_durable_and_writeback_1_ends_that(
    disks: Disks, daemon: DaemonStarter, tmp_path: Path
) -> None:
    with served(disks, daemon, tmp_path) as (sock, trace), Client.connect(sock) as client:
        client.write(0, b"x" * 4096)
        calls = trace()
        client.set_writeback(False)
        # What completed before is durable once the guest hears that its cache is off.
        assert calls.count(FLUSH)
        assert client.read_config().writeback == 0
        for i in range(3):
            before = calls.count(DSYNC_WRITE) + calls.count(FLUSH)
            client.write(i * 4096, b"y" * 4096)
            assert calls.count(DSYNC_WRITE) + calls.count(FLUSH) > before, calls.calls()
        client.set_writeback(True)
        before = calls.count(DSYNC_WRITE) + calls.count(FLUSH)
        client.write(0, b"z" * 4096)
        assert calls.count(DSYNC_WRITE) + calls.count(FLUSH) == before


@pytest.mark.parametrize("kind", ["write", "zeroes", "unaligned write"])
def test_without_flush_negotiated_every_write_is_durable(
    disks: Disks, daemon: DaemonStarter, tmp_path: Path, kind: str
) -> None:
    features = FEATURES & ~Feature.VIRTIO_BLK_F_FLUSH
    with (
        served(disks, daemon, tmp_path) as (sock, trace),
        Client.connect(sock, features=features) as client,
    ):
        calls = trace()
        for i in range(4):
            before = calls.count(DSYNC_WRITE) + calls.count(FLUSH)
            if kind == "zeroes":
                client.write_zeroes((i * 8192, 4096))
            else:
                client.write(i * 8192, b"x" * (4096 if kind == "write" else 512))
            assert calls.count(DSYNC_WRITE) + calls.count(FLUSH) > before, calls.calls()


@pytest.mark.parametrize("cache", ["writethrough", "directsync"])
def test_the_first_write_of_a_write_through_disk_is_durable_too(
    disks: Disks, daemon: DaemonStarter, tmp_path: Path, cache: str
) -> None:
    # QEMU's emulated FUA misses the first write after the opening and after each flush: the
    # generation of writes has to grow before the flush looks at it.
    with (
        served(disks, daemon, tmp_path, "--cache", cache) as (sock, trace),
        Client.connect(sock) as client,
    ):
        calls = trace()
        for i in range(4):
            before = calls.count(DSYNC_WRITE) + calls.count(FLUSH)
            client.write_zeroes((65536 + i * 4096, 4096))
            assert calls.count(DSYNC_WRITE) + calls.count(FLUSH) > before, calls.calls()
            before = calls.count(DSYNC_WRITE) + calls.count(FLUSH)
            client.write(i * 4096, b"x" * 4096)
            assert calls.count(DSYNC_WRITE) + calls.count(FLUSH) > before, calls.calls()
            if i % 2:
                client.flush()


def test_what_the_driver_chose_outlives_the_connection(disks: Disks) -> None:
    with disks.connect() as client:
        client.set_writeback(False)
    with disks.connect() as client:
        assert client.config.writeback == 0
        client.set_writeback(True)
        assert client.read_config().writeback == 1


def test_flushes_are_answered_on_disks_that_need_none(disks: Disks) -> None:
    for export in ("memory", "slow", "read-only", "write-through"):
        with disks.connect(export) as client:
            client.flush()


# ---------------------------------------------------------------- malformed requests


def test_a_malformed_request_with_a_status_byte_is_answered_never_dropped(disks: Disks) -> None:
    with disks.connect(strict=False) as client:
        bad = [
            client.submit(RequestType.IN, CAPACITY, room=512),
            client.submit(RequestType.OUT, 0, out=b"x" * 100),
            client.submit(1234),
            client.submit(RequestType.DISCARD, out=b"x"),
        ]
        client.wait(bad)
        assert {p.status for p in bad} == {Status.IOERR, Status.UNSUPP}
        assert client.get_id() == SERIAL


def test_a_request_without_a_status_byte_breaks_its_queue_and_says_so(disks: Disks) -> None:
    with disks.connect(queues=2) as client:
        queue = client.queues[0]
        header = client.memory.allocate(16)
        client.memory.write(header.gpa, bytes(16))
        queue.driver.add([Buffer(header.gpa, 16)], [])
        queue.notify()
        client.wait_broken(0)
        assert client.get_id(queue=1) == SERIAL


# ---------------------------------------------------------------- features and configuration


def test_no_feature_is_offered_whose_fields_mean_nothing(disks: Disks) -> None:
    with disks.connect() as client:
        config, offered = client.config, client.offered
        assert not offered & Feature.VIRTIO_BLK_F_SIZE_MAX
        assert config.size_max == 0
        assert config.seg_max > 0
        assert config.blk_size in (512, 4096)
        assert config.min_io_size >= 1
        assert config.max_discard_sectors > 0
        assert config.max_discard_seg > 0
        assert config.discard_sector_alignment * SECTOR >= config.blk_size
        assert config.max_write_zeroes_sectors > 0
        assert config.max_write_zeroes_seg > 0
        assert not offered & (Feature.VIRTIO_BLK_F_RO | Feature.VIRTIO_F_RING_RESET)


def test_topology_is_that_of_the_file(disks: Disks) -> None:
    with disks.connect("direct") as client:
        config = client.config
        physical = config.blk_size << config.physical_block_exp
        assert physical % config.blk_size == 0
        assert config.min_io_size * config.blk_size <= 1 << 20
        client.write(0, b"x" * physical)


def test_the_queue_count_offered_is_generous(
    disks: Disks, daemon: DaemonStarter, tmp_path: Path
) -> None:
    with served(disks, daemon, tmp_path) as (sock, _), Client.connect(sock, queues=64) as client:
        assert client.control.queue_count() >= 64
        assert client.config.num_queues >= 64
        pending = [client.submit(RequestType.GET_ID, room=20, queue=i) for i in range(64)]
        client.wait(pending)
        assert {p.status for p in pending} == {Status.OK}


def test_get_config_honours_the_offset_and_answers_with_the_size_that_was_asked(
    disks: Disks,
) -> None:
    with disks.connect() as client:
        everything = client.control.get_config(0, CONFIG_SIZE)
        for offset, size in ((0, 8), (8, 4), (20, 4), (32, 1), (34, 2), (36, 24), (60, 36)):
            assert client.control.get_config(offset, size) == everything[offset : offset + size]


def test_set_config_changes_the_cache_mode_and_nothing_else(disks: Disks) -> None:
    with disks.connect() as client:
        before = client.control.get_config(0, CONFIG_SIZE)
        for offset in (0, 8, 20, 31, 33, 34, 60, 95):
            with pytest.raises(PeerError):
                client.control.set_config(offset, b"\1")
        with pytest.raises(PeerError):
            client.control.set_config(WRITEBACK_OFFSET, b"\2")
        assert client.control.get_config(0, CONFIG_SIZE) == before


# ---------------------------------------------------------------- sessions


def test_features_may_be_set_again_before_the_rings_start(disks: Disks) -> None:
    with disks.connect(queues=2) as client:
        client.reset_device()
        for features in (0, FEATURES & client.offered, client.control.features):
            client.control.set_features(features)
        client.make_queues(2, 128)
        client.start_queue(0, 0)
        client.start_queue(1, 0)
        assert client.get_id(queue=1) == SERIAL


def test_a_resize_without_a_channel_harms_nobody(disks: Disks) -> None:
    # Without SET_BACKEND_REQ_FD others wrote to fd -1, or to fd 0.
    with disks.connect(
        "grows", protocol_features=ProtocolFeature.CONFIG | ProtocolFeature.REPLY_ACK
    ) as client:
        size = os.stat(disks.image("grows")).st_size + 4096
        disks.resize(size)
        eventually(lambda: client.read_config().capacity * SECTOR == size, "the new size")
        assert client.get_id() == SERIAL
    disks.resize(CAPACITY)
    with disks.connect("grows") as client:
        eventually(lambda: client.read_config().capacity * SECTOR == CAPACITY, "the old size")


def test_the_daemon_outlives_its_client_and_serves_the_next_one(disks: Disks) -> None:
    for _ in range(3):
        client = disks.connect()
        client.submit(RequestType.IN, room=4096)
        client.abandon()
        with pytest.raises((SessionError, OSError)):
            client.control.get_config(0, 8)
        client.close()
    with disks.connect() as client:
        assert client.get_id() == SERIAL
