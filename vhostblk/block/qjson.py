"""JSON as QEMU writes it: the order of members, escapes and indentation.

QEMU keeps the members of an object in a hash table and writes them as they come out of that. Programs compare what is
written, as text, so the order is part of the interface: of `json:` file names, and of what image tools print.

Knows nothing about images.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_BUCKETS = 512
_UINT32 = 0xFFFF_FFFF
_INDENT = 4
_ESCAPED = re.compile(r'[\\"]|[^ -~]')
_SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_REPLACEMENT = 0xFFFD


def member_order(names: Iterable[str]) -> list[str]:
    """The order in which QEMU writes the members of an object.

    Args:
        names: in the order in which they came into the object: it decides where hashes collide.
    """
    latest_first = list(names)[::-1]
    return sorted(latest_first, key=_bucket)


def _bucket(name: str) -> int:
    """Where QEMU's hash table has a name: a sum of its bytes, each shifted by five bits more, modulo 24."""
    data = name.encode(errors="surrogateescape")
    total = 0x238F13AF * len(data)
    for index, byte in enumerate(data):
        total += byte << (index * 5 % 24)
    return ((1103515243 * total + 12345) & _UINT32) % _BUCKETS


def format_json(value: Any, *, pretty: bool = False) -> str:
    """A value as QEMU writes it.

    Args:
        value: what `json.dumps` takes, with strings as names.
        pretty: each member in a line of its own.
    """
    return _format(value, "\n" if pretty else "")


def _format(value: Any, newline: str) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            return f"{value:.17g}"
        case str():
            return f'"{_ESCAPED.sub(_escape, value)}"'
        case Mapping():
            inner = _indented(newline)
            members = (
                f"{_format(name, '')}: {_format(value[name], inner)}"
                for name in member_order(value)
            )
            return f"{{{_join(members, newline)}}}"
        case _:
            inner = _indented(newline)
            return f"[{_join((_format(item, inner) for item in value), newline)}]"


def _indented(newline: str) -> str:
    return newline and newline + " " * _INDENT


def _join(items: Iterable[str], newline: str) -> str:
    """What is between the brackets of a list or an object, whose end is at `newline`."""
    inner = _indented(newline)
    text = f",{inner or ' '}".join(items)
    return f"{inner}{text}{newline}" if text else newline


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    if char in _SHORT:
        return _SHORT[char]
    code = ord(char)
    if code > 0xFFFF:
        high, low = divmod(code - 0x10000, 0x400)
        return f"\\u{0xD800 + high:04X}\\u{0xDC00 + low:04X}"
    if 0xD800 <= code <= 0xDFFF:
        code = _REPLACEMENT  # a byte of a file name that is no UTF-8
    return f"\\u{code:04X}"
