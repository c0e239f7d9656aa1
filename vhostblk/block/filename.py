"""File names as users and images write them: protocol prefixes, relative names, `json:` (block layer row B04).

Text in, text or options out; nothing is looked at on the disk, except by `temporary_file`.
"""

from __future__ import annotations

import errno
import os
import tempfile
from typing import Any

from vhostblk.block import json_text, qjson
from vhostblk.block.keyval import flatten
from vhostblk.errors import ConfigError

_JSON = "json:"
_PATH_MAX = 4096


def protocol_prefix(name: str) -> str | None:
    """What is before the colon, if the first `:` comes before any `/`; `./a:b` is a path (row B04.1)."""
    before, colon, _ = name.partition(":")
    return before if colon and "/" not in before else None


def is_json(name: str) -> bool:
    """Whether this is not a name but options."""
    return name.startswith(_JSON)


def is_absolute(name: str) -> bool:
    """Whether a path does not depend on where it is looked up from (row B04.2)."""
    return name.startswith("/")


def combine(base: str, name: str) -> str:
    """`name` as seen from the file `base` (row B04.3)."""
    if is_absolute(name):
        return name
    start = 0 if protocol_prefix(base) is None else base.index(":") + 1
    return base[: max(start, base.rfind("/") + 1)] + name


def backing_name(overlay: str, name: str) -> str:
    """The whole name of the backing file that the image `overlay` calls `name` (row B04.4).

    Raises:
        ConfigError: the name is relative, and the overlay's own name is no place to begin from.
    """
    if not name or protocol_prefix(name) is not None or is_absolute(name):
        return name
    if not overlay or is_json(overlay):
        raise ConfigError(f"Cannot use relative backing file names for '{overlay}'")
    return combine(overlay, name)


def parse_json(name: str) -> dict[str, Any]:
    """The options in a `json:{...}` name, flat (row B04.5).

    Raises:
        ConfigError: it is not JSON, or not an object.
    """
    try:
        parsed = json_text.parse_json_text(name.removeprefix(_JSON))
    except ConfigError as error:
        raise ConfigError(f"Could not parse the JSON options: {error}") from None
    if not isinstance(parsed, dict):
        raise ConfigError("Invalid JSON object given")
    return flatten(parsed)


def format_json(options: dict[str, Any]) -> str:
    """The name that stands for these options; `parse_json` reads it."""
    return _JSON + qjson.format_json(options)


def temporary_file() -> str:
    """Create an empty file for as long as somebody needs it (row B04.12).

    Raises:
        ConfigError: EOVERFLOW if the folder's name is too long.
        OSError: the kernel's.
    """
    folder = os.environ.get("TMPDIR") or "/var/tmp"
    if len(folder) + len("/vl.XXXXXXXX") >= _PATH_MAX:
        raise ConfigError("The name of a temporary file is too long", errno.EOVERFLOW)
    fd, path = tempfile.mkstemp(prefix="vl.", dir=folder)
    try:
        os.close(fd)
    except OSError:
        os.unlink(path)
        raise
    return path
