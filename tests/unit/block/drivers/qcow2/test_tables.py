"""Slices of tables in a cache, and where tables are."""

from __future__ import annotations

import asyncio
import random
from array import array
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostblk import native
from vhostblk.block.drivers.qcow2.cache import TableCache
from vhostblk.block.drivers.qcow2.overlaps import TablePlaces
from vhostblk.block.drivers.qcow2.tables import OFFSETS, Codec, count_alike
from vhostblk.block.iov import IoVec
from vhostblk.errors import ImageError


class SlowFile:
    """Every read waits to be let go, and gives what was there when it began."""

    def __init__(self) -> None:
        self.content = 1
        self.go = asyncio.Event()

    async def debug_event(self, name: str) -> None:
        pass

    async def preadv(self, offset: int, iov: IoVec) -> None:
        content = self.content
        await self.go.wait()
        iov.copy_from(memoryview(content.to_bytes(8) * (iov.length // 8)))


def test_slice_that_is_forgotten_while_it_is_read_is_read_anew_by_the_next_one() -> None:
    async def scenario() -> None:
        file = SlowFile()
        cache = TableCache(cast(Any, file), OFFSETS, 512, 4096, "l2_load")
        reading = asyncio.create_task(cache.get(1024))
        await asyncio.sleep(0)
        cache.forget(1024)
        file.content = 2  # another table takes its place
        file.go.set()
        await reading
        assert (await cache.get(1024)).table[0] == 2

    asyncio.run(scenario())


@pytest.mark.parametrize("order", range(7))
def test_numbers_of_any_width_are_where_the_specification_says(order: int) -> None:
    codec, bits = Codec(order), 1 << order
    data = random.Random(order).randbytes(64)
    if bits < 8:
        # "Refcount block entry": the least significant bits of a byte are the first.
        expected = [byte >> at & (1 << bits) - 1 for byte in data for at in range(0, 8, bits)]
    else:
        step = bits // 8
        expected = [int.from_bytes(data[at : at + step]) for at in range(0, 64, step)]
    table = codec.decode(data)
    assert list(table) == expected
    assert codec.encode(table) == data


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


@given(
    first=st.sampled_from([0, 1, 1 << 16 | 1 << 63, (1 << 62) - 5]),
    step=st.sampled_from([0, 512, 1 << 21]),
    length=st.sampled_from([1, 2, 3, 64, 9000]),
    wrong=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 63)), max_size=3),
    start=st.floats(0, 1, exclude_max=True),
    has_engine=st.booleans() if native.available else st.just(False),
)
def test_numbers_that_go_on_alike_are_counted_up_to_the_first_that_does_not(
    first: int,
    step: int,
    length: int,
    wrong: list[tuple[float, int]],
    start: float,
    has_engine: bool,
) -> None:
    table = array("Q", [first + at * step for at in range(length)])
    for where, bit in wrong:
        table[int(where * length)] ^= 1 << bit
    at = int(start * length)
    expected = 1
    while at + expected < length and table[at + expected] == table[at] + expected * step:
        expected += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "available", has_engine)
        assert count_alike(table, at, table[at], step) == expected
