"""Who uses which cluster of the file: where compressed clusters get their bytes."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
from array import array
from collections.abc import Awaitable, Callable

import pytest

from tests.unit.block.drivers.qcow2.files import HEADER, BytesFile
from vhostblk.block.drivers.qcow2.cache import Slice
from vhostblk.block.drivers.qcow2.overlaps import TablePlaces
from vhostblk.block.drivers.qcow2.refcounts import Refcounts
from vhostblk.errors import BlockError

CLUSTER = 65536


def with_refcounts(scenario: Callable[[Refcounts], Awaitable[None]], order: int = 4) -> None:
    """Of a file of four clusters that are in use; all others are free."""

    async def everything() -> None:
        table = array("Q", [2 * CLUSTER] + 8191 * [0])
        header = dataclasses.replace(HEADER, refcount_order=order)
        counts = Refcounts(BytesFile().edge, header, table, CLUSTER, TablePlaces(16))
        assert await counts.allocate(4) == (0, 4)
        await scenario(counts)

    asyncio.run(everything())


def test_bytes_lie_one_behind_the_other_and_reach_into_the_cluster_that_follows() -> None:
    async def scenario(counts: Refcounts) -> None:
        places = [await counts.allocate_bytes(30_000) for _ in range(4)]
        assert places == [4 * CLUSTER + 30_000 * number for number in range(4)]
        # The third is in both.
        assert [await counts.count(at * CLUSTER) for at in (4, 5, 6)] == [3, 2, 0]

    with_refcounts(scenario)


def test_room_in_a_cluster_is_left_where_the_one_that_follows_is_in_use() -> None:
    async def scenario(counts: Refcounts) -> None:
        assert await counts.allocate_bytes(60_000) == 4 * CLUSTER
        assert await counts.allocate(1) == (5 * CLUSTER, 1)
        assert await counts.allocate_bytes(10_000) == 6 * CLUSTER
        assert [await counts.count(at * CLUSTER) for at in (4, 5, 6)] == [1, 1, 1]

    with_refcounts(scenario)


def test_cluster_that_somebody_has_given_up_gets_nothing_more() -> None:
    """The host is told that it may have its room, as soon as the disk knows."""

    async def scenario(counts: Refcounts) -> None:
        place = await counts.allocate_bytes(1000)
        counts.give_up(place, 1000)
        assert await counts.allocate_bytes(1000) == 5 * CLUSTER
        await counts.settle(counts.take_given_up())
        assert await counts.count(place) == 0

    with_refcounts(scenario)


def test_cluster_that_was_freed_gets_nothing_as_if_it_were_not() -> None:
    async def scenario(counts: Refcounts) -> None:
        place = await counts.allocate_bytes(1000)
        await counts.release(place, 1000)
        assert await counts.allocate(1) == (place, 1)
        assert await counts.allocate_bytes(1000) == 5 * CLUSTER

    with_refcounts(scenario)


def test_cluster_whose_count_could_not_be_read_when_it_was_released_gets_nothing_more() -> None:
    async def scenario(counts: Refcounts) -> None:
        place = await counts.allocate_bytes(1000)
        existing, counts.existing_block = counts.existing_block, _fails  # type: ignore[method-assign]
        with pytest.raises(BlockError):
            await counts.release(place, 1000)
        counts.existing_block = existing  # type: ignore[method-assign]
        assert await counts.allocate_bytes(1000) == 5 * CLUSTER

    with_refcounts(scenario)


async def _fails(index: int) -> Slice | None:
    raise BlockError(errno.EIO)


def test_cluster_with_as_many_users_as_a_count_can_say_gets_no_more() -> None:
    async def scenario(counts: Refcounts) -> None:
        places = [await counts.allocate_bytes(10) for _ in range(4)]
        assert places == [4 * CLUSTER, 4 * CLUSTER + 10, 4 * CLUSTER + 20, 5 * CLUSTER]

    with_refcounts(scenario, order=1)  # 2 bits


def test_whole_range_is_released_however_many_clusters_it_touches() -> None:
    async def scenario(counts: Refcounts) -> None:
        place, length = await counts.allocate(3)
        await counts.release(place, length * CLUSTER)
        assert [await counts.count(at * CLUSTER) for at in (4, 5, 6)] == [0, 0, 0]

    with_refcounts(scenario)


def test_gaps_that_are_too_small_are_passed_over_by_who_wants_clusters_together() -> None:
    async def scenario(counts: Refcounts) -> None:
        await counts.allocate(10)
        await counts.release(5 * CLUSTER, 2 * CLUSTER)
        await counts.release(9 * CLUSTER, 3 * CLUSTER)
        assert await counts.allocate(3, together=True) == (9 * CLUSTER, 3)
        assert await counts.allocate(4, together=True) == (14 * CLUSTER, 4)

    with_refcounts(scenario)


def test_blocks_for_more_than_one_of_them_counts_are_behind_what_is_taken() -> None:
    """The first one that is missing is where there is no block either, so that one is made before."""

    async def scenario(counts: Refcounts) -> None:
        per_block = CLUSTER // 2
        many = 2 * per_block
        assert await counts.allocate(many, together=True) == (4 * CLUSTER, many)
        behind = (4 + many) * CLUSTER
        assert counts.block_offsets() == [2 * CLUSTER, behind, behind + CLUSTER]
        assert await counts.counts(0, many + 7) == [1] * (many + 6) + [0]

    with_refcounts(scenario)


def test_block_is_behind_the_cluster_that_needs_it() -> None:
    async def scenario(counts: Refcounts) -> None:
        per_block = CLUSTER // 2
        await counts.allocate(per_block - 4)
        assert await counts.allocate(1) == (per_block * CLUSTER, 1)
        assert counts.block_offsets() == [2 * CLUSTER, (per_block + 1) * CLUSTER]

    with_refcounts(scenario)


@pytest.mark.parametrize("entries", [8192, 1])
def test_run_is_as_long_as_somebody_wants_and_has_blocks_before_it(entries: int) -> None:
    """A block is for 8192 clusters of which it takes the first; a table without room moves before that."""

    async def everything() -> None:
        table = array("Q", [2 * CLUSTER] + (entries - 1) * [0])
        header = dataclasses.replace(HEADER, refcount_order=6)
        counts = Refcounts(BytesFile().edge, header, table, CLUSTER, TablePlaces(16))
        assert await counts.allocate(4) == (0, 4)
        first = 8192 if entries > 1 else 2 * 8192
        place = await counts.allocate_run(20_000)
        assert place == (first + 3) * CLUSTER
        assert counts.block_offsets()[-3:] == [(first + at) * CLUSTER for at in range(3)]
        assert await counts.counts(first, 20_004) == [1] * 20_003 + [0]
        assert await counts.allocate(1) == (4 * CLUSTER, 1)
        assert await counts.allocate_run(1) == (first + 3 * 8192 + 1) * CLUSTER
        assert (counts.take_writes().moved is not None) == (entries == 1)

    asyncio.run(everything())
