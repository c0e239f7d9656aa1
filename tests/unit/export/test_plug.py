"""Requests that come together are announced to the block layer as such (block layer row B28)."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterator

import pytest

from tests.requirements import require
from tests.rings import BASE, RingPair
from tests.unit.block.fakes import ArrayNode
from tests.unit.export.test_python_path import NoEvents
from vhostblk import native
from vhostblk.block.backend import BlockBackend
from vhostblk.block.iov import IoVec
from vhostblk.export.blk_device import BlkDevice
from vhostblk.export.error_log import ErrorLog
from vhostblk.export.io_thread import IOThread
from vhostblk.export.native_path import NativeDataPath
from vhostblk.export.python_path import PythonDataPath
from vhostblk.export.stats_page import StatsPage
from vhostblk.native import Message, MessageType
from vhostblk.native.binding import IOV
from vhostblk.vhost.vring import VringSnapshot
from vhostblk.virtio.blk import HEADER, RequestType

REQUESTS = 6


class Storage(ArrayNode):
    """Keeps writes back while it is plugged."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[asyncio.Future[None]] = []
        self.submitted: list[int] = []

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        assert self.plugged == 1
        self.kept.append(asyncio.get_running_loop().create_future())
        await self.kept[-1]

    def driver_plug(self) -> None:
        assert not self.kept

    def driver_unplug(self) -> None:
        self.submitted.append(len(self.kept))
        for request in self.kept:
            request.set_result(None)
        self.kept = []


def device_on(storage: Storage) -> BlkDevice:
    return BlkDevice(
        BlockBackend(storage, "test", writable=True),
        serial="",
        num_queues=1,
        max_segments=1,
        logical_block_size=None,
        errors=ErrorLog(logging.LoggerAdapter(logging.getLogger(__name__))),
    )


class Thread:
    """An engine thread that is only told things."""

    io_kind = "threads"
    has_more = True

    def __init__(self) -> None:
        self.completed: list[int] = []
        self.answers: list[bytes] = []
        self.answer = self.answers.append
        self.ends: list[Callable[[], None]] = []
        self.tasks: dict[int, set[asyncio.Task[None]]] = {0: set()}

    def at_end_of_turn(self, function: Callable[[], None]) -> None:
        self.ends.append(function)

    def complete(self, cookie: int, status: int, written: int) -> None:
        assert status == 0
        self.completed.append(cookie)


def test_requests_of_the_engine_that_come_together_are_submitted_together() -> None:
    require("engine")
    data = bytearray(b"x" * 512)
    vector = bytearray(IOV.pack(native.address_of(data), 512))
    table = native.address_of(vector)

    async def everything() -> None:
        storage, thread = Storage(), Thread()
        device = device_on(storage)
        path = NativeDataPath(device, [thread], NoEvents(), StatsPage.private("test", 1))  # type: ignore[list-item]
        for _ in range(2):
            kind = int(RequestType.OUT)
            messages = [
                (int(MessageType.REQUEST), 0, 0, n, 0, 512 * n, 512, table, 1, 0, kind)
                for n in range(REQUESTS)
            ]
            path.engine_requests(thread, iter(messages), math.inf)  # type: ignore[arg-type]
            (end,) = thread.ends
            assert not storage.submitted
            end()
            assert storage.submitted == [REQUESTS]
            assert not storage.plugged
            await asyncio.gather(*thread.tasks[0])
            assert thread.completed == list(range(REQUESTS))
            storage.submitted, thread.ends, thread.completed = [], [], []
        path._disk.close()
        await device.backend.close()

    asyncio.run(everything())


class Batches:
    """An engine with two batches of messages."""

    io_kind = "threads"
    fd = -1
    are_alike = True

    def __init__(self, *_arguments: object, **_options: object) -> None:
        self.batches: list[list[Message]] = [
            [(MessageType.REQUEST, 0, 0, n, 1, 0, 0, 0, 0, 0, 0)] * 3 for n in (1, 2)
        ]

    def receive(self) -> list[Message]:
        return self.batches.pop(0) if self.batches else []


def test_who_asked_for_the_end_of_a_turn_hears_of_it_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []

    class Sink:
        def engine_requests(
            self, thread: IOThread, messages: Iterator[Message], until: float
        ) -> None:
            assert thread.has_more
            if not seen:
                thread.at_end_of_turn(lambda: seen.append("end"))
            seen.extend(f"request {message[3]}" for message in messages)

        def engine_event(self, thread: IOThread, message: Message) -> None:
            raise AssertionError(message)

    async def everything() -> None:
        monkeypatch.setattr(native, "EngineThread", Batches)
        monkeypatch.setattr(asyncio.get_running_loop(), "add_reader", lambda *_: None)
        thread = IOThread("test")
        thread.add_sink(1, Sink())
        thread._receive()
        assert seen == [*["request 1"] * 3, *["request 2"] * 3, "end"]
        thread._receive()
        assert seen.count("end") == 1

    asyncio.run(everything())


def test_requests_of_a_ring_are_submitted_when_it_has_no_more() -> None:
    async def everything() -> None:
        storage, ring = Storage(), RingPair(32)
        device, page = device_on(storage), StatsPage.private("test", 1)
        path = PythonDataPath(device, NoEvents(), page)
        path._memory = ring.memory  # type: ignore[assignment]
        for n in range(REQUESTS):
            header = ring.data(1024 * n, HEADER.size)
            ring.bytes_at(header)[:] = HEADER.pack(RequestType.OUT, 0, n)
            ring.driver.add([header, ring.data(1024 * n + 64, 512)], [ring.data(1024 * n + 16, 1)])
        ring.driver.publish()
        driver = ring.driver
        offsets = (driver.desc_offset, driver.avail_offset, driver.used_offset)
        desc, avail, used = (BASE + at for at in offsets)
        await path.start_queue(
            VringSnapshot(0, 32, 0, desc, avail, used, None, None, None, True), 0
        )
        async with asyncio.timeout(10):
            while len(driver.reap()) < REQUESTS:
                assert storage.submitted in ([], [REQUESTS])
                await asyncio.sleep(0)
        assert storage.submitted[0] == REQUESTS
        await path.stop_queue(0)
        await device.backend.close()
        page.close()

    asyncio.run(everything())
