"""The event loops of the unit and contract tests are in asyncio's debug mode.

They then find coroutines that nobody awaits, calls from a wrong thread, and tell where a task comes from that nobody
has waited for; the plugin makes failures of what asyncio says (`vhostblk.testing.plugin`). Slow callbacks are not told
of: they say more about the machine. Daemons in other processes, and in the integration tests, run as users run them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

__all__ = ["debugged_event_loops"]

_DEBUGGED = ("tests/unit/", "tests/contract/")


class _Policy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        loop = super().new_event_loop()
        loop.set_debug(True)
        loop.slow_callback_duration = float("inf")
        return loop


@pytest.fixture(autouse=True)
def debugged_event_loops(request: pytest.FixtureRequest) -> Iterator[None]:
    """See the module."""
    if not request.node.nodeid.startswith(_DEBUGGED):
        yield
        return
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_Policy())
    yield
    asyncio.set_event_loop_policy(before)
