"""Files of rules for `blkdebug`: QEMU's configuration format, sections of `key = "value"` lines."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

from vhostblk.errors import ConfigError

_SECTION = re.compile(r'\[([\w-]+)(?:\s+"[^"]*")?\]\Z')
_SETTING = re.compile(r'([\w-]+)\s*=\s*"([^"]*)"\Z')


def read_config(filename: str) -> dict[str, list[dict[str, Any]]]:
    """Section name to its occurrences, each a dictionary of its settings.

    Raises:
        ConfigError: names the file and the line.
    """
    try:
        lines = Path(filename).read_text().splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"Could not read blkdebug config file '{filename}': {reason}",
            getattr(error, "errno", None) or errno.EINVAL,
            qemu_text=f"Could not read blkdebug config file: {reason}",
        ) from None
    sections: dict[str, list[dict[str, Any]]] = {}
    settings: dict[str, Any] | None = None
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        if match := _SECTION.match(line):
            settings = {}
            sections.setdefault(match[1], []).append(settings)
        elif settings is not None and (match := _SETTING.match(line)):
            settings[match[1]] = match[2]
        else:
            raise ConfigError(f"{filename}:{number}: parse error")
    return sections
