"""JSON as QEMU reads it: what is taken, and QEMU 7.2's words for what is not."""

from __future__ import annotations

from typing import Any

import pytest

from vhostblk.block.json_text import parse_json_text
from vhostblk.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (' {"a": [1, -2, 1.5, 1e2, true, false, null, {}], "b": []}\n',
         {"a": [1, -2, 1.5, 100.0, True, False, None, {}], "b": []}),
        ("{'driver': 'file', 'x': 'say \"no\"'}", {"driver": "file", "x": 'say "no"'}),
        (r'''"\"\'\/\\\b\f\n\r\t"''', "\"'/\\\b\f\n\r\t"),
        (r'"\u00e9A\ud83d\ude00"', "\u00e9A\U0001f600"),
        (r'"\u0041\ud83d\ude00"', "A\U0001f600"),
        ("18446744073709551615", (1 << 64) - 1),
        ("18446744073709551616", float(1 << 64)),
        ("0", 0),
    ],
)  # fmt: skip
def test_values(text: str, value: Any) -> None:
    assert parse_json_text(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting a JSON value"),
        ("1 2", "Expecting at most one JSON value"),
        ("{", "JSON parse error, premature EOI"),
        ("[1", "JSON parse error, premature EOI"),
        ("[1 2]", "JSON parse error, expected separator in list"),
        ("{'a': 1 'b': 2}", "JSON parse error, expected separator in dict"),
        ("{'a' 1}", "JSON parse error, missing : in object pair"),
        ("{1: 1}", "JSON parse error, key is not a string in object"),
        ("{'a': 1, 'a': 2}", "JSON parse error, duplicate key"),
        ("{'a': }", "JSON parse error, expecting value"),
        ("nothing", "JSON parse error, invalid keyword 'nothing'"),
        (r"'\x'", "JSON parse error, invalid escape sequence in string"),
        (r"'\ud83d'", r"JSON parse error, \ud83d is not a valid Unicode character"),
        ("[" * 10000, "JSON nesting depth limit exceeded"),
    ],
)
def test_what_is_wrong_is_said_as_qemu_says_it(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_json_text(text)
    assert str(caught.value) == message
