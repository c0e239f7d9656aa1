"""Runs coroutines in every order, or in many: concurrency bugs are hunted, not waited for.

Theory of operation: `ScheduledLoop` is an event loop without files and without a clock of its own. Whenever several
callbacks are ready somebody *chooses* which one goes on, so a task is overtaken at any await that suspends it. Time
passes only when nobody is ready, at once; when nobody is ready and nothing is scheduled, everybody waits for somebody:
`DeadlockError`.

First come, first served is what asyncio does. `explore` runs a scenario with every schedule that departs from it at
most so many times, which finds most bugs with two departures, and is exhaustive where a scenario is small; `sample`
runs it with random schedules; `cancel_everywhere` cancels one task at each of its awaits in turn. All say which
schedule has failed, and `replay` repeats it.

VHOSTBLK_HUNT=FACTOR does so many times more of all that (`make hunt`), with other random numbers each time.

Knows nothing about what it runs.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Mapping
from functools import partial
from typing import Any, TypeVar

__all__ = [
    "HUNT",
    "DeadlockError",
    "ScheduledLoop",
    "cancel_everywhere",
    "explore",
    "replay",
    "run",
    "sample",
    "turns",
]

T = TypeVar("T")
Scenario = Callable[[], Coroutine[Any, Any, Any]]
Choose = Callable[[int], int]

HUNT = int(os.environ.get("VHOSTBLK_HUNT", "1"))
"""How many times more than usual is to be tried."""

_SEED = 1 if HUNT == 1 else time.time_ns() % 1_000_000_000
_LEAST_TIME = 1e-6  # seconds
_MOST_STEPS = 100_000


class DeadlockError(AssertionError):
    """Nobody can go on."""


class _Ready(deque[Any]):
    """What is ready, handed out as somebody chooses."""

    def __init__(self, choose: Choose) -> None:
        super().__init__()
        self.choose = choose
        self.probe: Callable[[], None] | None = None
        self.steps = 0

    def popleft(self) -> Any:
        if self.probe is not None:
            self.probe()
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise DeadlockError(f"no end after {_MOST_STEPS} steps")
        if len(self) > 1:
            chosen = self.choose(len(self))
            if chosen:
                handle = self[chosen]
                del self[chosen]
                return handle
        return super().popleft()


class ScheduledLoop(asyncio.BaseEventLoop):
    """See the module.

    Args:
        choose: which of so many callbacks goes on next; 0: the one that has been ready for longest.
    """

    def __init__(self, choose: Choose = lambda count: 0) -> None:
        super().__init__()
        self._ready = _Ready(choose)
        self._selector = self  # the loop's idea of where events come from
        self._now = 1.0
        self.complaints: list[str] = []
        self.set_exception_handler(self._complain)

    @property
    def probe(self) -> Callable[[], None] | None:
        """Called before every step."""
        return self._ready.probe

    @probe.setter
    def probe(self, probe: Callable[[], None] | None) -> None:
        self._ready.probe = probe

    def time(self) -> float:
        """Seconds; as many as timers made it."""
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        """Nothing happens outside: time passes.

        Raises:
            DeadlockError: for ever.
        """
        if timeout is None:
            waiting = sorted(task.get_name() for task in asyncio.all_tasks(self))
            raise DeadlockError(f"all of them wait: {', '.join(waiting)}")
        if not self._ready:
            self._now += max(timeout, _LEAST_TIME)
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        assert not event_list

    def _write_to_self(self) -> None:
        """There is nobody to wake."""

    def _complain(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.complaints.append(f"{context.get('message')}: {context.get('exception')!r}")

    def finish(self) -> None:
        """Close the loop.

        Raises:
            AssertionError: a task is left, or one has failed without anybody looking.
        """
        left = [task for task in asyncio.all_tasks(self) if not task.done()]
        try:
            for task in left:
                task.cancel()
            if left:
                self._ready.choose = lambda count: 0
                self.run_until_complete(asyncio.wait(left))
        finally:
            self.close()
        assert not left, f"left behind: {left}"
        assert not self.complaints, self.complaints


def run(scenario: Scenario, choose: Choose) -> None:
    """Run a scenario to its end with one schedule.

    Raises:
        DeadlockError: it has none. Else what the scenario raises.
    """
    loop = ScheduledLoop(choose)
    try:
        loop.run_until_complete(scenario())
    except BaseException:
        try:
            loop.finish()
        except AssertionError:
            pass  # a consequence
        raise
    loop.finish()


def replay(scenario: Scenario, departures: Mapping[int, int]) -> list[int]:
    """Run a scenario with one schedule.

    Args:
        departures: at which choice which one; 0 at all others.

    Returns:
        How many could have been chosen, for every choice.
    """
    counts: list[int] = []

    def choose(count: int) -> int:
        counts.append(count)
        return min(departures.get(len(counts) - 1, 0), count - 1)

    try:
        run(scenario, choose)
    except BaseException as error:
        error.add_note(f"schedule: {dict(departures)}")
        raise
    return counts


def explore(scenario: Scenario, *, departures: int = 2, limit: int = 300) -> int:
    """Run a scenario with every schedule that departs from first come, first served at most so often.

    Args:
        limit: runs; some of the schedules, where there are more. Multiplied by `HUNT`.

    Returns:
        The number of runs.
    """
    choice = random.Random(_SEED)
    pending: list[dict[int, int]] = [{}]
    runs = 0
    while pending and runs < limit * HUNT:
        schedule = pending.pop(choice.randrange(len(pending)))
        counts = replay(scenario, schedule)
        runs += 1
        if len(schedule) < departures:
            start = max(schedule, default=-1) + 1
            pending += (
                {**schedule, position: other}
                for position in range(start, len(counts))
                for other in range(1, counts[position])
            )
    return runs


def sample(scenario: Scenario, *, count: int = 100) -> None:
    """Run a scenario with random schedules.

    Args:
        count: of runs. Multiplied by `HUNT`.
    """
    for number in range(count * HUNT):
        seed = _SEED + number
        choice = random.Random(seed)
        haste = choice.choice([0.05, 0.3, 1.0])

        def choose(count: int, choice: random.Random = choice, haste: float = haste) -> int:
            return choice.randrange(count) if choice.random() < haste else 0

        try:
            run(scenario, choose)
        except BaseException as error:
            error.add_note(f"seed: {seed}")
            raise


class _Cancelled:
    """Awaits a coroutine, and cancels the task that does at its n-th suspension."""

    def __init__(self, coro: Coroutine[Any, Any, T], at: int) -> None:
        self._coro = coro
        self._at = at
        self.reached = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        sent: Any = None
        error: BaseException | None = None
        while True:
            try:
                future = self._coro.send(sent) if error is None else self._coro.throw(error)
            except StopIteration as stop:
                return stop.value
            error = None
            if self.reached == self._at:
                task = asyncio.current_task()
                assert task is not None
                # Takes effect at this very await; some make it wait until they are over.
                task.cancel()
            self.reached += 1
            try:
                sent = yield future
            except BaseException as exc:
                error = exc


def cancel_everywhere(
    scenario: Callable[[Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]]], Any],
    *,
    most: int = 200,
    schedules: int = 3,
) -> int:
    """Run a scenario again and again, and cancel one of its tasks at the first await, at the second, and so on.

    Args:
        scenario: is given a function that makes the task in question from a coroutine; it must not mind that the task
            ends with CancelledError.
        schedules: how many random ones to try each with. Multiplied by `HUNT`.

    Returns:
        How many awaits there were.
    """
    for at in range(most):
        reached = 0
        for number in range(schedules * HUNT):
            victims: list[_Cancelled] = []

            def start(
                coro: Coroutine[Any, Any, Any], victims: list[_Cancelled] = victims, at: int = at
            ) -> asyncio.Task[Any]:
                victim = _Cancelled(coro, at)
                victims.append(victim)

                async def await_it() -> Any:
                    return await victim

                return asyncio.get_running_loop().create_task(await_it(), name="victim")

            choice = random.Random(_SEED + number)

            def choose(count: int, choice: random.Random = choice, number: int = number) -> int:
                return choice.randrange(count) if number else 0

            try:
                run(partial(scenario, start), choose)
            except BaseException as error:
                error.add_note(f"cancelled at await {at}, schedule {number}")
                raise
            reached = max(reached, *(victim.reached for victim in victims))
        if reached <= at:
            gc.collect()  # a coroutine that nobody has awaited shows now
            return at
    raise AssertionError(f"no end after {most} awaits")


async def turns(count: int) -> None:
    """Let others go on, so many times."""
    for _ in range(count):
        await asyncio.sleep(0)
