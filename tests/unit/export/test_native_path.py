"""What the control loop does for the engine, where timing cannot be left to chance."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vhostblk import native
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.node import FlushTarget, HostExtent
from vhostblk.daemon import Daemon, DaemonConfig
from vhostblk.errors import BlockError, ConfigError, PeerError, StateError
from vhostblk.export.export import Export
from vhostblk.export.io_thread import IOThread
from vhostblk.export.native_path import NativeDataPath
from vhostblk.export.options import ExportConfig
from vhostblk.export.python_path import PythonDataPath
from vhostblk.native import Message, MessageType
from vhostblk.testing.plugin import ExpectedLog
from vhostblk.testing.requirements import require
from vhostblk.vhost.mem_table import MemTable
from vhostblk.vhost.payload import MemoryRegion
from vhostblk.vhost.vring import VringSnapshot
from vhostblk.virtio.blk import RequestType, Status

FLUSH = (int(native.MessageType.REQUEST), 0, 0, 1, 0, 0, 0, 0, 0, 0, int(RequestType.FLUSH))


def with_export(
    image: Path, options: str, scenario: Callable[[Export], Awaitable[None]], threads: int = 1
) -> None:
    """An export on a file with threads of the engine, without a socket."""
    require("engine")

    async def everything() -> None:
        graph = BlockGraph()
        node = await graph.add(f"file,node-name=d,filename={image}{options}")
        io_threads = [IOThread(f"test{number}") for number in range(threads)]
        config = ExportConfig(id="e", node_name="d", writable=True)
        export = await Export.open(config, node, io_threads)
        try:
            await scenario(export)
        finally:
            await export.close()
            for thread in io_threads:
                await thread.close()
            await graph.close_all()

    asyncio.run(everything())


class Answers:
    """An engine thread whose answers are looked at instead of sent."""

    def __init__(self, thread: IOThread) -> None:
        self.given: list[int | None] = []
        self.command = thread.command

    def retry(self, cookie: int) -> None:
        self.given.append(None)

    def complete(self, cookie: int, status: int, written: int) -> None:
        self.given.append(status)


async def serve(export: Export, message: Message) -> int | None:
    """What becomes of a request that the engine has passed on: its status, or None if the engine is to do it."""
    path = export._path
    assert isinstance(path, NativeDataPath)
    answers = Answers(path._threads.attached[0])
    await path._serve(answers, message)  # type: ignore[arg-type]
    (answer,) = answers.given
    return answer


def test_flush_that_the_engine_failed_is_known_before_its_message_comes(
    image: Path, monkeypatch: pytest.MonkeyPatch, expect_log: ExpectedLog
) -> None:
    """Another fdatasync would succeed: the kernel has told of the lost pages, and forgotten them."""
    expect_log.expect("flush failed: ", "flush at close failed")

    async def scenario(export: Export) -> None:
        assert await serve(export, FLUSH) is None
        with monkeypatch.context() as patch:
            patch.setattr(native.Disk, "write_gen", 1)
            patch.setattr(native.Disk, "flush_failed", True)
            assert await serve(export, FLUSH) == Status.IOERR
            patch.setattr(native.Disk, "flush_failed", False)
            assert await serve(export, FLUSH) == Status.IOERR
            assert export.device.backend.flush_target() is FlushTarget.ASK
            await export.device.backend.close()

    with_export(image, "", scenario)


def test_without_a_page_cache_a_failed_flush_is_no_verdict(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native.Disk, "flush_failed", True)

    async def scenario(export: Export) -> None:
        assert await serve(export, FLUSH) is None

    with_export(image, ",cache.direct=on", scenario)


def test_nothing_is_durable_with_no_flush_and_everything_again_after_a_revocation(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[bool] = []
    real = native.Disk.set_write_through

    def spy(disk: native.Disk, write_through: bool) -> None:
        said.append(write_through)
        real(disk, write_through)

    monkeypatch.setattr(native.Disk, "set_write_through", spy)

    async def scenario(export: Export) -> None:
        path = export._path
        assert isinstance(path, NativeDataPath)
        await path.set_write_through(True)
        assert said == [True]
        assert await path._fault(path._threads.attached[0], 0, 512, True)
        assert said == [True, False]
        await path.revoke(0, 65536)  # who knows what the graph is going to be
        assert said == [True, False, True]

    with_export(image, ",cache.no-flush=on", scenario)


READ = (int(native.MessageType.REQUEST), 0, 0, 1, 0, 0, 512, 0, 0, 0, int(RequestType.IN))


@pytest.mark.parametrize(
    ("error", "status"),
    [(BlockError(errno.EIO), Status.OK), (ZeroDivisionError("planted"), Status.IOERR)],
    ids=["the disk's", "a bug"],
)
def test_request_that_nobody_can_map_is_answered_all_the_same(
    image: Path, expect_log: ExpectedLog, error: Exception, status: Status
) -> None:
    """One without an answer would keep its queue from ever stopping."""
    if status != Status.OK:
        expect_log.expect("a bug: a request failed")

    async def scenario(export: Export) -> None:
        async def fail(offset: int, length: int) -> list[HostExtent]:
            raise error

        export.device.backend.extents = fail  # type: ignore[method-assign]
        assert await serve(export, READ) == status

    with_export(image, "", scenario)


def test_read_that_fails_is_tried_once_and_decided_about_once(
    image: Path, expect_log: ExpectedLog
) -> None:
    expect_log.expect("read failed: Input/output error")
    tried: list[int] = []

    async def fail(offset: int, iov: IoVec, has_waited: bool = False) -> None:
        tried.append(offset)
        raise BlockError(errno.EIO)

    async def scenario(export: Export) -> None:
        export.device.backend.begin_preadv = fail  # type: ignore[method-assign]
        retried = (READ[0], int(native.RequestFlag.RETRIED), *READ[2:])
        assert await serve(export, retried) == Status.IOERR
        assert tried == [0]

    with_export(image, "", scenario)


# ---------------------------------------------------------------- guest memory there is no room for


@pytest.fixture
def guest() -> Iterator[MemTable]:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 65536)
    empty = MemTable(native.address_of, 8)
    table = empty.replaced([MemoryRegion(0, 65536, 1 << 40, 0)], [fd])
    os.close(fd)
    yield table
    table.close()


def memory_of(path: NativeDataPath | PythonDataPath) -> object:
    return path._queues.memory if isinstance(path, NativeDataPath) else path._memory


def test_memory_that_cannot_be_guarded_is_refused_and_the_old_map_stays(
    image: Path, guest: MemTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A front-end decides how many regions there are: running out of room for them is no bug of ours."""

    def full(_regions: object) -> native.Memory:
        raise OSError(errno.ENOSPC, "guest memory: No space left on device")

    async def scenario(export: Export) -> None:
        for path in (export._path, PythonDataPath(export.device, export, export._page)):
            assert isinstance(path, NativeDataPath | PythonDataPath)
            await path.set_memory(guest)
            before = memory_of(path)
            with monkeypatch.context() as patch:
                patch.setattr(native, "Memory", full)
                with pytest.raises(PeerError, match="too many regions"):
                    await path.set_memory(guest)
            assert memory_of(path) is before
            await path.set_memory(None)

    with_export(image, "", scenario)


def test_thread_without_room_for_memory_takes_the_others_back(
    image: Path, guest: MemTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, int]] = []
    real = IOThread.command

    def command(thread: IOThread, kind: MessageType, **words: Any) -> asyncio.Future[Message]:
        if kind != MessageType.MEMORY_SET:
            return real(thread, kind, **words)
        sent.append((thread.name, words["pointer"]))
        if thread.name == "test1" and len(sent) == 4:
            answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
            answer.set_result((64, 0, 0, 0, 0, 0, 0, 0, 0, -errno.ENOMEM, 0))
            return answer
        return real(thread, kind, **words)

    monkeypatch.setattr(IOThread, "command", command)

    async def scenario(export: Export) -> None:
        path = export._path
        await path.set_memory(guest)
        with pytest.raises(PeerError, match="out of memory"):
            await path.set_memory(guest)
        first = sent[0][1]
        assert sent[1] == ("test1", first)
        assert sent[4:] == [("test0", first)]

    with_export(image, "", scenario, threads=2)


def test_queue_that_is_started_in_a_pause_takes_nothing(
    image: Path, guest: MemTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[bool] = []
    real = native.queue_config

    def spy(**fields: Any) -> native.QueueConfig:
        said.append(fields["enabled"])
        return real(**fields)

    monkeypatch.setattr(native, "queue_config", spy)
    vring = VringSnapshot(0, 8, 0, 0, 4096, 8192, None, None, None, enabled=True)

    async def scenario(export: Export) -> None:
        path = export._path
        for paused in (False, True):
            path.pause(paused)
            with pytest.raises(PeerError):
                await path.start_queue(vring, 0)  # there is no memory
        assert said == [True, False]

    with_export(image, "", scenario)


# ---------------------------------------------------------------- a thread that has no room for a disk


def test_failed_start_on_the_second_thread_leaves_nothing_on_the_first(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread with a disk cannot end: that would be told instead of what went wrong."""
    require("engine")
    real = IOThread.command

    def command(thread: IOThread, kind: MessageType, **words: Any) -> asyncio.Future[Message]:
        if kind != MessageType.DISK_ATTACH or thread.name != "e/1":
            return real(thread, kind, **words)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        answer.set_result((64, 0, 0, 0, 0, 0, 0, 0, 0, -errno.ENOMEM, 0))
        return answer

    monkeypatch.setattr(IOThread, "command", command)
    config = ExportConfig(id="e", node_name="d", socket_path="s", own_threads=2)
    blockdev = {"driver": "file", "node-name": "d", "filename": str(image)}
    daemon = Daemon(DaemonConfig(blockdevs=[blockdev], exports=[config]))
    with pytest.raises(BlockError, match="e/1: Cannot allocate memory"):
        asyncio.run(daemon.run())


def test_thread_that_cannot_end_does_not_hide_what_went_wrong(
    image: Path, monkeypatch: pytest.MonkeyPatch, expect_log: ExpectedLog
) -> None:
    require("engine")
    expect_log.expect("a bug: e/0")
    real = IOThread.close

    async def close(thread: IOThread) -> None:
        await real(thread)
        if thread.name == "e/0":
            raise StateError("planted")

    monkeypatch.setattr(IOThread, "close", close)
    config = ExportConfig(
        id="e", node_name="d", socket_path="/nowhere/s", own_threads=2, writable=True
    )
    blockdev = {"driver": "file", "node-name": "d", "filename": str(image)}
    daemon = Daemon(DaemonConfig(blockdevs=[blockdev], exports=[config]))
    with pytest.raises(ConfigError, match="/nowhere/s"):
        asyncio.run(daemon.run())
