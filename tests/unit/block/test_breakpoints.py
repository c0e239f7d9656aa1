"""Breakpoints: who comes to an event stops there until all who wanted that let it go (row B43.3)."""

from __future__ import annotations

import asyncio

from vhostblk.block.filters.breakpoints import Breakpoints


def test_breakpoint_stops_one_request_until_it_is_resumed() -> None:
    async def scenario() -> None:
        points = Breakpoints()
        points.add("pwritev", "A")
        await points.reach("read_aio")
        first = asyncio.create_task(points.reach("pwritev"))
        await asyncio.sleep(0)
        assert points.is_suspended("A")
        await points.reach("pwritev")
        assert points.resume("A")
        await first
        assert not points
        assert not points.resume("A")

    asyncio.run(scenario())


def test_request_goes_on_when_all_breakpoints_of_its_event_have_let_it_go() -> None:
    async def scenario() -> None:
        points = Breakpoints()
        points.add("pwritev", "A")
        points.add("pwritev", "B")
        request = asyncio.create_task(points.reach("pwritev"))
        await asyncio.sleep(0)
        assert points.is_suspended("A")
        assert points.is_suspended("B")
        points.resume("B")
        await asyncio.sleep(0)
        assert not request.done()
        points.resume("A")
        await request

    asyncio.run(scenario())


def test_of_two_with_one_tag_the_last_that_came_goes_first_and_removing_lets_all_go() -> None:
    async def scenario() -> None:
        points = Breakpoints()
        requests = []
        for _ in range(3):
            points.add("pwritev", "A")
            requests.append(asyncio.create_task(points.reach("pwritev")))
            await asyncio.sleep(0)
        assert points.resume("A")
        await requests[2]
        assert not requests[0].done()
        assert not requests[1].done()
        points.add("flush_to_disk", "A")
        assert points.remove("A")
        await asyncio.gather(*requests)
        assert not points
        assert not points.remove("A")

    asyncio.run(scenario())


def test_cancelled_request_is_no_longer_suspended() -> None:
    async def scenario() -> None:
        points = Breakpoints()
        points.add("pwritev", "A")
        request = asyncio.create_task(points.reach("pwritev"))
        await asyncio.sleep(0)
        request.cancel()
        await asyncio.wait([request])
        assert not points.is_suspended("A")
        assert not points

    asyncio.run(scenario())
