"""Ranges of the disk that somebody uses, or is about to change.

Reads, and writes to where a cluster is already, share a range; who changes entries of an L2 table has it alone. First
come, first served, so nobody starves; nobody waits for a range while holding another.

Context: the control loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class _Use:
    """Somebody who uses a range."""

    start: int
    end: int
    alone: bool
    over: asyncio.Future[None] | None = None


class RangeLocks:
    """Who uses what, in the order in which they came."""

    def __init__(self) -> None:
        self._uses: list[_Use] = []

    @asynccontextmanager
    async def held(self, start: int, end: int, *, alone: bool) -> AsyncIterator[None]:
        """Use `start`..`end`, when those who came before and exclude that have finished."""
        use = _Use(start, end, alone)
        self._uses.append(use)
        try:
            while (other := self._blocker(use)) is not None:
                if other.over is None:
                    other.over = asyncio.get_running_loop().create_future()
                # Others wait for it, too.
                await asyncio.shield(other.over)
            yield
        finally:
            self._uses.remove(use)
            if use.over is not None:
                use.over.set_result(None)

    @contextmanager
    def taken(self, ranges: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """Have alone those of the ranges (start, end; apart from each other) that nobody uses, or waits for, now."""
        before = self._uses
        free = [
            (start, end)
            for start, end in ranges
            if not any(use.start < end and start < use.end for use in before)
        ]
        uses = [_Use(start, end, alone=True) for start, end in free]
        self._uses = before + uses
        try:
            yield free
        finally:
            mine = set(uses)
            self._uses = [use for use in self._uses if use not in mine]
            for use in uses:
                if use.over is not None:
                    use.over.set_result(None)

    def _blocker(self, use: _Use) -> _Use | None:
        for other in self._uses:
            if other is use:
                return None
            if other.start < use.end and use.start < other.end and (other.alone or use.alone):
                return other
        return None
