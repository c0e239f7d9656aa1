"""Throttle groups: one budget that several nodes share, in turns (block layer row B30.3).

Theory of operation: a request that finds room in every bucket that concerns it, and nobody waiting before it, goes on
without suspending. Else it queues up at its member. One timer for each direction lets the next one go when there is
room again: of the next member, round robin, that has somebody waiting. A member that is drained is not limited: what
waits there goes on at once (row B26.12), though it still counts.

Knows nothing about nodes.
"""

from __future__ import annotations

import asyncio
from collections import deque

from vhostblk.block.leaky_bucket import LeakyBucket, ThrottleLimits

READ, WRITE = 0, 1
_WAYS = ("read", "write")


class Member:
    """One user of a group: a throttled node."""

    __slots__ = ("queues", "unlimited")

    def __init__(self) -> None:
        # (who waits, bytes), for each direction
        self.queues: tuple[deque[_Waiting], deque[_Waiting]] = (deque(), deque())
        self.unlimited = False


_Waiting = tuple["asyncio.Future[None]", int]


class ThrottleGroup:
    """A budget.

    Args:
        name: the id of the object.

    Context: the control loop.
    """

    def __init__(self, name: str, limits: ThrottleLimits) -> None:
        self.name = name
        self._members: list[Member] = []
        self._turn = [0, 0]  # whose turn is it, for each direction
        self._timers: list[asyncio.TimerHandle | None] = [None, None]
        self._leaked_at = 0.0
        self.limits = limits
        self._bytes: tuple[tuple[LeakyBucket, ...], ...] = ()
        self._requests: tuple[tuple[LeakyBucket, ...], ...] = ()
        self._all: tuple[LeakyBucket, ...] = ()
        self.configure(limits)

    def configure(self, limits: ThrottleLimits) -> None:
        """Change the limits, with empty buckets; who waits is looked at again."""
        self.limits = limits
        totals = {unit: limits.bucket(f"{unit}_total") for unit in ("bps", "iops")}

        def of(unit: str) -> tuple[tuple[LeakyBucket, ...], ...]:
            return tuple(
                tuple(
                    bucket
                    for bucket in (totals[unit], limits.bucket(f"{unit}_{way}"))
                    if bucket.average
                )
                for way in _WAYS
            )

        self._bytes, self._requests = of("bps"), of("iops")
        self._all = tuple({id(b): b for way in self._bytes + self._requests for b in way}.values())
        for way in (READ, WRITE):
            self._stop_timer(way)
            self._go_on(way)

    def join(self) -> Member:
        """Become a member."""
        member = Member()
        self._members.append(member)
        return member

    def leave(self, member: Member) -> None:
        """Undo `join`; nobody waits there any more."""
        assert not any(member.queues)
        self._members.remove(member)

    async def admit(self, member: Member, way: int, length: int) -> None:
        """Return when a request may go on.

        Args:
            way: READ or WRITE.
            length: bytes.
        """
        queue = member.queues[way]
        if member.unlimited or (self._timers[way] is None and not self._wait(way)):
            self._account(way, length)
            return
        waiter = asyncio.get_running_loop().create_future()
        queue.append((waiter, length))
        self._go_on(way)
        try:
            await waiter
        except asyncio.CancelledError:
            if (waiter, length) in queue:
                queue.remove((waiter, length))
            raise

    def release(self, member: Member) -> None:
        """The member is not limited until `limit`: who waits there goes on."""
        member.unlimited = True
        for way in (READ, WRITE):
            queue = member.queues[way]
            while queue:
                self._let_go(way, *queue.popleft())

    def limit(self, member: Member) -> None:
        """Undo `release`."""
        member.unlimited = False

    # ------------------------------------------------------------------

    def _wait(self, way: int) -> float:
        """Seconds until there is room in this direction."""
        now = asyncio.get_running_loop().time()
        for bucket in self._all:
            bucket.leak(now - self._leaked_at)
        self._leaked_at = now
        return max(
            (bucket.wait() for bucket in self._bytes[way] + self._requests[way]), default=0.0
        )

    def _account(self, way: int, length: int) -> None:
        for bucket in self._bytes[way]:
            bucket.fill(length)
        size = self.limits.iops_size
        units = max(length / size, 1) if size else 1
        for bucket in self._requests[way]:
            bucket.fill(units)

    def _let_go(self, way: int, waiter: asyncio.Future[None], length: int) -> None:
        if not waiter.done():
            self._account(way, length)
            waiter.set_result(None)

    def _go_on(self, way: int) -> None:
        """Let go who may, and set the timer for the next one."""
        while self._timers[way] is None and (member := self._next(way)) is not None:
            seconds = self._wait(way)
            if seconds > 0:
                loop = asyncio.get_running_loop()
                self._timers[way] = loop.call_later(seconds, self._timer_fired, way)
            else:
                self._let_go(way, *member.queues[way].popleft())
                self._turn[way] = self._members.index(member) + 1

    def _timer_fired(self, way: int) -> None:
        self._timers[way] = None
        self._go_on(way)

    def _stop_timer(self, way: int) -> None:
        timer, self._timers[way] = self._timers[way], None
        if timer is not None:
            timer.cancel()

    def _next(self, way: int) -> Member | None:
        count = len(self._members)
        for step in range(count):
            member = self._members[(self._turn[way] + step) % count]
            if member.queues[way]:
                return member
        return None
