"""QEMU's way to write options: `driver=file,node-name=d,filename=a,,b`, dotted keys, or JSON.

`parse_keyval` and `parse_options` give a nested dictionary, `flatten` the flat one with dotted keys
that `options.py` works on (block layer row B05.3 calls it the flatten step).

Knows nothing about which options exist.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from vhostblk.block.json_text import parse_json_text
from vhostblk.errors import ConfigError

log = logging.getLogger(__name__)

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-]*(\.[A-Za-z0-9_][A-Za-z0-9_\-]*)*\Z")

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
        parsed = parse_json_text(text)
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
        if not _KEY.match(key) or key.count(".") > _MAX_DEPTH:
            raise ConfigError(f"Invalid parameter '{key}'")
        _insert(result, key, value)
    return result


def parse_flat(text: str, implied_key: str | None = None) -> dict[str, str]:
    """Parse `key=value,...` as image tools take it: dotted keys stay as they are, and any key will do.

    `key` alone is `key=on`, `nokey` is `key=off`; either is logged, because QEMU will not have it for ever.

    Args:
        implied_key: what the first value is for when it comes without a key.

    Raises:
        ConfigError: nested too deeply.
    """
    result: dict[str, str] = {}
    position = 0
    while position < len(text):
        match = _NAME.match(text, position)
        assert match is not None
        key, ends_with = match.groups()
        position = match.end()
        if ends_with == "=":
            value, position = _flat_value(text, position)
        elif implied_key is not None and not result:
            value, position = _flat_value(text, match.start())
            key = implied_key
        else:
            value = "on"
            if key.startswith("no"):
                key, value = key[2:], "off"
            _warn_of_flag(match[1], key, value)
        if key.count(".") > _MAX_DEPTH:
            raise ConfigError(f"Invalid parameter '{key}'")
        result[key] = value
    return result


def _flat_value(text: str, start: int) -> tuple[str, int]:
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

    Raises:
        ConfigError: a key occurs both nested and dotted, or both as a value and as a prefix.
    """
    flat: dict[str, Any] = {}
    for key, value in options.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found = flatten(value, f"{name}.")
        elif isinstance(value, list):
            found = flatten({str(index): item for index, item in enumerate(value)}, f"{name}.")
        else:
            found = {name: value}
        for inner, item in found.items():
            if inner in flat:
                raise ConfigError(f"Parameter '{inner}' is given twice")
            flat[inner] = item
    if not prefix:
        for name in flat:
            parts = name.split(".")
            for count in range(1, len(parts)):
                parent = ".".join(parts[:count])
                if parent in flat:
                    raise ConfigError(
                        f"Parameters '{parent}.*' used inconsistently",
                        qemu_text="Cannot reference an existing block device with additional options "
                        "or a new filename",
                    )
    return flat
