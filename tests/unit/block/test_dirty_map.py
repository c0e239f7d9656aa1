"""Dirty maps (rows B16.12, B29.1 and B29.7): everything that was written is marked, and nothing else."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.block.fakes import ArrayNode, PassNode, put_above, run_now
from vhostblk.block import clear, pipeline
from vhostblk.block.backend import BlockBackend
from vhostblk.block.copy_range import copy_range_to
from vhostblk.block.dirty_map import DirtyMap, collect, record, stop_recording
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode, ExtentFlag, HostExtent, PastWrites
from vhostblk.block.permissions import Perm
from vhostblk.errors import BlockError

GRAIN = 1024
RW = ExtentFlag.READ | ExtentFlag.WRITE

ranges = st.tuples(st.integers(0, 300_000), st.integers(0, 100_000))


def granules(found: Iterable[tuple[int, int]], grain: int, length: int) -> set[int]:
    """The granules that ranges touch, as far as there are so many."""
    return {
        index
        for offset, size in found
        if size
        for index in range(offset // grain, (min(offset + size, length) - 1) // grain + 1)
    }


@given(
    marks=st.lists(ranges, max_size=8),
    shift=st.integers(9, 13),
    length=st.integers(0, 250_000),
)
def test_map_has_exactly_the_granules_that_were_touched(
    marks: list[tuple[int, int]], shift: int, length: int
) -> None:
    dirty = DirtyMap(length, 1 << shift)
    for offset, size in marks:
        dirty.mark(offset, size)
    expected = granules([mark for mark in marks if mark[0] < length], 1 << shift, length)
    found = list(dirty.ranges())
    assert granules(found, 1 << shift, length) == expected
    # Ascending, with something clean in between, and nothing behind the end.
    ends = [offset + size for offset, size in found]
    assert all(end < start for end, (start, _) in zip(ends, found[1:], strict=False))
    assert not ends or ends[-1] <= length
    assert dirty.take() == found
    assert not list(dirty.ranges())


@given(marks=st.lists(ranges, max_size=5), lengths=st.lists(st.integers(0, 200_000), max_size=4))
def test_resized_map_keeps_what_is_left_and_what_is_new_is_clean(
    marks: list[tuple[int, int]], lengths: list[int]
) -> None:
    dirty = DirtyMap(100_000, 4096)
    for offset, size in marks:
        dirty.mark(offset, size)
    expected = granules(dirty.ranges(), 4096, 100_000)
    for length in lengths:
        dirty.resize(length)
        expected = {index for index in expected if index * 4096 < length}
        assert granules(dirty.ranges(), 4096, length) == expected


# ---------------------------------------------------------------------- by the pipeline


def test_every_kind_of_change_is_marked() -> None:
    node = ArrayNode(16 * GRAIN)
    dirty = DirtyMap(node.length, GRAIN)
    run_now(pipeline.pwritev(node.lane, 0, IoVec.of(b"x")))
    run_now(record(node, dirty))
    assert not list(dirty.ranges())
    run_now(pipeline.preadv(node.lane, 0, IoVec.of(bytearray(512))))
    for change, at in (
        (pipeline.pwritev(node.lane, GRAIN + 7, IoVec.of(b"x")), 1),
        (clear.pwrite_zeroes(node, 3 * GRAIN, 512), 3),
        (clear.pdiscard(node, 5 * GRAIN, 512), 5),
        (copy_range_to(ArrayNode(), 0, node, 7 * GRAIN, 512, 0), 7),
    ):
        try:
            run_now(change)
        except BlockError as error:
            assert at == 7, error  # noqa: PT017 - it cannot copy, and may have tried
        assert dirty.take() == [(at * GRAIN, GRAIN)]
    run_now(stop_recording(node, dirty))
    run_now(pipeline.pwritev(node.lane, 0, IoVec.of(b"x")))
    assert not list(dirty.ranges())


def test_what_failed_is_marked_as_a_whole() -> None:
    """Part of it may have been written."""
    node = ArrayNode(16 * GRAIN)
    dirty = DirtyMap(node.length, GRAIN)
    run_now(record(node, dirty))

    def fail(kind: str, offset: int, length: int) -> None:
        raise BlockError(errno.EIO)

    node.fail = fail
    for change in (
        pipeline.pwritev(node.lane, 0, IoVec.of(bytes(2 * GRAIN))),
        clear.pwrite_zeroes(node, 4 * GRAIN, 512),
        clear.pdiscard(node, 6 * GRAIN, 512),
    ):
        with pytest.raises(BlockError):
            run_now(change)
    assert dirty.take() == [(0, 2 * GRAIN), (4 * GRAIN, GRAIN), (6 * GRAIN, GRAIN)]


def test_map_of_a_node_that_has_grown_has_room_for_more() -> None:
    node = ArrayNode(2 * GRAIN)
    dirty = DirtyMap(node.length, GRAIN)
    run_now(record(node, dirty))
    run_now(pipeline.truncate(node, 4 * GRAIN))
    run_now(pipeline.pwritev(node.lane, 3 * GRAIN, IoVec.of(b"x")))
    assert dirty.take() == [(3 * GRAIN, GRAIN)]


# ---------------------------------------------------------------------- past it


class MappedNode(ArrayNode):
    """All of it is one extent."""

    async def host_extent(self, offset: int, length: int) -> HostExtent | None:
        return HostExtent(0, self.length, 7, 0, RW)


class MappedPass(PassNode):
    """A filter that lets extents through."""

    async def host_extent(self, offset: int, length: int) -> HostExtent | None:
        return await pipeline.host_extent(self.children["file"].node, offset, length)


class User:
    """Writes through extents, and remembers."""

    def __init__(self, node: BlockNode, *, remembers: bool = True) -> None:
        self.backend = BlockBackend(node, "the test", writable=True, shared=Perm.ALL)
        self.revoked = 0
        self.writes = PastWrites()
        if remembers:
            self.backend.attach(revoke=self._revoke, take_writes=self._take)

    async def _revoke(self, offset: int, length: int) -> None:
        self.revoked += 1

    def _take(self, with_ranges: bool) -> PastWrites:
        taken = self.writes
        self.writes = PastWrites() if with_ranges else PastWrites(0, 0, taken.ranges)
        return taken if with_ranges else replace(taken, ranges=())

    def wrote(self, *where: tuple[int, int]) -> None:
        self.writes = PastWrites(len(where), max(sum(one) for one in where), where)

    def extent(self) -> HostExtent:
        (extent,) = run_now(self.backend.extents(0, 1))
        return extent


def test_extents_of_a_node_with_maps_say_how_finely_to_remember() -> None:
    node = MappedNode(16 * GRAIN)
    user = User(node)
    assert user.extent().record == 0
    maps = [DirtyMap(node.length, grain) for grain in (4096, 1024, 65536)]
    for number, dirty in enumerate(maps, 1):
        run_now(record(node, dirty))
        assert user.revoked == number
    assert (user.extent().record, user.extent().flags) == (1024, RW)
    for dirty in maps:
        run_now(stop_recording(node, dirty))
    assert user.extent().record == 0


def test_user_that_remembers_nothing_may_not_write() -> None:
    node = MappedNode(16 * GRAIN)
    user = User(node, remembers=False)
    assert user.extent().flags == RW
    run_now(record(node, DirtyMap(node.length, GRAIN)))
    assert user.extent().flags == ExtentFlag.READ


def test_what_was_written_past_the_pipeline_is_in_all_maps_below() -> None:
    node = MappedNode(16 * GRAIN)
    above = put_above(node, kind=MappedPass)
    user = User(above)
    fine, coarse = DirtyMap(node.length, GRAIN), DirtyMap(node.length, 4 * GRAIN)
    run_now(record(node, fine))
    run_now(record(above, coarse))
    user.wrote((5 * GRAIN, GRAIN), (14 * GRAIN, 2 * GRAIN))
    node.write_generation()  # a flush asks for numbers only
    collect(node)
    assert fine.take() == [(5 * GRAIN, GRAIN), (14 * GRAIN, 2 * GRAIN)]
    assert coarse.take() == [(4 * GRAIN, 4 * GRAIN), (12 * GRAIN, 4 * GRAIN)]
    collect(node)
    assert not fine.take()
    assert (above.highest_offset(), node.highest_offset()) == (16 * GRAIN, 16 * GRAIN)


def test_what_was_written_before_is_no_business_of_a_new_map_and_the_last_of_an_old_one() -> None:
    node = MappedNode(16 * GRAIN)
    user = User(node)
    old, new = DirtyMap(node.length, GRAIN), DirtyMap(node.length, GRAIN)
    run_now(record(node, old))
    user.wrote((0, GRAIN))
    run_now(record(node, new))
    user.wrote((2 * GRAIN, GRAIN))
    run_now(stop_recording(node, old))
    assert old.take() == [(0, GRAIN), (2 * GRAIN, GRAIN)]
    assert new.take() == [(2 * GRAIN, GRAIN)]


@pytest.mark.parametrize(
    ("offset", "record_in", "expected"),
    [(0, 4096, 4096), (8192, 4096, 4096), (512, 4096, 512), (1024, 512, 512)],
)
def test_window_moves_what_was_written_and_its_granules_fit(
    offset: int, record_in: int, expected: int
) -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        window = await graph.add(
            f"raw,node-name=w,offset={offset},file.driver=memory,file.node-name=f,file.size=64k"
        )
        file = graph.find("f")
        user = User(window)
        dirty = DirtyMap(file.length, record_in)
        await record(file, dirty)
        (extent,) = await user.backend.extents(0, 1)
        assert (extent.record, bool(extent.flags & ExtentFlag.WRITE)) == (expected, True)
        user.wrote((4096, expected))
        collect(file)
        assert granules(dirty.take(), record_in, file.length) == {(4096 + offset) // record_in}
        assert file.highest_offset() == 4096 + offset + expected
        await user.backend.close()
        await graph.close_all()

    asyncio.run(scenario())


class Scattered(MappedPass):
    """Its bytes are somewhere in the child, and not where they were."""

    def child_range(self, edge: object, offset: int) -> int | None:
        return None


def test_node_that_cannot_tell_where_its_bytes_are_gives_no_writable_extent() -> None:
    node = MappedNode(16 * GRAIN)
    user = User(put_above(node, kind=Scattered))
    assert user.extent().flags == RW
    run_now(record(node, DirtyMap(node.length, GRAIN)))
    assert user.extent().flags == ExtentFlag.READ
    # But a flush below knows that there is something to do.
    before = node.write_generation()
    user.wrote((0, GRAIN))
    assert node.write_generation() > before
