"""A line when a request takes too long, one more when none does, and none in between."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import pytest

from vhostblk.export.stall_watch import StallWatch
from vhostblk.testing.plugin import ExpectedLog

SLOW = r"the disk does not answer: 3 requests in flight, one for \d+\.\d s"
AGAIN = r"the disk answers again, after \d+\.\d s"


class Disk:
    """What a watch looks at."""

    def __init__(self) -> None:
        self.looks = 0
        self.since = 0
        self.is_paused = False

    def look(self) -> tuple[int, int]:
        self.looks += 1
        return 3, self.since

    async def is_seen(self, times: int = 2) -> None:
        wanted = self.looks + times
        while self.looks < wanted:  # noqa: ASYNC110
            await asyncio.sleep(0)


def watch(scene: Callable[[StallWatch, Disk], Awaitable[None]], after: float = 0.004) -> None:
    async def limited() -> None:
        disk = Disk()
        log = logging.LoggerAdapter(logging.getLogger("vhostblk.test"))
        stalls = StallWatch(after, disk.look, lambda: disk.is_paused, log)
        stalls.start()
        async with asyncio.timeout(10):
            await scene(stalls, disk)
        stalls.stop()

    asyncio.run(limited())


@pytest.mark.warns(SLOW, AGAIN)
def test_stall_is_told_of_once_and_so_is_its_end(expect_log: ExpectedLog) -> None:
    async def scene(stalls: StallWatch, disk: Disk) -> None:
        await disk.is_seen()
        assert not expect_log.messages
        disk.since = time.monotonic_ns() - 10_000_000
        await disk.is_seen(5)
        assert len(expect_log.messages) == 1
        disk.since = 0
        await disk.is_seen(5)
        assert len(expect_log.messages) == 2

    watch(scene)


@pytest.mark.warns(SLOW, AGAIN)
def test_end_of_the_front_end_is_the_end_of_its_stall(expect_log: ExpectedLog) -> None:
    async def scene(stalls: StallWatch, disk: Disk) -> None:
        disk.since = 1
        await disk.is_seen()
        disk.since = 0
        stalls.stop()
        assert len(expect_log.messages) == 2
        seen = disk.looks
        stalls.stop()
        assert disk.looks == seen

    watch(scene)


def test_requests_that_are_young_or_wait_for_people_are_not_told_of() -> None:
    async def scene(stalls: StallWatch, disk: Disk) -> None:
        disk.is_paused, disk.since = True, 1
        await disk.is_seen()
        disk.is_paused, disk.since = False, time.monotonic_ns() + 10**12
        await disk.is_seen()

    watch(scene)


def test_watch_may_be_off() -> None:
    async def scene(stalls: StallWatch, disk: Disk) -> None:
        disk.since = 1
        for _ in range(100):
            await asyncio.sleep(0)
        assert not disk.looks

    watch(scene, after=0)
