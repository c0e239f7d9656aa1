"""How the control loop takes turns with what an engine thread says."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator

import pytest

from vhostblk import native
from vhostblk.export.io_thread import IOThread
from vhostblk.native import Message, MessageType

REQUESTS = 300


class Engine:
    """An engine thread that has this many requests to say, in batches, and is readable until they were taken."""

    io_kind = "threads"

    def __init__(self, *_arguments: object, **_options: object) -> None:
        self.fd = os.eventfd(1)
        self.left = list(range(REQUESTS))
        self.sent: list[bytes] = []
        self.are_alike = True

    def receive(self) -> list[Message]:
        batch, self.left = self.left[:64], self.left[64:]
        if not batch:
            os.eventfd_read(self.fd)
        return [(MessageType.REQUEST, 0, 0, n, 1, 0, 0, 0, 0, 0, 0) for n in batch]

    def send(self, messages: list[bytes]) -> int:
        self.sent += messages
        return len(messages)

    def close(self) -> None:
        os.close(self.fd)


class Slow:
    """Keeps the loop busy for a millisecond with every request."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def engine_requests(self, thread: IOThread, messages: Iterator[Message], until: float) -> None:
        for message in messages:
            end = time.monotonic() + 0.001
            while time.monotonic() < end:
                pass
            self.seen.append(message[3])
            thread.complete(message[3], 0, 0)
            if time.monotonic() >= until:
                return

    def engine_event(self, thread: IOThread, message: Message) -> None:
        raise AssertionError(message)


def test_requests_that_take_long_leave_the_loop_to_others_in_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "EngineThread", Engine)

    async def everything() -> None:
        thread, sink = IOThread("test"), Slow()
        thread.add_sink(1, sink)
        most = before = 0
        while len(sink.seen) < REQUESTS:
            await asyncio.sleep(0)
            most = max(most, len(sink.seen) - before)
            before = len(sink.seen)
        assert most <= 4
        assert sink.seen == list(range(REQUESTS))
        await asyncio.sleep(0)
        engine = thread._thread
        assert isinstance(engine, Engine)
        assert engine.sent == [native.packed_completion(n, 0, 0) for n in sink.seen]
        await thread.close()

    asyncio.run(everything())
