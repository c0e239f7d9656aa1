"""Signals are heard by a loop that has much else to do, and only inside."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from vhostblk.cli.signals import signals_handled


@pytest.mark.parametrize("times", [1, 3])
def test_signal_is_heard_though_threads_have_filled_the_loops_own_socket(times: int) -> None:
    heard: list[str] = []

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        both = asyncio.Event()

        def hear(name: str) -> None:
            heard.append(name)
            if len(set(heard)) == 2:
                both.set()

        handlers = {signal.SIGUSR1: lambda: hear("one"), signal.SIGUSR2: lambda: hear("two")}
        before = signal.getsignal(signal.SIGUSR1)
        with signals_handled(handlers):
            for _ in range(10000):
                loop.call_soon_threadsafe(len, "")
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR2)
            await asyncio.wait_for(both.wait(), 30)
        assert signal.getsignal(signal.SIGUSR1) == before
        assert signal.set_wakeup_fd(-1) == -1

    asyncio.run(scenario())
    assert sorted(heard) == ["one", "two"]
