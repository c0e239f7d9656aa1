"""Requests in flight on one node, and which of them wait for which (block layer row B14).

Theory of operation: every request is in the list while it runs. A *serialising* request (a
read-modify-write, or one that asked for it) excludes everything that overlaps its range widened to
the alignment; other requests run side by side. Whoever finds an overlapping request in the way
waits for it, then looks again from the start. It never waits for one that is itself waiting,
because that one waits for us, or will (row B14.9).

Knows nothing about drivers, and nothing of requests that the engine serves alone: those are kept
out by revoking their extents (`pipeline.py`).
"""

from __future__ import annotations

import asyncio
import enum

from vhostblk.block.limits import align_down, align_up


class RequestType(enum.Enum):
    """What a tracked request does (row B02)."""

    READ = "read"
    WRITE = "write"
    DISCARD = "discard"
    TRUNCATE = "truncate"


class TrackedRequest:
    """One request on one node; `start` and `end` are the range that others must not touch if it serialises."""

    serialising = False
    waiting_for: TrackedRequest | None = None
    waiters: list[asyncio.Future[None]] | None = None

    def __init__(self, kind: RequestType, offset: int, length: int) -> None:
        self.kind = kind
        self.offset = offset
        self.length = length
        self.start = offset
        self.end = offset + length

    def widen(self, alignment: int) -> None:
        """Cover whole blocks; only ever grows (row B14.6)."""
        self.start = min(self.start, align_down(self.offset, alignment))
        self.end = max(self.end, align_up(self.offset + self.length, alignment))

    def overlaps(self, start: int, end: int) -> bool:
        """Whether the half-open range touches this one; adjacent ranges do not (row B14.7)."""
        return start < self.end and self.start < end

    def __repr__(self) -> str:
        kind = f"serialising {self.kind.value}" if self.serialising else self.kind.value
        return f"<{kind} {self.start}..{self.end}>"


class RequestTracker:
    """The requests of one node.

    Context: the control loop.
    """

    __slots__ = ("requests", "serialising")

    def __init__(self) -> None:
        self.requests: set[TrackedRequest] = set()
        self.serialising = 0  # how many of them are; 0 makes waiting free

    def begin(self, kind: RequestType, offset: int, length: int) -> TrackedRequest:
        """Enter a request. It is not yet allowed to run: `wait()` first."""
        request = TrackedRequest(kind, offset, length)
        self.requests.add(request)
        return request

    def end(self, request: TrackedRequest) -> None:
        """Remove a request and wake everybody who waits for it (row B14.5)."""
        self.requests.discard(request)
        if request.serialising:
            self.serialising -= 1
        if request.waiters:
            for waiter in request.waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def mark_serialising(self, request: TrackedRequest, alignment: int) -> None:
        """From now on nothing may overlap the request's range, widened to `alignment` (row B14.6)."""
        request.widen(alignment)
        if not request.serialising:
            request.serialising = True
            self.serialising += 1

    def blocker(self, request: TrackedRequest) -> TrackedRequest | None:
        """A request that `request` must wait for (rows B14.8 and B14.9)."""
        if not self.serialising:
            return None
        for other in self.requests:
            if (
                other is not request
                and (request.serialising or other.serialising)
                and other.waiting_for is None
                and other.overlaps(request.start, request.end)
            ):
                return other
        return None

    async def wait(self, request: TrackedRequest) -> bool:
        """Wait until nothing is in the way of `request`.

        Returns:
            Whether it waited at all: what was read before may be stale then.
        """
        waited = False
        while (other := self.blocker(request)) is not None:
            request.waiting_for = other
            try:
                await self._ended(other)
            finally:
                request.waiting_for = None
            waited = True
        return waited

    async def settle(self) -> None:
        """Return when every request that is there now has ended; more may have come meanwhile."""
        for request in tuple(self.requests):
            if request in self.requests:
                await self._ended(request)

    async def _ended(self, request: TrackedRequest) -> None:
        waiter = asyncio.get_running_loop().create_future()
        if request.waiters is None:
            request.waiters = []
        request.waiters.append(waiter)
        await waiter

    def serialises(self, start: int, end: int) -> bool:
        """Whether a serialising request touches the range."""
        return bool(self.serialising) and any(
            request.serialising and request.overlaps(start, end) for request in self.requests
        )

    def clear_run(self, start: int, end: int, low: int, high: int) -> tuple[int, int] | None:
        """The largest run inside `low`..`high` around `start`..`end` that no serialising request touches.

        Returns:
            (first byte, byte behind the last), or None if one touches `start`..`end` itself.
        """
        if self.serialising:
            for request in self.requests:
                if not request.serialising:
                    continue
                if request.overlaps(start, end):
                    return None
                if request.end <= start:
                    low = max(low, request.end)
                elif request.start >= end:
                    high = min(high, request.start)
        return low, high
