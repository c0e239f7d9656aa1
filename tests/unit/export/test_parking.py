"""Failed requests that wait: paused exactly as long as one does, all of them answered, in their order (row B39)."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable

from vhostblk.export.error_policy import IoStatus
from vhostblk.export.parking import Parking


def with_parking(scenario: Callable[[Parking, list[bool]], Awaitable[None]]) -> None:
    async def everything() -> None:
        said: list[bool] = []
        await scenario(Parking(said.append), said)

    asyncio.run(everything())


def test_parked_requests_are_tried_again_in_their_order_and_pause_once() -> None:
    async def scenario(parking: Parking, said: list[bool]) -> None:
        order: list[int] = []

        async def request(number: int) -> None:
            assert await parking.park()
            order.append(number)

        tasks = [asyncio.create_task(request(number)) for number in range(5)]
        await asyncio.sleep(0)
        assert said == [True]
        assert parking.is_paused
        assert parking.resume() == 5
        assert said == [True, False]
        assert not parking.is_paused
        await asyncio.gather(*tasks)
        assert order == [0, 1, 2, 3, 4]
        assert parking.resume() == 0
        assert said == [True, False]

    with_parking(scenario)


def test_first_error_is_the_status_until_the_resume() -> None:
    async def scenario(parking: Parking, said: list[bool]) -> None:
        for first, status in ((errno.EIO, IoStatus.FAILED), (errno.ENOSPC, IoStatus.NOSPACE)):
            parking.note(first)
            parking.note(errno.EROFS)
            task = asyncio.create_task(parking.park())
            await asyncio.sleep(0)
            assert parking.status is status
            parking.resume()
            assert parking.status is IoStatus.OK
            assert await task

    with_parking(scenario)


def test_closing_gives_up_those_who_wait_and_ends_the_pause() -> None:
    async def scenario(parking: Parking, said: list[bool]) -> None:
        tasks = [asyncio.create_task(parking.park()) for _ in range(3)]
        await asyncio.sleep(0)
        with parking.closed() as count, parking.closed() as nobody:
            assert (count, nobody) == (3, 0)
            assert not parking.is_open
            assert await asyncio.gather(*tasks) == [False] * 3
        assert parking.is_open
        assert said == [True, False]

    with_parking(scenario)


def test_cancelled_request_leaves_and_the_last_one_ends_the_pause() -> None:
    async def scenario(parking: Parking, said: list[bool]) -> None:
        tasks = [asyncio.create_task(parking.park()) for _ in range(2)]
        await asyncio.sleep(0)
        for task in tasks:
            assert parking.is_paused
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
        assert said == [True, False]
        # One that was told to go on and cancelled in the same turn has left already.
        task = asyncio.create_task(parking.park())
        await asyncio.sleep(0)
        parking.resume()
        task.cancel()
        await asyncio.wait([task])
        assert said == [True, False, True, False]

    with_parking(scenario)
