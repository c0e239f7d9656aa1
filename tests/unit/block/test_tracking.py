"""Who waits for whom (row B14)."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.block.fakes import run_now, turns
from vhostblk.block.tracking import RequestTracker, RequestType

READ, WRITE = RequestType.READ, RequestType.WRITE


def test_ordinary_requests_never_wait_for_each_other() -> None:
    tracker = RequestTracker()
    first = tracker.begin(WRITE, 0, 100)
    second = tracker.begin(WRITE, 50, 100)
    assert run_now(tracker.wait(first)) is False
    assert run_now(tracker.wait(second)) is False


@pytest.mark.parametrize(
    ("offset", "length", "waits"),
    [(0, 512, False), (512, 1, True), (1023, 1, True), (1024, 512, False), (0, 4096, True)],
)
def test_others_wait_for_the_widened_range_of_a_serialising_request(
    offset: int, length: int, waits: bool
) -> None:
    tracker = RequestTracker()
    tracker.mark_serialising(tracker.begin(WRITE, 600, 10), 512)
    other = tracker.begin(READ, offset, length)
    assert (tracker.blocker(other) is not None) is waits


def test_marking_twice_counts_once_and_only_widens() -> None:
    tracker = RequestTracker()
    request = tracker.begin(WRITE, 5000, 10)
    tracker.mark_serialising(request, 4096)
    tracker.mark_serialising(request, 512)
    assert (request.start, request.end) == (4096, 8192)
    assert tracker.serialising == 1
    tracker.end(request)
    assert tracker.serialising == 0
    assert not tracker.requests


def test_waiter_goes_on_when_the_other_ends_and_looks_again() -> None:
    async def scenario() -> None:
        tracker = RequestTracker()
        first, second = tracker.begin(WRITE, 0, 10), tracker.begin(WRITE, 20, 10)
        tracker.mark_serialising(first, 1)
        tracker.mark_serialising(second, 1)
        reader = tracker.begin(READ, 0, 30)
        task = asyncio.create_task(tracker.wait(reader))
        await turns(3)
        tracker.end(first)
        await turns(3)
        assert not task.done()
        tracker.end(second)
        assert await task is True
        assert reader.waiting_for is None

    asyncio.run(scenario())


def test_two_serialising_requests_that_overlap_run_one_after_the_other() -> None:
    async def scenario() -> list[str]:
        tracker = RequestTracker()
        order: list[str] = []

        async def one(name: str, offset: int) -> None:
            request = tracker.begin(WRITE, offset, 10)
            tracker.mark_serialising(request, 512)
            await turns(2)
            await tracker.wait(request)
            order.append(f"{name}+")
            await turns(3)
            order.append(f"{name}-")
            tracker.end(request)

        await asyncio.wait_for(asyncio.gather(one("a", 0), one("b", 20), one("c", 40)), 5)
        return order

    order = asyncio.run(scenario())
    assert [entry[0] for entry in order[::2]] == [entry[0] for entry in order[1::2]]
    assert sorted(order[::2]) == ["a+", "b+", "c+"]


def test_nobody_waits_for_a_request_that_waits_itself() -> None:
    """A waits for B, B overlaps A: B goes on (row B14.9)."""

    async def scenario() -> None:
        tracker = RequestTracker()
        b = tracker.begin(WRITE, 0, 10)
        tracker.mark_serialising(b, 512)
        a = tracker.begin(WRITE, 100, 10)
        task = asyncio.create_task(tracker.wait(a))
        await turns(1)
        assert a.waiting_for is b
        assert await tracker.wait(b) is False
        tracker.end(b)
        assert await asyncio.wait_for(task, 5) is True

    asyncio.run(scenario())


def test_cancelled_waiter_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        tracker = RequestTracker()
        first = tracker.begin(WRITE, 0, 10)
        tracker.mark_serialising(first, 1)
        second = tracker.begin(WRITE, 0, 10)
        task = asyncio.create_task(tracker.wait(second))
        await turns(2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert second.waiting_for is None
        tracker.end(second)
        tracker.end(first)
        assert not tracker.requests

    asyncio.run(scenario())


ranges = st.tuples(st.integers(0, 60), st.integers(1, 8))


@given(st.lists(ranges, max_size=5), ranges)
def test_clear_run_is_the_largest_run_without_serialising_requests(
    busy: list[tuple[int, int]], wanted: tuple[int, int]
) -> None:
    tracker = RequestTracker()
    taken: set[int] = set()
    for offset, length in busy:
        tracker.mark_serialising(tracker.begin(WRITE, offset, length), 1)
        taken.update(range(offset, offset + length))
    start, end = wanted[0], sum(wanted)
    run = tracker.clear_run(start, end, 0, 100)
    assert tracker.serialises(start, end) is bool(taken & set(range(start, end)))
    if run is None:
        assert taken & set(range(start, end))
    else:
        low, high = run
        assert low <= start < end <= high
        assert not taken & set(range(low, high))
        assert low == 0 or low - 1 in taken
        assert high == 100 or high in taken
