"""What every data path owes a driver: requests of all types, in any framing, on every kind of disk.

VIRTIO 1.2 §5.2.6, against a daemon in a process of its own. The engine and the Python reference are held to the same
tests; rings and notifications are in test_data_path_rings.py.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.daemons import ALL_PATHS, CAPACITY, SERIAL, Disks, eventually, split_ring
from vhostblk.client.client import FEATURES, Client, segments
from vhostblk.client.queue import Framing, whole
from vhostblk.client.shared_memory import SharedMemory
from vhostblk.client.workload import Workload
from vhostblk.errors import BlockError, PeerError
from vhostblk.testing.plugin import DaemonStarter
from vhostblk.virtio.blk import CONFIG_SIZE, SECTOR, BlkConfig, RequestType, Status
from vhostblk.virtio.driver import Buffer
from vhostblk.virtio.features import Feature
from vhostblk.virtio.split import DESC_F_INDIRECT, DESC_F_NEXT

pytestmark = ALL_PATHS

DATA = random.Random(1).randbytes(64 << 10)


# ---------------------------------------------------------------- framing


def pieces_of(size: int) -> Framing:
    """Descriptors of `size` bytes each."""

    def cut(length: int) -> Sequence[int]:
        return [size] * (length // size) + ([length % size] if length % size else [])

    return cut


def cut_at(*borders: int) -> Framing:
    """Descriptors that end at these bytes, as far as there are so many."""

    def cut(length: int) -> Sequence[int]:
        edges = [0, *sorted({min(border, length) for border in borders}), length]
        return [b - a for a, b in itertools.pairwise(edges) if b > a]

    return cut


def with_holes(length: int) -> Sequence[int]:
    """Descriptors of no bytes between the others; the last one is not empty."""
    return [0, length - 1, 0, 0, 1]


FRAMINGS: dict[str, Framing | None] = {
    "as Linux does it": None,
    "status beside the data": whole,
    "header split": cut_at(1, 8, 15),
    "data beside half of the header": cut_at(9),
    "sectors split": cut_at(16, 17, 511, 512, 513, 1000),
    "bytes": pieces_of(1),
    "empty descriptors": with_holes,
    "odd pieces": pieces_of(37),
}


def run_framed(
    client: Client,
    framing: Framing | None,
    kind: RequestType,
    offset: int = 0,
    *,
    out: bytes = b"",
    room: int = 0,
) -> bytes:
    pending = client.submit(kind, offset, out=out, room=room, framing=framing)
    client.wait([pending])
    content = pending.result()
    assert pending.written == room + 1
    return content


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("export", ["disk", "direct"])
def test_every_request_works_in_every_framing(disks: Disks, export: str, indirect: bool) -> None:
    features = FEATURES if indirect else FEATURES & ~Feature.VIRTIO_F_INDIRECT_DESC
    chance = random.Random(2)
    with disks.connect(export, features=features, queue_size=2048) as client:
        for number, (name, framing) in enumerate(FRAMINGS.items()):
            if indirect and name == "bytes":
                continue  # 529 descriptors; the client's tables have 128
            run = partial(run_framed, client, framing)
            offset = number * (64 << 10)
            data = chance.randbytes(2 * SECTOR)
            client.write(offset, DATA[:8192])
            run(RequestType.OUT, offset + SECTOR, out=data)
            expected = DATA[:SECTOR] + data + DATA[3 * SECTOR : 4096]
            assert run(RequestType.IN, offset, room=1024) == expected[:1024], name
            run(RequestType.FLUSH)
            assert run(RequestType.GET_ID, room=20) == SERIAL.encode().ljust(20, b"\0"), name
            zero = segments([(offset, SECTOR), (offset + 4096, 4096)])
            run(RequestType.WRITE_ZEROES, out=zero)
            run(RequestType.DISCARD, out=segments([(offset + 8192, 4096)]))
            assert client.read(offset, 8192) == bytes(SECTOR) + expected[SECTOR:] + bytes(4096)


def test_a_request_may_be_longer_than_one_region_and_one_table(disks: Disks) -> None:
    memory = SharedMemory([4 << 20] * 4, gap=0, spread=True)
    with disks.connect(memory=memory) as client:
        data = random.Random(3).randbytes(5 << 20)  # crosses a border wherever it is
        client.write(1 << 20, data)
        assert client.read(1 << 20, len(data)) == data


def test_direct_descriptors_may_come_before_an_indirect_one(disks: Disks) -> None:
    # VIRTIO 1.2 §2.7.5.3.2: a chain may end in a descriptor with INDIRECT, after others with NEXT.
    with disks.connect() as client:
        client.write(0, DATA[:SECTOR])
        memory, driver = client.memory, split_ring(client)
        room = memory.allocate(4096)
        memory.write(room.gpa, (0).to_bytes(16, "little"))
        memory.write(room.gpa + 16, bytes(SECTOR) + b"\xff")
        table, view = driver.table(9)
        _descriptors(view, [Buffer(room.gpa + 16, SECTOR), Buffer(room.gpa + 16 + SECTOR, 1)])
        view.release()
        driver.write_descriptor(8, room.gpa, 16, DESC_F_NEXT, 9)
        driver.write_descriptor(9, table, 32, DESC_F_INDIRECT)
        used = driver.used_idx
        driver.write_avail(driver.avail_idx, 8)
        driver.write_avail_idx(driver.avail_idx + 1)
        client.queues[0].kick()
        status = Buffer(room.gpa + 16 + SECTOR, 1)
        eventually(lambda: memory.read(status) != b"\xff", "the status of the request")
        assert memory.read(status) == b"\0"
        assert memory.read(Buffer(room.gpa + 16, SECTOR)) == DATA[:SECTOR]
        eventually(lambda: _used_idx(client) == used + 1, "the used ring")


def _descriptors(table: memoryview, writable: Sequence[Buffer]) -> None:
    for i, (gpa, length) in enumerate(writable):
        last = i + 1 == len(writable)
        entry = gpa.to_bytes(8, "little") + length.to_bytes(4, "little")
        flags = 2 if last else 2 | DESC_F_NEXT
        table[16 * i : 16 * i + 16] = entry + bytes([flags, 0, 0 if last else i + 1, 0])


def _used_idx(client: Client) -> int:
    driver = client.queues[0].driver
    used = Buffer(driver.gpa + driver.used_offset + 2, 2)
    return int.from_bytes(client.memory.read(used), "little")


# ---------------------------------------------------------------- requests that are refused


def check_status(
    client: Client, status: Status, kind: int, offset: int = 0, *, out: bytes = b"", room: int = 0
) -> None:
    pending = client.submit(kind, offset, out=out, room=room)
    client.wait([pending])
    assert (pending.status, pending.written) == (status, 1)


END = CAPACITY // SECTOR
LAST = 2**64 - 1


def raw_segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    return (
        sector.to_bytes(8, "little") + sectors.to_bytes(4, "little") + flags.to_bytes(4, "little")
    )


REFUSED: dict[str, tuple[Status, int, int, bytes, int]] = {
    "type that does not exist": (Status.UNSUPP, 77, 0, b"", 0),
    "type of which nothing was offered": (Status.UNSUPP, RequestType.SECURE_ERASE, 0, b"", 0),
    "largest type": (Status.UNSUPP, 2**32 - 1, 0, b"", 0),
    "read half a sector": (Status.IOERR, RequestType.IN, 0, b"", 100),
    "read across the end": (Status.IOERR, RequestType.IN, END - 1, b"", 1024),
    "read behind the end": (Status.IOERR, RequestType.IN, END, b"", 512),
    "read at the last sector there can be": (Status.IOERR, RequestType.IN, LAST, b"", 512),
    "read where bytes overflow to 0": (Status.IOERR, RequestType.IN, 2**55, b"", 512),
    "write half a sector": (Status.IOERR, RequestType.OUT, 0, b"x" * 513, 0),
    "write across the end": (Status.IOERR, RequestType.OUT, END - 1, bytes(1024), 0),
    "write where bytes overflow to 0": (Status.IOERR, RequestType.OUT, 2**55, bytes(512), 0),
    "discard nothing": (Status.IOERR, RequestType.DISCARD, 0, b"", 0),
    "discard with half a segment": (Status.IOERR, RequestType.DISCARD, 0, bytes(24), 0),
    "discard too many segments": (Status.UNSUPP, RequestType.DISCARD, 0, bytes(16 * 33), 0),
    "discard with unmap": (Status.UNSUPP, RequestType.DISCARD, 0, raw_segment(0, 8, 1), 0),
    "discard with a reserved flag": (
        Status.UNSUPP,
        RequestType.DISCARD,
        0,
        raw_segment(0, 8, 4),
        0,
    ),
    "discard across the end": (Status.IOERR, RequestType.DISCARD, 0, raw_segment(END - 1, 2), 0),
    "discard where the sum overflows": (
        Status.IOERR,
        RequestType.DISCARD,
        0,
        raw_segment(LAST, 2),
        0,
    ),
    "zero nothing": (Status.IOERR, RequestType.WRITE_ZEROES, 0, b"", 0),
    "zero with a reserved flag": (
        Status.UNSUPP,
        RequestType.WRITE_ZEROES,
        0,
        raw_segment(0, 8, 2),
        0,
    ),
    "zero across the end": (Status.IOERR, RequestType.WRITE_ZEROES, 0, raw_segment(END, 1), 0),
    "zero as much as there can be": (
        Status.IOERR,
        RequestType.WRITE_ZEROES,
        0,
        raw_segment(0, 2**32 - 1),
        0,
    ),
    "zero a good segment and a bad one": (
        Status.IOERR,
        RequestType.WRITE_ZEROES,
        0,
        raw_segment(0, 8) + raw_segment(END, 8),
        0,
    ),
}


def test_refused_requests_change_nothing_and_cost_nothing_else(disks: Disks) -> None:
    with disks.connect(strict=False) as client:
        client.write(0, DATA[:8192])
        client.write(CAPACITY - 4096, DATA[:4096])
        for status, kind, sector, out, room in REFUSED.values():
            check_status(client, status, kind, sector * SECTOR, out=out, room=room)
        assert client.read(0, 8192) == DATA[:8192]
        assert client.read(CAPACITY - 4096, 4096) == DATA[:4096]


def is_written(memory: SharedMemory, status: Buffer) -> bool:
    return memory.read(status) != b"\xff"


def test_a_header_that_is_too_short_is_answered(disks: Disks) -> None:
    with disks.connect() as client:
        memory, queue = client.memory, client.queues[0]
        room = memory.allocate(4096)
        for length in (1, 15):
            memory.write(room.gpa, bytes(100) + b"\xff")
            queue.driver.add([Buffer(room.gpa, length)], [Buffer(room.gpa + 100, 1)])
            queue.notify()
            status = Buffer(room.gpa + 100, 1)
            eventually(partial(is_written, memory, status), "the status")
            assert memory.read(status) == bytes([Status.IOERR])
        # Without any header there is a status byte all the same.
        memory.write(room.gpa + 100, b"\xff")
        queue.driver.add([], [Buffer(room.gpa + 100, 1)])
        queue.notify()
        eventually(lambda: memory.read(Buffer(room.gpa + 100, 1)) == b"\x01", "the status")
        assert client.get_id() == SERIAL


def test_a_request_without_data_moves_none(disks: Disks) -> None:
    with disks.connect(strict=False) as client:
        check_status(client, Status.OK, RequestType.IN)
        check_status(client, Status.OK, RequestType.OUT)
        check_status(client, Status.OK, RequestType.GET_ID)
        check_status(client, Status.OK, RequestType.IN, CAPACITY)
        check_status(client, Status.IOERR, RequestType.IN, CAPACITY + SECTOR)


def test_get_id_gives_at_most_20_bytes_and_at_most_what_fits(disks: Disks) -> None:
    with disks.connect() as client:
        for room, expected in ((4, b"cont"), (20, b"contract"), (64, b"contract")):
            pending = client.submit(RequestType.GET_ID, room=room)
            client.wait([pending])
            assert pending.result()[: min(room, 20)].rstrip(b"\0") == expected
            assert pending.written == min(room, 20) + 1


def test_read_only_disks_refuse_to_be_changed(disks: Disks) -> None:
    with disks.connect("read-only", strict=False) as client:
        assert client.offered & Feature.VIRTIO_BLK_F_RO
        assert not client.offered & Feature.VIRTIO_BLK_F_DISCARD
        assert not client.offered & Feature.VIRTIO_BLK_F_WRITE_ZEROES
        for kind in (RequestType.OUT, RequestType.DISCARD, RequestType.WRITE_ZEROES):
            check_status(client, Status.IOERR, kind, out=segments([(0, 4096)]) * 32)
        client.flush()
        assert client.read(0, 4096) == bytes(4096)


# ---------------------------------------------------------------- discard and zeroes


@pytest.mark.parametrize("export", ["disk", "direct", "memory"])
def test_segments_are_done_in_order_and_nothing_beside_them(disks: Disks, export: str) -> None:
    with disks.connect(export) as client:
        limit = client.config.max_write_zeroes_seg
        assert (limit, client.config.max_discard_seg) == (32, 32)
        client.write(0, DATA)
        ranges = [(i * 1536, 512 if i % 2 else 0) for i in range(limit)]
        client.write_zeroes(*ranges)
        expected = bytearray(DATA)
        for offset, length in ranges:
            expected[offset : offset + length] = bytes(length)
        assert client.read(0, len(DATA)) == expected
        client.discard(*((i * 8192, 4096) for i in range(4)))
        client.write_zeroes((40960, 8192), unmap=True)
        expected[40960:49152] = bytes(8192)
        found = client.read(0, len(DATA))
        for i in range(8):  # after a discard anything may be read, but only there
            if i % 2 or i >= 8:
                assert found[i * 4096 : i * 4096 + 4096] == expected[i * 4096 : i * 4096 + 4096]
        assert found[32768:] == expected[32768:]


def test_unmap_gives_blocks_back_and_zeroing_without_it_keeps_them(disks: Disks) -> None:
    with disks.connect() as client:

        def blocks() -> int:
            client.flush()
            return os.stat(disks.image("disk")).st_blocks

        start, length = 8 << 20, 1 << 20
        client.discard((start, length))
        before = blocks()
        client.write(start, DATA * 16)
        written = blocks()
        assert written >= before + length // 512
        client.write_zeroes((start, length))
        assert blocks() >= written
        assert client.read(start, length) == bytes(length)
        client.write_zeroes((start, length), unmap=True)
        assert blocks() <= written - length // 512
        client.write(start, DATA * 16)
        client.discard((start, length))
        assert blocks() <= written - length // 512
        assert client.read(start, length) == bytes(length)


# ---------------------------------------------------------------- what is offered


def test_configuration_space_can_be_read_in_any_pieces(disks: Disks) -> None:
    with disks.connect() as client:
        control = client.control
        everything = control.get_config(0, CONFIG_SIZE)
        for offset in range(CONFIG_SIZE):
            rest = CONFIG_SIZE - offset
            for length in {1, 2, 4, 8, 20, rest} & set(range(1, rest + 1)):
                assert control.get_config(offset, length) == everything[offset : offset + length]
        for offset, length in ((CONFIG_SIZE, 1), (0, CONFIG_SIZE + 1), (2**32 - 1, 1)):
            with pytest.raises(PeerError):
                control.get_config(offset, length)
        assert control.is_alive()


def test_limits_that_are_offered_are_true(disks: Disks) -> None:
    with disks.connect(queue_size=256) as client:
        config = client.config
        assert config.capacity * SECTOR == CAPACITY
        assert config.num_queues == client.control.queue_count() == 8
        assert not client.offered & Feature.VIRTIO_BLK_F_SIZE_MAX
        assert config.seg_max >= 126
        # seg_max segments, in a chain of that and two more descriptors
        cut: Framing = cut_at(16, *range(16 + 512, 16 + 512 * config.seg_max, 512))
        data = DATA[: 512 * config.seg_max]
        for framing, indirect in ((cut, True), (cut, False)):
            pending = client.submit(RequestType.OUT, out=data, framing=framing, indirect=indirect)
            client.wait([pending])
            pending.result()
            assert client.read(0, len(data)) == data
        assert config.max_discard_sectors * SECTOR >= CAPACITY
        assert config.max_write_zeroes_sectors * SECTOR >= CAPACITY
        client.write_zeroes((0, CAPACITY))
        client.discard((0, CAPACITY))


def test_4096_byte_blocks_are_told_and_smaller_requests_served(disks: Disks) -> None:
    with disks.connect("big-blocks") as client:
        config = client.config
        assert config.blk_size == 4096
        assert config.capacity * SECTOR == CAPACITY
        assert config.discard_sector_alignment >= 8
        client.write(0, DATA[:12288])
        client.write(4096 + 512, b"#" * 512)
        expected = DATA[: 4096 + 512] + b"#" * 512 + DATA[4096 + 1024 : 12288]
        assert client.read(0, 12288) == expected
        assert client.read(4096 + 512, 512) == b"#" * 512


def test_unaligned_buffers_and_offsets_work_without_the_page_cache(disks: Disks) -> None:
    with disks.connect("direct", alignment=16) as client:
        client.write(0, DATA)
        for offset, length in ((512, 512), (512, 4096), (4096, 4096), (7680, 1536)):
            for framing in (None, cut_at(16 + 3, 16 + 515), whole):
                data = random.Random(offset + length).randbytes(length)
                pending = client.submit(RequestType.OUT, offset, out=data, framing=framing)
                client.wait([pending])
                pending.result()
                read = client.submit(RequestType.IN, offset, room=length, framing=framing)
                client.wait([read])
                assert read.result() == data


# ---------------------------------------------------------------- the size changes


def begin_at(disks: Disks, size: int) -> None:
    """Return when `grows` has this size, and whoever connects from now on will not be told of it."""
    disks.resize(size)
    with disks.connect("grows") as client:
        eventually(lambda: client.read_config().capacity * SECTOR == size, "the old size")


def wait_for_size(client: Client, size: int) -> None:
    """Return when a message has said that the size has changed, and it is this one.

    The configuration is read after the message, so it may be of a later change than the message; whose own message is
    still to come then, and tells nothing new.
    """
    eventually(lambda: client.wait_config_change().capacity * SECTOR == size, f"{size} bytes")


def test_a_running_guest_hears_that_its_disk_grew_and_uses_it(disks: Disks) -> None:
    begin_at(disks, CAPACITY)
    with disks.connect("grows", strict=False) as client:
        check_status(client, Status.IOERR, RequestType.IN, CAPACITY, room=512)
        disks.resize(2 * CAPACITY)
        wait_for_size(client, 2 * CAPACITY)
        for offset in range(CAPACITY, 2 * CAPACITY, 1 << 20):
            assert client.read(offset, 1 << 20) == bytes(1 << 20)
        client.write(2 * CAPACITY - 512, DATA[:512])
        assert client.read(2 * CAPACITY - 512, 512) == DATA[:512]
        disks.resize(CAPACITY)
        wait_for_size(client, CAPACITY)
        check_status(client, Status.IOERR, RequestType.IN, CAPACITY, room=512)
        check_status(client, Status.IOERR, RequestType.OUT, CAPACITY, out=bytes(512))
        client.write(CAPACITY - 512, DATA[:512])
        assert os.stat(disks.image("grows")).st_size == CAPACITY


def test_a_size_that_changed_while_no_ring_ran_is_told_when_one_does(disks: Disks) -> None:
    begin_at(disks, CAPACITY)
    with disks.connect("grows") as client:
        client.stop_queue(0)
        disks.resize(CAPACITY + 4096)
        eventually(lambda: client.read_config().capacity * SECTOR != CAPACITY, "the new size")
        with pytest.raises(TimeoutError):
            client.wait_config_change(timeout=0.05)
        client.start_queue(0)
        assert client.wait_config_change().capacity * SECTOR == CAPACITY + 4096


def has_size(client: Client, size: int) -> bool:
    return client.read_config().capacity * SECTOR == size


def test_the_last_of_many_changes_of_size_is_noticed(disks: Disks) -> None:
    # A signal that comes while the size is being looked at may be about a later one.
    disks.max_lines = 1000
    with disks.connect("grows") as client:
        for i in range(60):
            for j in range(1 + i % 4):
                size = CAPACITY + (i % 7 + j) * 4096
                disks.resize(size)
            eventually(partial(has_size, client, size), "the last")


# ---------------------------------------------------------------- everything at once


MEMORIES: dict[str, Callable[[], SharedMemory]] = {
    "one region": lambda: SharedMemory([16 << 20]),
    "regions that touch": lambda: SharedMemory([2 << 20] * 8, gap=0, spread=True),
    "regions of one file": lambda: SharedMemory([4 << 20] * 4, one_file=True, spread=True),
    "posix": lambda: SharedMemory([4 << 20] * 4, kind="posix", spread=True),
}


@pytest.mark.parametrize("one_by_one", [True, False], ids=["slots", "table"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_random_workload_reads_what_it_wrote(disks: Disks, memory: str, one_by_one: bool) -> None:
    with disks.connect(
        queues=4, memory=MEMORIES[memory](), memory_one_by_one=one_by_one, alignment=16
    ) as client:
        workload = Workload(client, seed=len(memory) + one_by_one, span=(0, 1 << 20), depth=16)
        workload.run(250)
        workload.verify()


@pytest.mark.parametrize("export", ["direct", "pinned", "big-blocks", "memory", "write-through"])
def test_a_random_workload_on_every_kind_of_disk(disks: Disks, export: str) -> None:
    with disks.connect(export, queues=4, queue_size=64, alignment=512) as client:
        workload = Workload(client, seed=7, span=(512, 1 << 20), depth=24)
        workload.run(300)
        workload.verify()


@pytest.mark.parametrize(
    "without",
    [Feature.VIRTIO_F_EVENT_IDX, Feature.VIRTIO_F_INDIRECT_DESC, Feature.VIRTIO_BLK_F_FLUSH],
    ids=lambda feature: str(feature.name),
)
def test_a_random_workload_without_a_feature(disks: Disks, without: Feature) -> None:
    with disks.connect(queues=2, features=FEATURES & ~without) as client:
        workload = Workload(client, seed=8, span=(0, 1 << 20), depth=24)
        workload.run(200)
        workload.verify()


def test_a_workload_of_four_queues_goes_on_while_others_knock(disks: Disks) -> None:
    disks.max_lines = 200
    done = threading.Event()

    def knock() -> int:
        count = 0
        while not done.wait(0.02):
            os.kill(disks.process.pid, signal.SIGHUP)
            with disks.dial() as sock:
                assert sock.recv(1) == b""  # refused: somebody is there
            with disks.connect("memory") as other:
                assert other.read(0, 512) is not None
            count += 1
        return count

    with disks.connect(queues=4) as client, ThreadPoolExecutor(1) as pool:
        knocking = pool.submit(knock)
        try:
            workload = Workload(client, seed=9, span=(0, 2 << 20), depth=32)
            workload.run(800)
            workload.verify()
        finally:
            done.set()
        assert knocking.result() >= 1


def test_two_engine_threads_share_the_queues_of_one_disk(
    disks: Disks, daemon: DaemonStarter, tmp_path: Path
) -> None:
    image, sock = tmp_path / "image", disks.folder / "two.sock"
    image.write_bytes(bytes(4 << 20))
    path = "python" if disks.kind == "python" else "native"
    words = ("serve", image, "--socket", sock, "--iothreads", "2", "--data-path", path)
    daemon(*words, "--aio", "threads" if disks.kind == "threads" else "io_uring", sockets=[sock])
    with Client.connect(sock, queues=4) as client:
        workload = Workload(client, seed=10, depth=32)
        workload.run(400)
        workload.verify()


def test_one_guest_finds_what_another_wrote_before(disks: Disks) -> None:
    with disks.connect() as client:
        client.write(4096, DATA[:4096])
    with disks.connect() as client:
        assert client.read(4096, 4096) == DATA[:4096]
        client.flush()
    with disks.image("disk").open("rb") as image:
        image.seek(4096)
        assert image.read(4096) == DATA[:4096]


def test_errors_of_the_disk_are_errors_of_the_request(disks: Disks) -> None:
    # The image shrinks behind the daemon's back: short reads, and nobody has said so.
    os.truncate(disks.image("grows"), CAPACITY)
    os.kill(disks.process.pid, signal.SIGHUP)
    with disks.connect("grows") as client:
        eventually(lambda: client.read_config().capacity * SECTOR == CAPACITY, "the size")
        client.write(0, DATA[:4096])
        os.truncate(disks.image("grows"), 1 << 20)
        for _ in range(3):
            with pytest.raises(BlockError) as caught:
                client.read(2 << 20, 4096)
            assert caught.value.errno == errno.EIO
        assert client.read(0, 4096) == DATA[:4096]
        assert disks.said.count("failed") <= 2, disks.said
        os.truncate(disks.image("grows"), CAPACITY)
        assert client.read(2 << 20, 4096) == bytes(4096)


def test_blk_config_layout_is_the_one_on_the_wire(disks: Disks) -> None:
    with disks.connect() as client:
        raw = client.control.get_config(0, CONFIG_SIZE)
        config = BlkConfig.from_bytes(raw)
        assert int.from_bytes(raw[:8], "little") == config.capacity
        assert raw[32] == config.writeback == 1
        assert int.from_bytes(raw[34:36], "little") == 8
