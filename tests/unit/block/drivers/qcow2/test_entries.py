"""L2 entries against a reading of the specification that looks at one byte at a time."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.block.drivers.qcow2.files import HEADER as PLAIN
from vhostblk.block.drivers.qcow2.entries import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    EntryReader,
    Kind,
)
from vhostblk.block.drivers.qcow2.header import Header, Incompatible
from vhostblk.block.flags import StatusFlag
from vhostblk.errors import ImageError

CLUSTER = 1 << 16
EXTENDED = dataclasses.replace(PLAIN, incompatible=Incompatible.EXTENDED_L2)
EXTERNAL = dataclasses.replace(PLAIN, incompatible=Incompatible.DATA_FILE)
OLD = dataclasses.replace(PLAIN, version=2)
BASE = 7 * CLUSTER


def byte_of(header: Header, table: array[int], offset: int) -> tuple[Kind, int]:
    """What the specification says of one byte, and where it is (-1: nowhere)."""
    cluster, within = divmod(offset - BASE, CLUSTER)
    entry = table[2 * cluster] if header.has_subclusters else table[cluster]
    if entry & COMPRESSED:
        return Kind.COMPRESSED, -1
    host = entry & 0xFFFFFFFFFFFE00 & ~1
    place = host + within if host else -1
    if header.has_subclusters:
        bit = within // (CLUSTER // 32)
        bitmap = table[2 * cluster + 1]
        if bitmap >> bit & 1:
            return Kind.NORMAL, place
        return (Kind.ZERO if bitmap >> bit + 32 & 1 else Kind.UNALLOCATED), place
    if entry & 1:
        return Kind.ZERO, place
    return (Kind.NORMAL if host else Kind.UNALLOCATED), place


hosts = st.integers(0, 6).map(lambda number: number * CLUSTER)
plain_entries = st.one_of(
    st.just(0), st.just(1), hosts, hosts.map(lambda host: host | 1), hosts.map(lambda host: host | COPIED),
    st.integers(0, 1 << 50).map(lambda low: COMPRESSED | low),
)  # fmt: skip


@st.composite
def extended_entries(draw: st.DrawFn) -> tuple[int, int]:
    if draw(st.integers(0, 5)) == 0:
        return COMPRESSED | draw(st.integers(0, 1 << 50)), 0
    host = draw(hosts)
    allocated = draw(st.sampled_from([0, 0xFFFFFFFF, 0xFF, 0x0F0F0F0F])) if host else 0
    zero = draw(st.sampled_from([0, 0xFFFFFFFF, 0xFF00, 0xF0000000])) & ~allocated
    return host, allocated | zero << 32


def is_copied(header: Header, table: array[int], offset: int) -> bool:
    entry = table[(offset - BASE) // CLUSTER * (2 if header.has_subclusters else 1)]
    return bool(entry & COPIED and entry & 0xFFFFFFFFFFFE00)


def check(header: Header, table: array[int], clusters: int, offset: int) -> None:
    run = EntryReader(header).run_at(table, BASE, offset, BASE + clusters * CLUSTER)
    assert run.start <= offset < run.end
    kind, _ = byte_of(header, table, offset)
    assert run.kind is kind
    step = header.subcluster_size
    for at in range(run.start, run.end, step):
        expected = -1 if not run.has_host or kind is Kind.COMPRESSED else run.host + at - run.start
        assert byte_of(header, table, at) == (kind, expected)
        assert kind is Kind.COMPRESSED or is_copied(header, table, at) == run.copied
    if kind is Kind.COMPRESSED:
        return
    # It is the longest one.
    for outside in (run.start - step, run.end):
        if BASE <= outside < BASE + clusters * CLUSTER:
            neighbour, where = byte_of(header, table, outside)
            continues = run.host + outside - run.start if run.has_host else -1
            other = is_copied(header, table, outside) != run.copied
            assert neighbour is not kind or where != continues or other


@given(st.lists(plain_entries, min_size=1, max_size=12), st.data())
def test_longest_run_of_plain_entries(entries: list[int], data: st.DataObject) -> None:
    offset = BASE + data.draw(st.integers(0, len(entries) * CLUSTER - 1))
    check(PLAIN, array("Q", entries), len(entries), offset)


@given(st.lists(extended_entries(), min_size=1, max_size=8), st.data())
def test_longest_run_of_subclusters(entries: list[tuple[int, int]], data: st.DataObject) -> None:
    offset = BASE + data.draw(st.integers(0, len(entries) * CLUSTER - 1))
    check(EXTENDED, array("Q", [word for pair in entries for word in pair]), len(entries), offset)


LENGTHS = st.sampled_from([1, 2, 15, 16, 17, 18, 80, 81, 82, 83, 300])
BITS = st.sampled_from([0, 1, COPIED])
RUNS = st.lists(st.tuples(LENGTHS, st.integers(0, 6), BITS), min_size=1, max_size=6)


@given(RUNS, st.booleans(), st.data())
def test_longest_run_where_runs_are_long(
    runs: list[tuple[int, int, int]], extended: bool, data: st.DataObject
) -> None:
    words = []
    for length, first, bits in runs:
        for number in range(length):
            host = (first + number) * CLUSTER if first else 0
            if not extended:
                words.append(host | (bits if first else bits & 1))
            else:
                bitmap = (0xFFFFFFFF if bits == COPIED else 0xFF00000000) if host else 0
                words += [host | (bits & COPIED if host else 0), bitmap]
    clusters = len(words) // (2 if extended else 1)
    offset = BASE + data.draw(st.integers(0, clusters * CLUSTER - 1))
    check(EXTENDED if extended else PLAIN, array("Q", words), clusters, offset)


_DATA, _ZERO, _PLACE = map(int, (StatusFlag.DATA, StatusFlag.ZERO, StatusFlag.OFFSET_VALID))


@given(
    st.lists(
        st.tuples(plain_entries, st.sampled_from([1, 2, 64, 65, 150, 700]), st.booleans()),
        min_size=1,
        max_size=4,
    ),
    st.data(),
)
def test_statuses_of_a_table_are_its_longest_runs(
    runs: list[tuple[int, int, bool]], data: st.DataObject
) -> None:
    table = array("Q")
    for entry, count, grows in runs:
        step = CLUSTER if grows and entry & OFFSET_MASK and not entry & COMPRESSED else 0
        table.extend(entry + at * step for at in range(count))
    end = BASE + len(table) * CLUSTER
    offset = data.draw(st.integers(BASE, end - 1)) // 512 * 512
    limit = data.draw(st.integers(offset + 1, end + 511)) // 512 * 512
    limit = min(max(limit, offset + 512), end)
    at, before = offset, (-1, 0)
    for flags, count, place in EntryReader(PLAIN).statuses(table, BASE, offset, limit):
        assert count > 0
        assert (flags, place) != before or flags & int(StatusFlag.COMPRESSED)
        for byte in {at, at + count - 1, *range(-(-at // CLUSTER) * CLUSTER, at + count, CLUSTER)}:
            kind, host = byte_of(PLAIN, table, byte)
            assert bool(flags & _ZERO) == (kind is Kind.ZERO)
            assert bool(flags & _DATA) == (kind in (Kind.NORMAL, Kind.COMPRESSED))
            assert bool(flags & _PLACE) == (host >= 0)
            assert host < 0 or host == place + byte - at
        at += count
        before = flags, place + count if flags & _PLACE else 0
    assert at == limit


def check_statuses(
    header: Header, table: array[int], clusters: int, offset: int, limit: int
) -> None:
    reader, at = EntryReader(header), offset
    before = (-1, 0)
    for flags, count, place in reader.statuses(table, BASE, offset, limit):
        assert count > 0
        assert (flags, place) != before or flags & int(StatusFlag.COMPRESSED)
        while count:
            run = reader.run_at(table, BASE, at, BASE + clusters * CLUSTER)
            has_place = run.has_host and run.kind is not Kind.COMPRESSED
            assert bool(flags & _ZERO) == (run.kind is Kind.ZERO)
            assert bool(flags & _DATA) == (run.kind in (Kind.NORMAL, Kind.COMPRESSED))
            assert bool(flags & _PLACE) == has_place
            assert place == (run.host + at - run.start if has_place else 0)
            step = min(run.end - at, count)
            at, count, place = at + step, count - step, place + step if has_place else 0
        before = flags, place
    assert at == limit


def any_range(data: st.DataObject, clusters: int) -> tuple[int, int]:
    first = data.draw(st.integers(0, clusters * CLUSTER // 512 - 1))
    last = data.draw(st.integers(first + 1, clusters * CLUSTER // 512))
    return BASE + first * 512, BASE + last * 512


@given(st.lists(st.tuples(extended_entries(), LENGTHS, st.booleans()), min_size=1), st.data())
def test_statuses_of_subclusters_are_those_of_their_runs(
    runs: list[tuple[tuple[int, int], int, bool]], data: st.DataObject
) -> None:
    words = []
    for (entry, bitmap), count, grows in runs:
        step = CLUSTER if grows and entry and not entry & COMPRESSED else 0
        for number in range(count):
            words += [entry + number * step, bitmap]
    clusters = len(words) // 2
    check_statuses(EXTENDED, array("Q", words), clusters, *any_range(data, clusters))


@given(st.lists(st.tuples(st.sampled_from("usz"), LENGTHS), min_size=1, max_size=8), st.data())
def test_statuses_of_an_external_data_file_are_those_of_its_runs(
    runs: list[tuple[str, int]], data: st.DataObject
) -> None:
    kinds = [kind for kind, count in runs for _ in range(count)]
    entries: dict[str, Callable[[int], int]] = {
        "u": lambda place: 0,
        "s": lambda place: COPIED | place,
        "z": lambda place: 1,
    }
    table = array("Q", [entries[kind](BASE + n * CLUSTER) for n, kind in enumerate(kinds)])
    check_statuses(EXTERNAL, table, len(kinds), *any_range(data, len(kinds)))


def test_first_cluster_of_an_external_data_file_is_at_place_0() -> None:
    table = array("Q", [COPIED, COPIED | CLUSTER, 0])
    found = EntryReader(EXTERNAL).statuses(table, 0, 0, 3 * CLUSTER)
    assert found == [(_DATA | _PLACE, 2 * CLUSTER, 0), (0, CLUSTER, 0)]


@pytest.mark.parametrize("header", [EXTENDED, EXTERNAL])
def test_statuses_of_parts_end_before_one_that_is_wrong(header: Header) -> None:
    bitmap = [0xFFFFFFFF] if header is EXTENDED else []
    table = array("Q")
    for number in range(8):
        table.extend([COPIED | number * CLUSTER | (512 if number == 6 else 0), *bitmap])
    reader = EntryReader(header)
    found = reader.statuses(table, 0, CLUSTER, 8 * CLUSTER)
    assert found == [(_DATA | _PLACE, 5 * CLUSTER, CLUSTER)]
    with pytest.raises(ImageError, match="unaligned"):
        reader.statuses(table, 0, 6 * CLUSTER, 8 * CLUSTER)


def test_statuses_end_before_an_entry_that_is_wrong() -> None:
    table = array("Q", [COPIED | at * CLUSTER for at in range(1, 300)])
    table[200] |= 512
    end = BASE + len(table) * CLUSTER
    found = EntryReader(PLAIN).statuses(table, BASE, BASE, end)
    assert found == [(_DATA | _PLACE, 200 * CLUSTER, CLUSTER)]
    with pytest.raises(ImageError, match="unaligned"):
        EntryReader(PLAIN).statuses(table, BASE, BASE + 200 * CLUSTER, end)


def test_run_ends_where_offsets_do() -> None:
    last = (1 << 56) - CLUSTER
    run = EntryReader(PLAIN).run_at(array("Q", [last - CLUSTER, last, 1 << 56]), 0, 0, 3 * CLUSTER)
    assert (run.start, run.end) == (0, 2 * CLUSTER)


def test_run_begins_where_offsets_do() -> None:
    table = array("Q", [0, CLUSTER, 2 * CLUSTER])
    run = EntryReader(PLAIN).run_at(table, 0, 2 * CLUSTER, 3 * CLUSTER)
    assert (run.start, run.host) == (CLUSTER, CLUSTER)


def test_run_of_many_clusters_and_of_one_that_is_there_twice() -> None:
    hosts = [2, 3, 4, 5, 5, 6]
    table = array("Q", [host * CLUSTER for host in hosts])
    for at in range(4):
        run = EntryReader(PLAIN).run_at(table, 0, at * CLUSTER, 6 * CLUSTER)
        assert (run.start, run.end, run.host) == (0, 4 * CLUSTER, 2 * CLUSTER)
    run = EntryReader(PLAIN).run_at(table, 0, 4 * CLUSTER, 6 * CLUSTER)
    assert (run.start, run.end, run.host) == (4 * CLUSTER, 6 * CLUSTER, 5 * CLUSTER)


def test_run_may_end_where_nobody_looks() -> None:
    table = array("Q", [0] * 100)
    run = EntryReader(PLAIN).run_at(table, 0, 0, CLUSTER)
    assert (run.start, run.end) == (0, CLUSTER)


def test_compressed_cluster_says_where_it_is_and_how_long_at_most() -> None:
    # cluster_bits 16: 54 bits of offset, then the number of further sectors.
    table = array("Q", [COMPRESSED | 3 << 54 | 1000])
    run = EntryReader(PLAIN).run_at(table, 0, 5, CLUSTER)
    assert (run.kind, run.host, run.compressed) == (Kind.COMPRESSED, 1000, 4 * 512 - 488)


@pytest.mark.parametrize(
    ("header", "entries", "message"),
    [
        (PLAIN, [0x10200], "unaligned"),
        (OLD, [1], "pre-v3"),
        (EXTENDED, [0x10000, 1 << 32 | 1], "Invalid cluster entry"),
        (EXTENDED, [0, 1], "Invalid cluster"),
        (EXTERNAL, [0x10000 | COPIED], "does not match guest cluster offset"),
        (EXTERNAL, [COMPRESSED], "external data file"),
    ],
)
def test_wrong_entries_are_errors(header: Header, entries: list[int], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        EntryReader(header).run_at(array("Q", entries), 0, 0, CLUSTER)


def test_wrong_entry_does_not_spoil_its_neighbours() -> None:
    table = array("Q", [0x10200, 0x20000, 0x30000, 0x40200])
    run = EntryReader(PLAIN).run_at(table, 0, CLUSTER, 4 * CLUSTER)
    assert (run.start, run.end) == (CLUSTER, 3 * CLUSTER)


def test_first_cluster_of_an_external_data_file_is_at_0() -> None:
    run = EntryReader(EXTERNAL).run_at(array("Q", [COPIED, CLUSTER | COPIED, 0]), 0, 0, 3 * CLUSTER)
    assert (run.kind, run.host, run.end) == (Kind.NORMAL, 0, 2 * CLUSTER)
    # Zeroes have no place there.
    run = EntryReader(EXTERNAL).run_at(array("Q", [COPIED | 1]), 0, 0, CLUSTER)
    assert (run.kind, run.has_host) == (Kind.ZERO, False)


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=2, max_size=8), st.booleans())
def test_hostile_tables_give_a_run_or_an_error(words: list[int], extended: bool) -> None:
    table = array("Q", words[: len(words) // 2 * 2])
    header = EXTENDED if extended else PLAIN
    clusters = len(table) // (2 if extended else 1)
    for offset in range(0, clusters * CLUSTER, header.subcluster_size):
        try:
            run = EntryReader(header).run_at(table, 0, offset, clusters * CLUSTER)
        except ImageError:
            continue
        assert 0 <= run.start <= offset < run.end <= clusters * CLUSTER
        assert 0 <= run.host < 1 << 62
        assert run.compressed <= 2 * CLUSTER + 512
