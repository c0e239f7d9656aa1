"""QEMU's way to write options: `driver=file,node-name=d,filename=a,,b`, dotted keys, or JSON.

`parse_keyval` and `parse_options` give a nested dictionary, `flatten` the flat one with dotted keys
that `options.py` works on (block layer row B05.3 calls it the flatten step).

Knows nothing about which options exist.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from vhostblk.block import json_text
from vhostblk.errors import ConfigError

log = logging.getLogger(__name__)

# Compiled when it is used: many runs of a tool read no such thing.
_KEY = r"[A-Za-z0-9_][A-Za-z0-9_\-]*(\.[A-Za-z0-9_][A-Za-z0-9_\-]*)*\Z"

# Of image tools: anything up to what ends it; a value, in which two commas are one.
_NAME = re.compile(r"([^=,]*)(=|,|\Z)", re.DOTALL)
_VALUE = re.compile(r"((?:[^,]+|,,)*)(?:,|\Z)", re.DOTALL)

# Nobody writes such; but what is nested is walked recursively.
_MAX_DEPTH = 64


def parse_options(text: str, implied_key: str | None = None) -> dict[str, Any]:
    """Parse an option argument: JSON if it starts with a brace, `key=value,...` otherwise.

    Args: implied_key: what the first value is for when it comes without a key (`--blockdev
        file,filename=x`).

    Raises:
        ConfigError: bad syntax.
    """
    if text.lstrip().startswith("{"):
        parsed = json_text.parse_json_text(text)
        assert isinstance(parsed, dict)
        return parsed
    return parse_keyval(text, implied_key)


def parse_keyval(text: str, implied_key: str | None = None) -> dict[str, Any]:
    """Parse `key=value,...`; `,,` in a value stands for one comma; values stay strings.

    Dotted keys nest: `file.driver=x` gives `{"file": {"driver": "x"}}`. The last of equal keys
    wins, as in QEMU.

    Raises:
        ConfigError: bad syntax, or a key used both as a value and as a prefix.
    """
    result: dict[str, Any] = {}
    if not text:
        return result
    for index, item in enumerate(_split(text)):
        key, separator, value = item.partition("=")
        if not separator:
            if index == 0 and implied_key is not None and item:
                key, value = implied_key, item
            else:
                raise ConfigError(f"Expected '=' after parameter '{item}'")
        if not re.match(_KEY, key) or key.count(".") > _MAX_DEPTH:
            raise ConfigError(f"Invalid parameter '{key}'")
        _insert(result, key, value)
    return result


class Item(NamedTuple):
    """One of a list of options.

    Attributes:
        bare: the word, if it had no value.
    """

    key: str
    value: str
    bare: str | None = None


def parse_items(text: str, implied_key: str | None = None) -> list[Item]:
    """Parse `key=value,...` as image tools take it: dotted keys stay as they are, and any key will do, again and again.

    `key` alone is `key=on`, `nokey` is `key=off`.

    Args:
        implied_key: what the first value is for when it comes without a key.
    """
    found: list[Item] = []
    position = 0
    while position < len(text):
        match = _NAME.match(text, position)
        assert match is not None
        key, ends_with = match.groups()
        position = match.end()
        if ends_with == "=":
            value, position = _item_value(text, position)
            found.append(Item(key, value))
        elif implied_key is not None and not found:
            value, position = _item_value(text, match.start())
            found.append(Item(implied_key, value))
        elif key.startswith("no"):
            found.append(Item(key[2:], "off", key))
        else:
            found.append(Item(key, "on", key))
    return found


def parse_flat(text: str, implied_key: str | None = None) -> dict[str, str]:
    """Parse what `parse_items` does; the last of equal keys wins.

    `key` alone is logged, because QEMU will not have it for ever.

    Raises:
        ConfigError: nested too deeply.
    """
    result: dict[str, str] = {}
    for key, value, bare in parse_items(text, implied_key):
        if bare is not None:
            _warn_of_flag(bare, key, value)
        if key.count(".") > _MAX_DEPTH:
            raise ConfigError(f"Invalid parameter '{key}'")
        result[key] = value
    return result


def _item_value(text: str, start: int) -> tuple[str, int]:
    """A value, and where the next key begins."""
    match = _VALUE.match(text, start)
    assert match is not None
    return match[1].replace(",,", ","), match.end()


def _warn_of_flag(written: str, key: str, value: str) -> None:
    warning = f"short-form boolean option '{written}' deprecated\nPlease use {key}={value} instead"
    log.warning("%s", warning, extra={"qemu_warns": warning})


def _split(text: str) -> list[str]:
    """Cut at single commas; two of them are one literal comma."""
    items = [""]
    position = 0
    while position < len(text):
        comma = text.find(",", position)
        if comma < 0:
            items[-1] += text[position:]
            break
        items[-1] += text[position:comma]
        if text[comma + 1 : comma + 2] == ",":
            items[-1] += ","
            position = comma + 2
        else:
            items.append("")
            position = comma + 1
    # QEMU allows one comma at the very end.
    if len(items) > 1 and not items[-1]:
        items.pop()
    return items


def _insert(target: dict[str, Any], key: str, value: str) -> None:
    *prefixes, last = key.split(".")
    path = ""
    for prefix in prefixes:
        path = f"{path}.{prefix}" if path else prefix
        target = target.setdefault(prefix, {})
        if not isinstance(target, dict):
            raise ConfigError(f"Parameters '{path}.*' used inconsistently")
    if isinstance(target.get(last), dict):
        raise ConfigError(f"Parameters '{key}.*' used inconsistently")
    target[last] = value


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested (or already dotted) options as one flat dictionary with dotted keys.

    A list without items stays one: nobody may have an option of that name.

    Raises:
        ConfigError: a key occurs both nested and dotted.
    """
    flat: dict[str, Any] = {}
    for key, value in options.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found = flatten(value, f"{name}.")
        elif isinstance(value, list) and value:
            found = flatten({str(index): item for index, item in enumerate(value)}, f"{name}.")
        else:
            found = {name: value}
        for inner, item in found.items():
            if inner in flat:
                raise ConfigError(f"Parameter '{inner}' is given twice")
            flat[inner] = item
    return flat
