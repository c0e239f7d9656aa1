"""File names: prefixes, relative names, `json:` (row B04)."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vhostblk.block.filename import (
    backing_name,
    combine,
    format_json,
    is_absolute,
    parse_json,
    protocol_prefix,
    temporary_file,
)
from vhostblk.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("nbd:host", "nbd"), ("nbd://host/x", "nbd"), ("./a:b", None), ("/x:y", None), ("plain", None),
     ("", None), (":x", "")],
)  # fmt: skip
def test_protocol_is_what_ends_with_a_colon_before_any_slash(name: str, prefix: str | None) -> None:
    assert protocol_prefix(name) == prefix
    assert is_absolute("/x")
    assert not is_absolute("x")


@pytest.mark.parametrize(
    ("base", "name", "combined"),
    [
        ("/a/b/c", "d", "/a/b/d"),
        ("/a/b/c", "/d", "/d"),
        ("/a/b/", "d", "/a/b/d"),
        ("base", "x", "x"),
        ("dir/base", "../x", "dir/../x"),
        ("http://h/d/base", "x", "http://h/d/x"),
        ("nbd:foo", "x", "nbd:x"),
        ("nbd:a/b:c", "x", "nbd:a/x"),
        ("./a:b", "x", "./x"),
    ],
)
def test_relative_names_are_combined_with_what_is_before_the_last_part(
    base: str, name: str, combined: str
) -> None:
    assert combine(base, name) == combined


@pytest.mark.parametrize(
    ("overlay", "name", "full"),
    [("/a/o", "b", "/a/b"), ("/a/o", "/b", "/b"), ("", "/b", "/b"), ("json:{}", "nbd:x", "nbd:x"),
     ("/a/o", "", "")],
)  # fmt: skip
def test_backing_file_is_named_from_where_its_overlay_is(
    overlay: str, name: str, full: str
) -> None:
    assert backing_name(overlay, name) == full


@pytest.mark.parametrize("overlay", ["", 'json:{"driver": "null-co"}'])
def test_overlay_without_a_place_cannot_anchor_a_relative_name(overlay: str) -> None:
    with pytest.raises(ConfigError, match="Cannot use relative backing file names"):
        backing_name(overlay, "b")


def test_json_names_become_flat_options_and_back() -> None:
    options = {"driver": "raw", "file.driver": "null-co", "size": 512}
    assert parse_json(format_json(options)) == options
    assert parse_json('json:{"file": {"driver": "x", "a": [1]}}') == {
        "file.driver": "x",
        "file.a.0": 1,
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [("json:{", "Could not parse the JSON options"), ("json:", "Could not parse"),
     ("json:[1]", "Invalid JSON object given"), ("json:5", "Invalid JSON object given")],
)  # fmt: skip
def test_json_that_is_broken_and_json_that_is_no_object_have_different_messages(
    name: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_json(name)
    assert caught.value.errno == errno.EINVAL


def test_temporary_files_are_new_empty_and_where_the_user_wants_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    first, second = temporary_file(), temporary_file()
    assert {Path(first), Path(second)} == set(tmp_path.iterdir())
    assert os.path.getsize(first) == 0
    monkeypatch.setenv("TMPDIR", "/" + "x" * 4096)
    with pytest.raises(ConfigError) as caught:
        temporary_file()
    assert caught.value.errno == errno.EOVERFLOW
