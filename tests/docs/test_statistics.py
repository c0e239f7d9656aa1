"""docs/statistics.md has the layout that readers in other languages rely on, and the keys of the JSON output."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tests.docs.documents import read, table
from vhostblk import native
from vhostblk.cli import stats
from vhostblk.export import stats_layout as layout
from vhostblk.export.statistics import QueueStatistics
from vhostblk.export.stats_layout import PageFlag, PageHeader
from vhostblk.export.stats_reader import PageCopy
from vhostblk.native import binding

TEXT = read("docs/statistics.md")
HEADER = PageHeader("e", 1, 1, 0, 1, 1)


def test_header_has_the_fields_of_the_code() -> None:
    documented = [
        (int(row["offset"]), int(row["bytes"]), row["field"]) for row in table(TEXT, "Header")
    ]
    assert documented == [
        (layout.header_offset(name), struct.calcsize(form), name)
        for name, form in layout.HEADER_FIELDS
    ]


def test_numbers_in_the_header_are_those_of_the_code() -> None:
    meanings = {row["field"]: row["meaning"] for row in table(TEXT, "Header")}
    names = [name for name, _ in layout.HEADER_FIELDS]
    values = dict(zip(names, layout.HEADER.unpack(HEADER.pack()), strict=True))
    for name in ("header_size", "queue_stride", "queue_size", "operations", "operation_size"):
        assert meanings[name].endswith(f": {values[name]}"), name
    for name in ("version", "latency_buckets", "latency_divisions"):
        assert re.search(rf"(^|: ){values[name]}$", meanings[name]), name
    assert values["magic"] == b"VBSTATS\0"
    assert f"Version {layout.VERSION}." in TEXT
    assert (PageFlag.PARTIAL, PageFlag.NATIVE) == (1 << 0, 1 << 1)
    assert "bit 0: some queues could not be counted here; bit 1: the engine" in meanings["flags"]


def test_queues_and_operations_have_the_counters_of_the_code() -> None:
    operations = [
        (at * layout.OPERATION_WORDS * 8, f"op[{at}]", name)
        for at, name in enumerate(layout.OPERATIONS)
    ]
    fields = [
        ((layout.QUEUE_FIELDS_AT + at) * 8, name) for at, name in enumerate(layout.QUEUE_FIELDS)
    ]
    rows = table(TEXT, "Counters of a queue")
    documented = [(int(row["offset"]), row["field"]) for row in rows]
    assert documented == [(offset, field) for offset, field, _ in operations] + fields
    names = [re.match(r"\w+", row["meaning"]) for row in rows[: len(operations)]]
    assert [name and name[0] for name in names] == list(layout.OPERATIONS)
    rows = table(TEXT, "Counters of an operation")
    documented = [(int(row["offset"]), row["field"]) for row in rows]
    assert documented == [
        (at * 8, name) for at, name in enumerate((*layout.OPERATION_FIELDS, "latency"))
    ]


@pytest.mark.skipif(not native.available, reason="the engine is not built")
def test_queues_and_operations_are_the_structs_of_the_engine() -> None:
    ffi = binding.ffi
    for heading, struct_name in (
        ("Counters of a queue", "struct vb_queue_stats"),
        ("Counters of an operation", "struct vb_op_stats"),
    ):
        rows = table(TEXT, heading)
        for row in rows:
            name, _, index = row["field"].rstrip("]").partition("[")
            path: tuple[Any, ...] = (name, int(index)) if index else (name,)
            assert ffi.offsetof(struct_name, *path) == int(row["offset"]), row["field"]
        found = {row["field"].partition("[")[0] for row in rows}
        assert found == {name for name, _ in ffi.typeof(struct_name).fields}


def test_bounds_of_buckets_are_as_written() -> None:
    assert "`bound(b) = b`; from there `bound(b) = (4 + b % 4) << (b / 4 - 1)`" in TEXT
    for b in range(layout.LATENCY_BUCKETS):
        assert layout.latency_bound(b) == (b if b <= 3 else (4 + b % 4) << (b // 4 - 1))


def keys(value: Any, path: str = "") -> Iterator[str]:
    """Paths to everything that is no object, as the table writes them."""
    if isinstance(value, dict) and path != "exports[].total":
        for name, inner in value.items():
            if path.endswith(".operations"):
                yield path
                yield from keys(inner, "operations.*")
            else:
                yield from keys(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from keys(value[0], f"{path}[]")
    else:
        yield path


def test_json_has_exactly_the_keys_that_are_documented() -> None:
    page = PageCopy("vhostblk-1-e", True, 1, HEADER, {0: QueueStatistics()})
    shown = stats.as_json([stats.since_opened(page)], stats.Pages(), None)
    assert shown["version"] == 1
    documented = [row["key"] for row in table(TEXT, "JSON")]
    assert sorted(documented) == sorted(set(keys(shown)))
    assert shown["exports"][0]["total"].keys() == shown["exports"][0]["queues"][0].keys() - {
        "queue"
    }
