"""What was the case when somebody asked is seen by a run behind that, and few runs do for many."""

from __future__ import annotations

import asyncio

import pytest

from vhostblk.export.again import Again


def test_one_run_more_is_for_all_who_asked_meanwhile_and_who_is_cancelled_waits_too() -> None:
    async def scenario() -> None:
        runs: list[int] = []
        go = asyncio.Event()

        async def action() -> None:
            runs.append(len(runs))
            await go.wait()

        again = Again(action)

        async def asker() -> int:
            again.ask()
            await again.wait()
            return len(runs)

        askers = [asyncio.create_task(asker()) for _ in range(100)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        askers.append(asyncio.create_task(asker()))
        await asyncio.sleep(0)
        askers[3].cancel()
        await asyncio.sleep(0)
        assert not any(task.done() for task in askers)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await askers.pop(3)
        assert set(await asyncio.gather(*askers)) == {2}
        assert not again.is_running

    asyncio.run(scenario())
