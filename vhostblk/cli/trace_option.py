"""`-T`, `--trace` of QEMU's tools: it is read; there are no trace events here, so whichever it names is none."""

from __future__ import annotations

import logging
import os

from vhostblk.block.keyval import parse_flat
from vhostblk.errors import ConfigError

log = logging.getLogger(__name__)

_NAMES = ("enable", "events", "file")


def read_trace_option(text: str) -> bool:
    """Say which events of `[enable=]PATTERN,events=FILE,file=FILE` there are not.

    Returns:
        True if the list of events was asked for, which is empty.

    Raises:
        ConfigError: it is no such option, or the file of events cannot be read.
    """
    given = parse_flat(text, "enable")
    for name in given:
        if name not in _NAMES:
            raise ConfigError(f"Invalid parameter '{name}'")
    patterns = [given["enable"]] if "enable" in given else []
    if "events" in given:
        patterns += _events(given["events"])
    for pattern in patterns:
        if pattern in ("help", "?"):
            return True
        event = pattern.removeprefix("-")
        if "*" not in event:
            warning = f"trace event '{event}' does not exist"
            log.warning("%s", warning, extra={"qemu_warns": warning})
    return False


def _events(path: str) -> list[str]:
    try:
        with open(path, errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {os.strerror(error.errno or 0)}") from None
    return [line for line in lines if line and not line.startswith("#")]
