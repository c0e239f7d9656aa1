"""QEMU's option syntax."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostblk.block.keyval import flatten, parse_keyval, parse_options
from vhostblk.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("", {}),
        ("a=1", {"a": "1"}),
        ("a=1,b=2", {"a": "1", "b": "2"}),
        ("a=1,a=2", {"a": "2"}),
        ("a=x,,y", {"a": "x,y"}),
        ("a=x,,,b=2", {"a": "x,", "b": "2"}),
        ("a=,,", {"a": ","}),
        ("a=", {"a": ""}),
        ("a=1,", {"a": "1"}),
        ("a=b=c", {"a": "b=c"}),
        ("file.driver=f,file.x.y=1", {"file": {"driver": "f", "x": {"y": "1"}}}),
    ],
)
def test_keyval_text_becomes_nested_options(text: str, parsed: dict[str, Any]) -> None:
    assert parse_keyval(text) == parsed


def test_implied_key_is_for_the_first_value_only() -> None:
    assert parse_options("file,filename=x", "driver") == {"driver": "file", "filename": "x"}
    with pytest.raises(ConfigError, match="Expected '=' after parameter 'oops'"):
        parse_options("file,oops", "driver")
    with pytest.raises(ConfigError, match="Expected '=' after parameter 'file'"):
        parse_options("file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("=1", "Invalid parameter ''"),
        ("a..b=1", "Invalid parameter 'a..b'"),
        (".a=1", "Invalid parameter '.a'"),
        ("file=x,file.driver=y", "'file.\\*' used inconsistently"),
        ("file.driver=y,file=x", "'file.\\*' used inconsistently"),
        ("{", "JSON parse error, premature EOI"),
        ('{"a": 1, "a": 2}', "JSON parse error, duplicate key"),
        ("{} []", "Expecting at most one JSON value"),
    ],
)
def test_bad_syntax_is_one_line_that_names_the_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_options(text, "driver")
    assert "\n" not in str(caught.value)


def test_json_keeps_types_and_lists_become_indices() -> None:
    options = parse_options('{"size": 5, "cache": {"direct": true}, "l": ["a", {"b": 1}]}')
    assert flatten(options) == {"size": 5, "cache.direct": True, "l.0": "a", "l.1.b": 1}


def test_flatten_takes_nested_and_dotted_keys_together() -> None:
    assert flatten({"cache.direct": "on", "cache": {"no-flush": "on"}}) == {
        "cache.direct": "on",
        "cache.no-flush": "on",
    }
    with pytest.raises(ConfigError, match=r"'cache\.direct' is given twice"):
        flatten({"cache.direct": "on", "cache": {"direct": "on"}})


@given(st.dictionaries(st.from_regex(r"[a-z]{1,4}", fullmatch=True), st.text(), min_size=1))
def test_every_value_survives_when_its_commas_are_doubled(options: dict[str, str]) -> None:
    text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())
    assert parse_keyval(text) == options
