"""The age of the oldest request in flight: never too small, exact where one is alone, bounded where none is stuck."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vhostblk.export.ages import Ages


@given(st.lists(st.one_of(st.none(), st.integers(0, 50)), max_size=200))
def test_oldest_is_never_later_than_the_truth(steps: list[int | None]) -> None:
    """None begins a request; a number ends that one of those in flight."""
    ages = Ages()
    running: list[tuple[int, int]] = []  # when, which half; in the order in which they began
    for now, step in enumerate(steps, 1):
        if step is None:
            running.append((now, ages.begin(now)))
        elif running:
            ages.end(running.pop(step % len(running))[1])
        if not running:
            assert ages.oldest == 0
            continue
        assert 0 < ages.oldest <= running[0][0]


def test_one_at_a_time_is_told_exactly() -> None:
    ages = Ages()
    for now in range(1, 10):
        half = ages.begin(now)
        assert ages.oldest == now
        ages.end(half)


def test_requests_that_overlap_all_the_time_do_not_grow_old() -> None:
    ages = Ages()
    running = [(now, ages.begin(now)) for now in range(1, 9)]
    for now in range(9, 500):
        ages.end(running.pop(0)[1])
        running.append((now, ages.begin(now)))
        assert now - ages.oldest <= 2 * 8 + 1


def test_one_that_is_stuck_grows_old_whatever_overtakes_it() -> None:
    ages = Ages()
    ages.begin(1)
    for now in range(2, 500):
        ages.end(ages.begin(now))
        assert ages.oldest == 1
