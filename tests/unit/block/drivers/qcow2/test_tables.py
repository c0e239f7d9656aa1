"""Slices of tables in a cache, and where tables are."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from vhostblk.block.drivers.qcow2.cache import TableCache
from vhostblk.block.drivers.qcow2.overlaps import TablePlaces
from vhostblk.block.drivers.qcow2.tables import OFFSETS
from vhostblk.block.iov import IoVec
from vhostblk.errors import ImageError


class SlowFile:
    """Every read waits to be let go, and gives what was there when it began."""

    def __init__(self) -> None:
        self.content = 1
        self.go = asyncio.Event()

    async def preadv(self, offset: int, iov: IoVec) -> None:
        content = self.content
        await self.go.wait()
        iov.copy_from(memoryview(content.to_bytes(8) * (iov.length // 8)))


def test_slice_that_is_forgotten_while_it_is_read_is_read_anew_by_the_next_one() -> None:
    async def scenario() -> None:
        file = SlowFile()
        cache = TableCache(cast(Any, file), OFFSETS, 512, 4096)
        reading = asyncio.create_task(cache.get(1024))
        await asyncio.sleep(0)
        cache.forget(1024)
        file.content = 2  # another table takes its place
        file.go.set()
        await reading
        assert (await cache.get(1024)).table[0] == 2

    asyncio.run(scenario())


def test_places_of_tables_overlap_where_a_cluster_is_touched() -> None:
    places = TablePlaces(12)
    places.add_alone("header", 0)
    places.add_alone("table", 0x5000, 0x2001)
    assert not places.has(0x1000, 0x4000)
    assert places.has(0x4FFF, 2)
    assert places.has(0x7FFF)
    with pytest.raises(ImageError, match="0x7000"):
        places.add_alone("other", 0x7000)
    places.remove(0x5000, 0x2001)
    assert not places.has(0x1000, 0x10000)
