"""Coroutines run without a task until they wait."""

from __future__ import annotations

import asyncio

import pytest

from vhostblk.block.host_io import Completion
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


@pytest.mark.parametrize("waits_for", ["a future", "what cannot be cancelled", "a turn"])
@pytest.mark.parametrize("when", ["before its first turn", "later"])
def test_a_cancelled_coroutine_has_a_result_and_not_before_its_wait_is_over(
    waits_for: str, when: str
) -> None:
    """The kernel may be using its memory until then."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = (
            Completion(loop=loop) if "cannot" in waits_for else loop.create_future()
        )
        tasks: set[asyncio.Task[None]] = set()
        results: list[str] = []

        async def request() -> None:
            try:
                await (asyncio.sleep(0) if waits_for == "a turn" else future)
            except asyncio.CancelledError:
                results.append(f"cancelled, {future.done()}")
            else:
                results.append("done")

        run_eagerly(request(), tasks)
        (task,) = tasks
        if when == "later" and waits_for != "a turn":
            await asyncio.sleep(0)
        task.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
        if waits_for == "what cannot be cancelled":
            assert not results
            future.set_result(None)
            await asyncio.wait([task])
        assert results == [f"cancelled, {waits_for != 'a turn'}"]
        assert not tasks

    asyncio.run(main())
