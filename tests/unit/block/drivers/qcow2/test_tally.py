"""Counts of clusters, against a dictionary."""

from __future__ import annotations

import errno
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostblk.block.drivers.qcow2.tally import PIECE, Tally, differences
from vhostblk.errors import BlockError

_REACH = 3 * PIECE


@given(
    st.integers(0, 6),
    st.lists(
        st.tuples(st.integers(0, _REACH), st.integers(1, PIECE + 5), st.integers(1, 5)), max_size=6
    ),
)
def test_counts_are_what_was_added_up_to_the_largest(
    order: int, uses: list[tuple[int, int, int]]
) -> None:
    tally, model = Tally(order, 1 << 30), Counter[int]()
    for first, clusters, times in uses:
        expected = []
        for cluster in range(first, first + clusters):
            if (lost := model[cluster] + times - tally.largest) > 0:
                expected.append((cluster, lost))
            model[cluster] = min(model[cluster] + times, tally.largest)
        assert tally.add(first, clusters, times) == expected
    end = max(model, default=-1) + 1
    assert tally.end() == end
    assert [tally.get(cluster) for cluster in range(end)] == [model[at] for at in range(end)]


@given(
    st.sets(st.integers(0, 3 * PIECE - 1).map(lambda at: at // 7), max_size=40),
    st.integers(0, 40),
    st.integers(1, 9),
)
def test_free_clusters_are_found_where_the_first_are(
    used: set[int], start: int, count: int
) -> None:
    tally = Tally(4, 1 << 30)
    for cluster in used:
        tally.add(cluster, 1)
    end = max(used, default=0) + 1
    wanted = next(
        at for at in range(start, end + start + 1) if used.isdisjoint(range(at, at + count))
    )
    assert tally.find_free(start, count, max(end, start)) == wanted


def test_shared_piece_is_copied_before_it_is_changed() -> None:
    one, other = Tally(4, 1 << 20), Tally(4, 1 << 20)
    one.add(5, 10)
    other.share(0, one)
    other.set(6, 9)
    assert (one.get(6), other.get(6)) == (1, 9)
    assert list(differences(one.piece(0), other.piece(0))) == [(6, 1, 9)]


def test_memory_is_bounded() -> None:
    tally = Tally(4, 10 * PIECE * 2)
    for number in range(10):
        tally.add(number * PIECE, 1)
    with pytest.raises(BlockError) as caught:
        tally.add(10 * PIECE, 1)
    assert caught.value.errno == errno.EFBIG


@given(st.integers(0, 2 * PIECE), st.integers(1, 2 * PIECE), st.integers(0, 4 * PIECE))
def test_all_of_a_range_are_one_unless_one_is_not(first: int, clusters: int, other: int) -> None:
    tally = Tally(4, 1 << 30)
    tally.add(first, clusters)
    assert tally.all_are_one(first, clusters)
    assert not tally.all_are_one(first, clusters + 1)
    assert not first or not tally.all_are_one(first - 1, clusters)
    tally.add(other, 1)
    is_inside = first <= other < first + clusters
    assert tally.all_are_one(first, clusters) is not is_inside
