"""Coroutines that are begun where one stands, and finished by whoever awaits the rest."""

from __future__ import annotations

import asyncio

import pytest

from vhostblk.block.eager import DONE, begin, rest


def test_a_coroutine_that_never_waits_is_done_when_begin_returns() -> None:
    seen = []

    async def work() -> None:
        seen.append("done")

    assert begin(work()) is DONE
    assert seen == ["done"]


def test_what_a_coroutine_raises_before_it_waits_is_raised_by_begin() -> None:
    async def work() -> None:
        raise OSError("it")

    with pytest.raises(OSError, match="it"):
        begin(work())


def test_a_coroutine_that_waits_several_times_is_finished_by_awaiting_the_rest() -> None:
    async def main() -> None:
        first = asyncio.get_running_loop().create_future()
        seen: list[object] = []

        async def work() -> None:
            seen.append(await first)
            await asyncio.sleep(0)
            seen.append("done")

        coro = work()
        waits_for = begin(coro)
        assert waits_for is first
        asyncio.get_running_loop().call_soon(first.set_result, 1)
        await rest(coro, waits_for)
        assert seen == [1, "done"]

    asyncio.run(main())


def test_an_exception_of_what_is_awaited_reaches_the_coroutine() -> None:
    async def main() -> None:
        future = asyncio.get_running_loop().create_future()

        async def work() -> None:
            try:
                await future
            except OSError as exc:
                raise ValueError(f"caught {exc}") from None

        coro = work()
        waits_for = begin(coro)
        future.set_exception(OSError("it"))
        with pytest.raises(ValueError, match="caught it"):
            await rest(coro, waits_for)

    asyncio.run(main())


def test_cancelling_who_awaits_the_rest_cancels_the_coroutine() -> None:
    async def main() -> None:
        seen: list[str] = []

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        coro = work()
        waits_for = begin(coro)
        task = asyncio.ensure_future(rest(coro, waits_for))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert seen == ["cancelled"]

    asyncio.run(main())


def test_request_that_is_over_is_over_however_often_and_however_it_is_awaited() -> None:
    async def everything() -> None:
        await DONE
        await DONE
        await asyncio.gather(DONE, DONE)
        await asyncio.create_task(DONE)
        assert begin(DONE) is DONE

    asyncio.run(everything())
