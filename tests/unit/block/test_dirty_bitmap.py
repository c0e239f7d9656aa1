"""Dirty bitmaps (row B29): their states, and that no write is missed whatever becomes of them."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.schedule import HUNT
from tests.unit.block.fakes import ArrayNode, run_now
from vhostblk.block import clear, pipeline
from vhostblk.block.dirty_bitmap import (
    DirtyBitmap,
    add_bitmap,
    default_granularity,
    find_bitmap,
    merge_bitmaps,
    query_bitmaps,
    remove_bitmap,
)
from vhostblk.block.dirty_map import DirtyMap
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError, ConfigError

GRAIN = 1024
LENGTH = 64 * GRAIN


def made(node: ArrayNode, *words: Any, **options: Any) -> DirtyBitmap:
    async def add() -> DirtyBitmap:
        return await add_bitmap(BlockGraph(), node, *words, **options)

    return asyncio.run(add())


def removed(bitmap: DirtyBitmap) -> None:
    async def remove() -> None:
        await remove_bitmap(BlockGraph(), bitmap)

    asyncio.run(remove())


def write(node: ArrayNode, granule: int, count: int = 1) -> None:
    run_now(pipeline.pwritev(node.lane, granule * GRAIN + 3, IoVec.of(bytes(count * GRAIN - 5))))


def granules(bitmap: DirtyBitmap) -> set[int]:
    return {
        at // GRAIN for start, size in bitmap.ranges() for at in range(start, start + size, GRAIN)
    }


def why(work: Coroutine[Any, Any, object] | Callable[[], object]) -> tuple[int, str]:
    with pytest.raises(ConfigError) as caught:
        _ = work() if callable(work) else run_now(work)
    return caught.value.errno, str(caught.value)


def test_bitmap_has_what_was_written_and_says_so_in_numbers() -> None:
    node = ArrayNode(LENGTH)
    bitmap = made(node, "b", GRAIN)
    write(node, 3)
    write(node, 10, 2)
    run_now(clear.pdiscard(node, 20 * GRAIN, GRAIN))
    assert granules(bitmap) == {3, 10, 11, 20}
    assert bitmap.count() == 4 * GRAIN
    assert [bitmap.is_dirty(at * GRAIN) for at in (2, 3, 4)] == [False, True, False]
    assert not bitmap.is_dirty(-1)
    assert not bitmap.is_dirty(LENGTH)
    (info,) = query_bitmaps(node)
    assert (info.name, info.count, info.granularity) == ("b", 4 * GRAIN, GRAIN)
    assert (info.recording, info.busy, info.persistent, info.inconsistent) == (
        True,
        False,
        False,
        False,
    )


def test_states_are_frozen_then_disabled_then_active() -> None:
    node = ArrayNode(LENGTH)
    bitmap = made(node, "b", GRAIN)
    assert (bitmap.status, bitmap.is_recording) == ("active", True)
    run_now(bitmap.disable())
    assert (bitmap.status, bitmap.is_recording) == ("disabled", False)
    write(node, 1)
    assert granules(bitmap) == set()
    child = bitmap.create_successor()
    assert (bitmap.status, bitmap.is_recording) == ("frozen", False)
    assert not child.enabled  # as its parent
    bitmap.reclaim()
    assert bitmap.status == "disabled"  # not enabled by that
    run_now(bitmap.enable())
    child = bitmap.create_successor()
    assert (bitmap.status, bitmap.is_recording, child.name) == ("frozen", True, None)
    assert (child.granularity, child.status) == (GRAIN, "active")


def test_nobody_touches_a_frozen_bitmap_but_who_froze_it() -> None:
    node = ArrayNode(LENGTH)
    bitmap, other = made(node, "b", GRAIN), made(node, "other", GRAIN)
    bitmap.create_successor()
    for work in (
        *(bitmap.clear, bitmap.create_successor, lambda: bitmap.restore(b"")),
        *(bitmap.enable(), bitmap.disable()),
        *(lambda: merge_bitmaps(bitmap, [other]), lambda: merge_bitmaps(other, [bitmap])),
        lambda: removed(bitmap),
    ):
        number, text = why(work)
        assert number == errno.EBUSY
        assert "currently in use by another operation" in text
    with pytest.raises(BlockError) as caught:
        run_now(pipeline.truncate(node, 2 * LENGTH))
    assert caught.value.errno == errno.EBUSY
    bitmap.reclaim()
    run_now(pipeline.truncate(node, 2 * LENGTH))
    write(node, 100)
    assert granules(bitmap) == {100}
    assert "no successor" in why(bitmap.reclaim)[1]
    assert "no successor" in why(bitmap.abdicate)[1]


def test_successor_takes_the_place_when_the_work_succeeds_and_gives_back_all_when_it_fails() -> (
    None
):
    node = ArrayNode(LENGTH)
    bitmap = made(node, "b", GRAIN)
    write(node, 1)
    bitmap.create_successor()
    write(node, 2)
    assert granules(bitmap) == {1}
    bitmap.reclaim()
    assert granules(bitmap) == {1, 2}
    write(node, 3)
    child = bitmap.create_successor()
    write(node, 4)
    assert bitmap.abdicate() is child
    assert find_bitmap(node, "b") is child
    assert granules(child) == {4}
    write(node, 5)
    assert granules(child) == {4, 5}
    assert granules(bitmap) == {1, 2, 3}
    assert [info.name for info in query_bitmaps(node)] == ["b"]


def test_bitmap_that_nobody_may_use_says_why() -> None:
    node = ArrayNode(LENGTH)
    bitmap, good = made(node, "b", GRAIN), made(node, "good", GRAIN)
    bitmap.readonly = True
    assert why(bitmap.clear)[0] == errno.EPERM
    merge_bitmaps(good, [bitmap])  # it is only read
    bitmap.readonly, bitmap.inconsistent = False, True
    assert "inconsistent and cannot be used" in why(lambda: merge_bitmaps(good, [bitmap]))[1]
    removed(bitmap)
    assert query_bitmaps(node)[0].name == "good"
    removed(bitmap)  # nobody's any more: nothing happens


def test_names_and_granularities_are_checked() -> None:
    node = ArrayNode(LENGTH)
    made(node, "b")
    assert why(lambda: made(node, "b")) == (errno.EEXIST, "Bitmap already exists: b")
    assert "empty" in why(lambda: made(node, ""))[1]
    assert "too long" in why(lambda: made(node, "é" * 512))[1]
    assert "power of 2" in why(lambda: made(node, "c", 256))[1]
    assert "power of 2" in why(lambda: made(node, "c", 1536))[1]
    assert why(lambda: made(node, "c", persistent=True))[0] == errno.ENOTSUP
    assert why(lambda: find_bitmap(node, "c"))[0] == errno.ENOENT
    assert made(node, None).name is None
    assert made(node, None).name is None


@pytest.mark.parametrize(
    ("cluster", "expected"), [(0, 65536), (512, 4096), (8192, 8192), (2 << 20, 65536)]
)
def test_granularity_is_that_of_clusters_within_reason(cluster: int, expected: int) -> None:
    node = ArrayNode(LENGTH)
    node.cluster_size = cluster
    assert default_granularity(node) == expected


def test_what_was_cleared_or_merged_can_be_restored() -> None:
    node = ArrayNode(LENGTH)
    bitmap, other = made(node, "b", GRAIN), made(node, "other", 4 * GRAIN)
    write(node, 5)
    before = bitmap.clear()
    assert granules(bitmap) == set()
    bitmap.restore(before)
    assert granules(bitmap) == {5}
    before = merge_bitmaps(bitmap, [other])
    assert granules(bitmap) == {4, 5, 6, 7}
    bitmap.restore(before)
    assert granules(bitmap) == {5}
    longer = made(ArrayNode(2 * LENGTH), "longer", GRAIN)
    assert "different sizes" in why(lambda: merge_bitmaps(bitmap, [longer]))[1]


ranges = st.lists(st.tuples(st.integers(0, 70_000), st.integers(0, 20_000)), max_size=6)
shifts = st.integers(9, 13)


@given(
    length=st.integers(1, 66_000),
    one=ranges,
    other=ranges,
    shift=shifts,
    other_shift=shifts,
    gone=ranges,
)
def test_bits_are_a_set(
    length: int,
    one: list[tuple[int, int]],
    other: list[tuple[int, int]],
    shift: int,
    other_shift: int,
    gone: list[tuple[int, int]],
) -> None:
    """Merging, resetting, counting and what is stored, against a model."""
    grain, maps = 1 << shift, (DirtyMap(length, 1 << shift), DirtyMap(length, 1 << other_shift))

    def touched(where: list[tuple[int, int]], size: int) -> set[int]:
        clipped = [(at, min(at + count, length)) for at, count in where]
        return {
            n for at, end in clipped if end > at for n in range(at // size, (end - 1) // size + 1)
        }

    for found, where in zip(maps, (one, other), strict=True):
        for mark in where:
            found.mark(*mark)
    mine, theirs = maps
    bytes_of_theirs = {
        at for n in touched(other, 1 << other_shift)
        for at in range(n << other_shift, min(n + 1 << other_shift, length), 512)
    }  # fmt: skip
    model = touched(one, grain) | {at // grain for at in bytes_of_theirs}
    mine.merge(theirs)
    for at, count in gone:
        mine.unmark(at, count)
        end = at + count if at + count < length else length + grain
        model -= {n for n in model if at <= n * grain and (n + 1) * grain <= end}
    assert mine.count() == len(model) * grain
    assert {n for n in range(-(-length // grain)) if mine.is_dirty(n * grain)} == model
    stored = mine.to_bytes()
    count = -(-length // grain)
    assert stored == sum(1 << n for n in model).to_bytes(-(-count // 8), "little")
    again = DirtyMap(length, grain)
    again.load(stored + b"\xff")
    assert list(again.ranges()) == list(mine.ranges())


@pytest.mark.parametrize("seed", range(20 * HUNT))
def test_dirty_set_is_the_written_set_while_bitmaps_freeze_fail_and_succeed(seed: int) -> None:
    """Exact at the granularity; what is frozen, fails and is reclaimed loses nothing."""
    rnd = random.Random(seed)
    node = ArrayNode(LENGTH)
    bitmap = made(node, "b", GRAIN)
    model: set[int] = set()
    later: set[int] | None = None  # what the successor has to have
    for _ in range(80):
        kind = rnd.choice(
            ["write"] * 5 + ["freeze", "fail", "succeed", "toggle", "resize", "clear"]
        )
        if kind == "write":
            at, count = rnd.randrange(40), rnd.randrange(1, 5)
            write(node, at, count)
            if bitmap.is_recording:
                (model if later is None else later).update(range(at, at + count))
        elif kind == "freeze" and later is None:
            bitmap.create_successor()
            later = set()
        elif kind == "fail" and later is not None:
            bitmap.reclaim()
            model, later = model | later, None
        elif kind == "succeed" and later is not None:
            bitmap = bitmap.abdicate()
            model, later = later, None
        elif later is None and kind == "toggle":
            run_now(bitmap.disable() if bitmap.enabled else bitmap.enable())
        elif later is None and kind == "resize":
            run_now(pipeline.truncate(node, rnd.choice([50, 64, 70]) * GRAIN))
            model = {n for n in model if n * GRAIN < node.length}
        elif later is None and kind == "clear":
            bitmap.clear()
            model = set()
        assert granules(bitmap) == model
        assert len(node.write_log.dirty_maps) == bitmap.is_recording
