"""Coroutines run without a task until they wait."""

from __future__ import annotations

import asyncio

import pytest

from vhostblk.export.eager import run_eagerly


def test_a_coroutine_that_never_waits_is_done_when_the_call_returns() -> None:
    async def main() -> None:
        results: list[int] = []
        tasks: set[asyncio.Task[None]] = set()

        async def answer() -> int:
            return 42

        run_eagerly(answer(), results.append, tasks)
        assert results == [42]
        assert not tasks

    asyncio.run(main())


def test_a_coroutine_that_waits_several_times_is_finished_by_one_task() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        first, second = loop.create_future(), loop.create_future()
        results: list[tuple[int, bool]] = []
        tasks: set[asyncio.Task[None]] = set()

        async def add() -> tuple[int, bool]:
            value = await first + await second
            await asyncio.sleep(0)
            return value, asyncio.current_task() is not None

        run_eagerly(add(), results.append, tasks)
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


def test_an_exception_of_what_is_awaited_reaches_the_coroutine() -> None:
    async def main() -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        results: list[str] = []
        tasks: set[asyncio.Task[None]] = set()

        async def guarded() -> str:
            try:
                await future
            except OSError as exc:
                return f"caught {exc}"
            return "nothing"

        run_eagerly(guarded(), results.append, tasks)
        future.set_exception(OSError("it"))
        await asyncio.wait(tasks)
        assert results == ["caught it"]

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

        run_eagerly(waits(), lambda _: None, tasks)
        (task,) = tasks
        await asyncio.sleep(0)  # the task has begun
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert seen == ["cancelled"]

    asyncio.run(main())
