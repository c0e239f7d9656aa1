"""Coroutines run without a task until they wait."""

from __future__ import annotations

import asyncio

import pytest

from vhostblk.export.eager import run_eagerly


def test_a_coroutine_that_never_waits_is_done_when_the_call_returns() -> None:
    async def main() -> None:
        results: list[int] = []
        tasks: set[asyncio.Task[None]] = set()

        async def answer() -> None:
            results.append(42)

        run_eagerly(answer(), tasks)
        assert results == [42]
        assert not tasks

    asyncio.run(main())


def test_a_coroutine_that_waits_several_times_is_finished_by_one_task() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        first, second = loop.create_future(), loop.create_future()
        results: list[tuple[int, bool]] = []
        tasks: set[asyncio.Task[None]] = set()

        async def add() -> None:
            value = await first + await second
            await asyncio.sleep(0)
            results.append((value, asyncio.current_task() is not None))

        run_eagerly(add(), tasks)
        assert len(tasks) == 1
        assert not results
        first.set_result(1)
        await asyncio.sleep(0)
        second.set_result(2)
        await asyncio.wait(tasks)
        assert results == [(3, True)]
        await asyncio.sleep(0)
        assert not tasks

    asyncio.run(main())


def test_a_cancelled_task_cancels_the_coroutine() -> None:
    async def main() -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        tasks: set[asyncio.Task[None]] = set()
        seen: list[str] = []

        async def waits() -> None:
            try:
                await future
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        run_eagerly(waits(), tasks)
        (task,) = tasks
        await asyncio.sleep(0)  # the task has begun
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert seen == ["cancelled"]

    asyncio.run(main())
