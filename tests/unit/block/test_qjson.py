"""JSON as QEMU writes it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostblk.block.qjson import format_json, member_order

# What QEMU 7.2 has printed.
IMAGE_INFO = [
    "snapshots",
    "virtual-size",
    "filename",
    "cluster-size",
    "format",
    "actual-size",
    "format-specific",
    "full-backing-filename",
    "backing-filename",
    "dirty-flag",
]
SNAPSHOT = [
    "icount",
    "vm-clock-nsec",
    "name",
    "date-sec",
    "date-nsec",
    "vm-clock-sec",
    "id",
    "vm-state-size",
]
QCOW2 = [
    "compat",
    "compression-type",
    "lazy-refcounts",
    "bitmaps",
    "refcount-bits",
    "corrupt",
    "extended-l2",
]

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@pytest.mark.parametrize("names", [IMAGE_INFO, SNAPSHOT, QCOW2], ids=["image", "snapshot", "qcow2"])
def test_members_come_in_the_order_of_qemu(names: list[str]) -> None:
    assert member_order(sorted(names)) == names
    assert member_order(reversed(names)) == names


@given(value=VALUES, pretty=st.booleans())
def test_what_is_written_is_json_of_the_same_value(value: Any, pretty: bool) -> None:
    assert json.loads(format_json(value, pretty=pretty)) == value


def test_a_line_has_spaces_behind_commas_and_colons() -> None:
    assert (
        format_json({"a": [1, True, None, "x"], "b": {}}) == '{"a": [1, true, null, "x"], "b": {}}'
    )


def test_every_member_of_what_is_pretty_has_a_line_of_its_own() -> None:
    text = """\
{
    "a": [
        1,
        [
        ]
    ],
    "b": {
    }
}"""
    assert format_json({"a": [1, ()], "b": {}}, pretty=True) == text


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("größe", "gr\\u00F6\\u00DFe"),
        ("\U0001f600", "\\uD83D\\uDE00"),
        ("\x00\x1f\x7f\n\t\"\\'/", "\\u0000\\u001F\\u007F\\n\\t\\\"\\\\'/"),
        (b"a\xff".decode(errors="surrogateescape"), "a\\uFFFD"),
    ],
)
def test_what_is_not_ascii_is_escaped(text: str, written: str) -> None:
    assert format_json(text) == f'"{written}"'
