"""The Python data path where a daemon cannot show it; the rest is in tests/contract."""

from __future__ import annotations

import asyncio
import logging
import time

from tests.rings import BASE, RingPair
from tests.unit.block.fakes import ArrayNode
from vhostblk.block.backend import BlockBackend
from vhostblk.export.blk_device import BlkDevice
from vhostblk.export.error_log import ErrorLog
from vhostblk.export.python_path import PythonDataPath
from vhostblk.export.python_queue import POLL_INTERVAL
from vhostblk.export.stats_page import StatsPage
from vhostblk.vhost.vring import VringSnapshot


class NoEvents:
    def queue_broken(self, index: int, reason: str) -> None:
        raise AssertionError(reason)

    def queue_lost(self, reason: str) -> None:
        raise AssertionError(reason)

    def memory_faulted(self) -> None:
        raise AssertionError

    def log_lost(self) -> None:
        raise AssertionError


def test_queue_without_a_kick_is_not_looked_at_more_often_for_being_enabled_often() -> None:
    async def everything() -> None:
        backend = BlockBackend(ArrayNode(), "test", writable=True)
        device = BlkDevice(
            backend,
            serial="",
            num_queues=1,
            max_segments=1,
            logical_block_size=None,
            errors=ErrorLog(logging.LoggerAdapter(logging.getLogger(__name__))),
        )
        page = StatsPage.private("test", 1)
        path = PythonDataPath(device, NoEvents(), page)
        ring = RingPair()
        path._memory = ring.memory  # type: ignore[assignment]
        driver = ring.driver
        offsets = (driver.desc_offset, driver.avail_offset, driver.used_offset)
        desc, avail, used = (BASE + at for at in offsets)
        await path.start_queue(VringSnapshot(0, 8, 0, desc, avail, used, None, None, None, True), 0)
        queue = path._queues[0]
        looks = 0
        enough = asyncio.Event()
        look = queue._process

        def counted() -> None:
            nonlocal looks
            looks += 1
            if looks == 100:
                enough.set()
            look()

        queue._process = counted  # type: ignore[method-assign]
        for _ in range(50):
            await path.enable_queue(0, False)
            await path.enable_queue(0, True)
            await asyncio.sleep(0)
        looks, began = 0, time.monotonic()
        enough.clear()
        await enough.wait()
        assert time.monotonic() - began > 90 * POLL_INTERVAL
        await path.stop_queue(0)
        await backend.close()
        page.close()

    asyncio.run(everything())
