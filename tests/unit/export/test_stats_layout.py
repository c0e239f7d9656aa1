"""The layout of statistics pages: what the engine writes, what readers refuse."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostblk import native
from vhostblk.export import stats_layout as layout
from vhostblk.export.statistics import QueueStatistics
from vhostblk.export.stats_layout import PageError, PageFlag, PageHeader
from vhostblk.native import binding
from vhostblk.vhost.session import MAX_QUEUES

HEADER = PageHeader("vm-1.disk", 4711, 123456789, int(PageFlag.NATIVE), 4, 2, 7, 1)


def patched(name: str, value: int) -> bytes:
    raw = bytearray(HEADER.pack())
    struct.pack_into("@I", raw, layout.header_offset(name), value)
    return bytes(raw)


def test_a_header_is_read_as_it_was_written() -> None:
    assert PageHeader.parse(HEADER.pack()) == HEADER
    assert len(HEADER.pack()) == layout.HEADER.size <= layout.HEADER_SIZE
    assert HEADER.size == layout.HEADER_SIZE + 4 * layout.QUEUE_STRIDE


def test_fields_of_the_header_are_aligned_and_follow_each_other() -> None:
    end = 0
    for name, form in layout.HEADER_FIELDS:
        size = struct.calcsize(form)
        assert layout.header_offset(name) == end
        assert end % min(size, 8) == 0
        end += size
    assert end == layout.HEADER.size


@pytest.mark.parametrize("version", [0, 2, 1 << 31])
def test_another_version_is_refused_by_its_number(version: int) -> None:
    with pytest.raises(PageError, match=f"version {version}; this reader knows 1"):
        PageHeader.parse(patched("version", version))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("header_size", 0),
        ("header_size", 513),
        ("queue_stride", 64),
        ("queue_stride", layout.QUEUE_STRIDE + 4),
        ("queue_size", layout.QUEUE_WORDS * 8 - 8),
        ("queue_size", layout.QUEUE_STRIDE + 8),
        ("operations", 8),
        ("operation_size", 8),
        ("latency_buckets", 161),
        ("latency_divisions", 8),
        ("queues", 1),
        ("queues", 257),
        ("queues_started", 5),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(field: str, value: int) -> None:
    with pytest.raises(PageError, match="contradicts itself"):
        PageHeader.parse(patched(field, value))


def test_what_is_no_page_is_refused() -> None:
    for raw in (b"", HEADER.pack()[:-1], bytes(layout.HEADER.size)):
        with pytest.raises(PageError, match="not a statistics page"):
            PageHeader.parse(raw)


def test_longer_headers_and_queues_of_the_same_version_are_read() -> None:
    longer = replace(HEADER, header_size=1024, queue_stride=layout.QUEUE_STRIDE + 64)
    found = PageHeader.parse(longer.pack())
    assert found.queue_offset(1) == 1024 + layout.QUEUE_STRIDE + 64


def test_flags_that_are_not_known_are_ignored() -> None:
    assert PageHeader.parse(patched("flags", 0xFF02)).flags & PageFlag.NATIVE


def test_the_name_of_an_export_cannot_play_with_a_terminal() -> None:
    evil = replace(HEADER, export="a\x1b[2Jb\n")
    assert PageHeader.parse(evil.pack()).export == "a?[2Jb?"
    long = replace(HEADER, export="ü" * 300)
    assert PageHeader.parse(long.pack()).export.startswith("ü" * 127)


@given(st.integers(0, layout.latency_bound(layout.LATENCY_BUCKETS) - 1))
def test_a_latency_lies_between_the_bounds_of_its_bucket(ns: int) -> None:
    bucket = layout.latency_bucket(ns)
    assert layout.latency_bound(bucket) <= ns < layout.latency_bound(bucket + 1)


def test_a_bucket_is_at_most_a_quarter_wide() -> None:
    for bucket in range(4, layout.LATENCY_BUCKETS):
        low, high = layout.latency_bound(bucket), layout.latency_bound(bucket + 1)
        assert (high - low) * 4 <= low


def test_latencies_beyond_the_last_bucket_are_in_it() -> None:
    assert layout.latency_bucket(1 << 60) == layout.LATENCY_BUCKETS - 1


def test_there_is_room_for_every_queue_that_an_export_may_have() -> None:
    assert layout.MAX_QUEUES == MAX_QUEUES


@pytest.mark.skipif(not native.available, reason="the engine is not built")
def test_words_are_where_the_engine_writes_them() -> None:
    """Each field gets another value through the engine's header; readers find it by its name."""
    ffi = binding.ffi
    assert ffi.sizeof("struct vb_queue_stats") == layout.QUEUE_WORDS * layout.WORD
    assert layout.QUEUE_STRIDE % 64 == 0
    assert len(layout.OPERATIONS) == binding.lib.VB_OPS
    names = [name.removeprefix("VB_OP_").lower() for name in _operations(ffi)]
    assert names == list(layout.OPERATIONS)
    raw = bytearray(layout.QUEUE_WORDS * layout.WORD)
    stats = ffi.from_buffer("struct vb_queue_stats *", raw)
    value = 0
    for operation in stats.op:
        for name in layout.OPERATION_FIELDS:
            value += 1
            setattr(operation, name, value)
        for bucket in range(layout.LATENCY_BUCKETS):
            value += 1
            operation.latency[bucket] = value
    for name in layout.QUEUE_FIELDS:
        value += 1
        field, _, index = name.rstrip("]").partition("[")
        if index:
            getattr(stats, field)[int(index)] = value
        else:
            setattr(stats, field, value)
    read = QueueStatistics.of(memoryview(raw).cast("Q"))
    value = 0
    for counted in read.operations.values():
        for name in layout.OPERATION_FIELDS:
            value += 1
            assert getattr(counted, name) == value
        assert counted.latency == list(range(value + 1, value + 1 + layout.LATENCY_BUCKETS))
        value += layout.LATENCY_BUCKETS
    for name in layout.QUEUE_FIELDS:
        value += 1
        field, _, index = name.rstrip("]").partition("[")
        owner = read.operations[layout.OPERATIONS[int(index)]] if index else read
        assert getattr(owner, field) == value


def _operations(ffi: object) -> list[str]:
    elements: dict[int, str] = ffi.typeof("enum vb_op").elements  # type: ignore[attr-defined]
    return [elements[number] for number in sorted(elements)][:-1]  # the last one is VB_OPS
