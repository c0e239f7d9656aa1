"""The binding: handles, messages, statistics; what the engine does is tested in C."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from vhostblk import native
from vhostblk.errors import StateError
from vhostblk.export.stats_layout import latency_bound as latency_bound_in_python
from vhostblk.export.stats_layout import latency_bucket
from vhostblk.native import EngineThread, ExtentFlag, Message, MessageType

pytestmark = pytest.mark.skipif(not native.available, reason="the engine is not built")


@dataclass
class Region:
    gpa: int
    uva: int
    size: int
    hva: int


@pytest.fixture
def page() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, 65536) as area:
        yield area


@pytest.fixture
def thread() -> Iterator[EngineThread]:
    thread = EngineThread("test", poll_max_ns=0)
    yield thread
    thread.close()


def message(kind: MessageType, cookie: int, **fields: int) -> bytes:
    order = [
        "flags",
        "queue",
        "cookie",
        "disk",
        "offset",
        "length",
        "pointer",
        "count",
        "result",
        "aux",
    ]
    values = {"cookie": cookie, **fields}
    return native.packed((kind, *(values.get(name, 0) for name in order)))  # type: ignore[arg-type]


def receive(thread: EngineThread) -> list[Message]:
    """All messages up to when there are none; the first is waited for."""
    readable, _, _ = select.select([thread.fd], [], [], 10)
    assert readable
    received: list[Message] = []
    while batch := thread.receive():
        received += batch
    return received


def command(thread: EngineThread, kind: MessageType, **fields: int) -> Message:
    assert thread.send([message(kind, 7, **fields)]) == 1
    (ack,) = receive(thread)
    assert ack[:4] == (MessageType.ACK, 0, fields.get("queue", 0), 7)
    return ack


def test_address_is_that_of_the_first_byte() -> None:
    buffer = bytearray(b"abc")
    assert ctypes.string_at(native.address_of(buffer), 3) == b"abc"
    assert native.address_of(memoryview(buffer)[1:]) == native.address_of(buffer) + 1
    assert ctypes.string_at(native.address_of(b"read-only"), 9) == b"read-only"
    assert native.address_of(b"") == 0


def test_memory_of_overlapping_regions_is_refused(page: mmap.mmap) -> None:
    at = native.address_of(page)
    with pytest.raises(OSError) as error:
        native.Memory([Region(0, 0, 8192, at), Region(4096, 65536, 4096, at + 8192)])
    assert error.value.errno == errno.EINVAL


def test_memory_is_counted_while_a_thread_has_it(page: mmap.mmap, thread: EngineThread) -> None:
    memory = native.Memory([Region(0, 1 << 40, 65536, native.address_of(page))])
    disk = native.Disk(disk_id=1, capacity=1 << 20)
    assert memory.references == 1
    assert not memory.faulted
    command(thread, MessageType.DISK_ATTACH, disk=disk.pointer)
    command(thread, MessageType.MEMORY_SET, disk=disk.pointer, pointer=memory.pointer)
    assert memory.references == 2
    command(thread, MessageType.MEMORY_SET, disk=disk.pointer)
    assert memory.references == 1
    command(thread, MessageType.DISK_DETACH, disk=disk.pointer)
    for handle in (memory, disk):
        handle.close()
        handle.close()


def test_disk_refuses_what_cannot_be_told_to_a_guest() -> None:
    with pytest.raises(ValueError, match="20 bytes"):
        native.Disk(disk_id=1, capacity=0, serial=b"x" * 21)
    with pytest.raises(OSError, match="disk of 100 bytes"):
        native.Disk(disk_id=1, capacity=100)


def test_messages_keep_their_order_and_their_cookies(thread: EngineThread) -> None:
    sent = [message(MessageType.QUEUE_STOP, n, queue=n % 5) for n in range(3000)]
    assert thread.send(sent) == 3000
    received: list[Message] = []
    while len(received) < 3000:
        received += receive(thread)
    assert [m[3] for m in received] == list(range(3000))
    assert {m[9] for m in received} == {-errno.ENOENT}


def test_thread_that_serves_a_disk_cannot_end(thread: EngineThread) -> None:
    disk = native.Disk(disk_id=1, capacity=0)
    command(thread, MessageType.DISK_ATTACH, disk=disk.pointer)
    with pytest.raises(StateError, match="disks"):
        thread.close()
    command(thread, MessageType.DISK_DETACH, disk=disk.pointer)
    disk.close()


def test_extents_are_checked_by_the_engine(thread: EngineThread) -> None:
    disk = native.Disk(disk_id=1, capacity=1 << 20)
    command(thread, MessageType.DISK_ATTACH, disk=disk.pointer)
    good = native.extents([(0, 4096, 0, 0, ExtentFlag.READ, 512, 1), (8192, 512, 0, 0, 1, 1, 1)])
    bad = native.extents([(0, 4096, 0, 0, ExtentFlag.READ, 3, 1)])
    for entries, result in ((good, 0), (bad, -errno.EINVAL)):
        fields = {"disk": disk.pointer, "pointer": entries.pointer, "count": entries.count}
        assert command(thread, MessageType.MAP, **fields)[9] == result
    assert command(thread, MessageType.REVOKE, disk=disk.pointer, length=1 << 63)[9] == 0
    command(thread, MessageType.DISK_DETACH, disk=disk.pointer)
    disk.close()


def test_latency_buckets_of_python_are_those_of_the_engine() -> None:
    for bucket in range(native.LATENCY_BUCKETS):
        bound = native.latency_bound(bucket)
        assert bound == latency_bound_in_python(bucket)
        assert latency_bucket(bound) == bucket


def test_views_and_segments_are_those_of_the_vector(page: mmap.mmap) -> None:
    at = native.address_of(page)
    page[0:32] = b"".join(n.to_bytes(8, sys.byteorder) for n in (at + 4096, 3, at + 8192, 5))
    views = native.iov_views(at, 2, 8)
    assert [len(view) for view in views] == [3, 5]
    views[1][:] = b"hello"
    assert page[8192:8197] == b"hello"
    assert native.iov_views(0, 0, 0) == []
    (whole,) = native.iov_views(at + 8192, 1, 5)
    assert bytes(whole) == b"hello"
    page[0:48] = b"".join(n.to_bytes(8, sys.byteorder) for n in (512, 1024, 1, 0, 512, 0))
    assert native.segments(at, 2) == [(512, 1024, True), (0, 512, False)]
    assert native.segments(0, 0) == []
    del views, whole


def test_without_the_extension_it_says_so(tmp_path: os.PathLike[str]) -> None:
    code = """
import sys
import tempfile
sys.modules["vhostblk.native._engine"] = None
from vhostblk import native
assert not native.available
assert native.address_of(bytearray(1)) > 0
assert native.MessageType.ACK == 64
try:
    native.EngineThread()
except native.binding.StateError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "the C engine is not available" in done.stdout


def test_dirty_map_that_nobody_has_marked_is_empty() -> None:
    """What engine threads mark is tested in C, and by what the block layer gets to know."""
    dirty = native.DirtyMap(3 * 4096 + 1, 4096)
    assert dirty.take() == []
    native.DirtyMap(0, 512)
    disk = native.Disk(disk_id=1, capacity=1 << 20)
    disk.set_dirty_map(dirty)
    disk.set_dirty_map(None)
    assert (disk.write_gen, disk.take_highest_write()) == (0, 0)
    disk.close()
