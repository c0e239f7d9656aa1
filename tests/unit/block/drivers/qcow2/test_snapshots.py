"""The table of internal snapshots: what is read, what is refused, and that nothing gets lost."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.block.drivers.qcow2.files import HEADER, BytesFile
from vhostblk.block.drivers.qcow2.snapshots import (
    Losses,
    Snapshot,
    SnapshotTable,
    load_snapshots,
)
from vhostblk.errors import BlockError, ImageError

PLACE = 0x10000

u32, u64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
complete = st.builds(
    Snapshot,
    l1_offset=st.integers(1, 1000).map(lambda cluster: cluster << 16),
    l1_entries=st.integers(0, 1000),
    id=st.text(max_size=20),
    name=st.text(max_size=100),
    seconds=u32,
    nanoseconds=u32,
    vm_clock=u64,
    vm_state_size=u64,
    disk_size=u64,
    icount=u64,
    unknown=st.binary(max_size=1000),
)
older = st.builds(
    dataclasses.replace,
    complete,
    disk_size=st.none() | u64,
    icount=st.none(),
    unknown=st.just(b""),
)


def load(data: bytes, count: int, losses: Losses | None = None) -> SnapshotTable:
    header = dataclasses.replace(HEADER, snapshots=count, snapshots_offset=PLACE if count else 0)
    return asyncio.run(load_snapshots(BytesFile(bytes(PLACE) + data).edge, header, losses))


def refused(data: bytes, count: int = 1) -> str:
    with pytest.raises(ImageError) as caught:
        load(data, count)
    return str(caught.value)


@given(snapshots=st.lists(complete | older, max_size=8))
def test_what_is_written_is_what_is_read(snapshots: list[Snapshot]) -> None:
    data = b"".join(snapshot.to_bytes() for snapshot in snapshots)
    table = load(data + b"\xff" * 100, len(snapshots))
    assert table.snapshots == tuple(snapshots)
    size = HEADER.cluster_size
    places = [(one.l1_offset, one.l1_entries * 8) for one in snapshots if one.has_l1(size)]
    assert table.places(size) == places + ([(PLACE, table.length)] if snapshots else [])
    assert len(data) - 8 < table.length <= len(data)


SNAPSHOT = Snapshot(0x60000, 2, "7", "before", 1, 2, 3, 4, 1 << 30, 5, b"later")


def test_each_field_is_where_the_specification_has_it() -> None:
    data = SNAPSHOT.to_bytes()
    assert struct.unpack_from(">QIHHIIQIIQQQ", data) == (
        *(0x60000, 2, 1, 6, 1, 2, 3, 4, 29, 4, 1 << 30, 5),
    )
    assert data[64:] == b"later7before".ljust(16, b"\0")


def test_state_of_more_than_4_gib_is_not_cut_for_those_who_know_32_bits() -> None:
    data = dataclasses.replace(SNAPSHOT, vm_state_size=(1 << 32) + 4).to_bytes()
    assert struct.unpack_from(">I", data, 32) == (0,)
    assert load(data, 1).snapshots[0].vm_state_size == (1 << 32) + 4


def test_fields_that_are_cut_off_are_not_there() -> None:
    entry = (
        struct.pack(">QIHHIIQII", 0x60000, 2, 1, 1, 0, 0, 0, 9, 12) + bytes(7) + b"\5" + b"\1" * 4
    )
    (found,) = load(entry + b"in", 1).snapshots
    assert (found.vm_state_size, found.disk_size, found.icount) == (5, None, None)
    assert (found.id, found.name) == ("i", "n")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"l1_offset": 0x60200}, "offset invalid"),
        ({"l1_offset": 1 << 57}, "offset invalid"),
        ({"l1_offset": 0}, "offset invalid"),
        ({"l1_entries": (32 << 20) // 8 + 1}, "too large"),
    ],
)
def test_l1_table_that_cannot_be_is_refused_when_it_is_used(
    change: dict[str, Any], why: str
) -> None:
    snapshot = dataclasses.replace(SNAPSHOT, **change)
    table = load(snapshot.to_bytes() + SNAPSHOT.to_bytes(), 2)
    size = HEADER.cluster_size
    with pytest.raises(BlockError, match=why):
        table.snapshots[0].check_l1(size)
    table.snapshots[1].check_l1(size)
    assert table.places(size) == [(0x60000, 16), (PLACE, table.length)]


def test_extra_data_that_are_too_large_are_refused_or_get_smaller() -> None:
    data = dataclasses.replace(SNAPSHOT, unknown=b"u" * 1001).to_bytes() + SNAPSHOT.to_bytes()
    assert refused(data, 2) == "Too much extra metadata in snapshot table entry 0"
    said: list[str] = []
    losses = Losses(said.append)
    table = load(data, 2, losses)
    assert (losses.extra, losses.snapshots) == (1, 0)
    assert table.snapshots == (dataclasses.replace(SNAPSHOT, unknown=b"u" * 1000), SNAPSHOT)
    assert table.length > 2 * len(SNAPSHOT.to_bytes()) + 980


def test_table_that_is_too_large_is_refused_or_gets_smaller() -> None:
    data = dataclasses.replace(SNAPSHOT, name="n" * 65535, id="i" * 65535).to_bytes()
    assert "too big" in refused(data * 600, 600)
    said: list[str] = []
    losses = Losses(said.append)
    table = load(data * 600, 600, losses)
    kept = (64 << 20) // len(data)
    assert (losses.extra, losses.snapshots, len(table.snapshots)) == (0, 600 - kept, kept)
    assert table.length <= 64 << 20
    assert said == [f"Discarding {600 - kept} overhanging snapshots (snapshot table is too big)"]


@given(seed=st.integers(0, 1 << 32))
def test_random_bytes_are_snapshots_or_refused(seed: int) -> None:
    rnd = random.Random(seed)
    data = bytearray(SNAPSHOT.to_bytes() * 3)
    for _ in range(rnd.randrange(1, 6)):
        data[rnd.randrange(len(data))] = rnd.randrange(256)
    try:
        table = load(bytes(data), 3)
    except ImageError:
        return
    assert len(table.snapshots) == 3


def test_snapshots_are_found_by_id_by_name_and_by_either() -> None:
    names = [("1", "a"), ("2", "1"), ("x", "a"), ("30 apples", "2")]
    table = SnapshotTable(0, 0, tuple(Snapshot(0, 0, *pair) for pair in names))

    def which(found: Snapshot | None) -> str | None:
        return None if found is None else found.id

    assert which(table.find("1", None)) == "1"
    assert which(table.find(None, "a")) == "1"
    assert which(table.find("x", "a")) == "x"
    assert which(table.find("2", "a")) is None
    assert which(table.find_either("1")) == "1"
    assert which(table.find_either("a")) == "1"
    assert which(table.find_either("b")) is None
    assert table.next_id() == "31"
    assert SnapshotTable().next_id() == "1"


def test_strings_that_are_too_long_are_refused() -> None:
    with pytest.raises(ImageError, match="name of a snapshot is too long"):
        dataclasses.replace(SNAPSHOT, name="é" * 32768).to_bytes()
