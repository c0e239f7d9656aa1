"""`--blockdev help`, `--blockdev driver=X,help`, `--export help`: drivers, and options, as they are declared."""

from __future__ import annotations

from collections.abc import Iterable

from vhostblk.block.keyval import parse_keyval
from vhostblk.block.options import NodeOptions, describe_options
from vhostblk.block.registry import DriverRegistry
from vhostblk.export.options import describe_export

_HELP = ("help", "?")


def blockdev_help(text: str, drivers: DriverRegistry) -> str | None:
    """What to print for this value of `--blockdev`; None if it does not ask for help.

    Args:
        drivers: which there are; those that may not be used are not listed.

    Raises:
        ConfigError: it asks about a driver that does not exist.
    """
    words = text.split(",")
    rest = [word for word in words if word not in _HELP]
    if len(rest) == len(words):
        return None
    name = parse_keyval(",".join(rest), "driver").get("driver")
    if name is None:
        return "\n".join(["Block drivers (--blockdev driver=NAME,help):", *drivers.names()])
    driver = drivers.find(name)
    lines = [f"{name} options:"]
    for key in driver.child_keys:
        lines.append(f"  {key}=<node>  a node's name, or {key}.driver=... and its options")
    for title, options in (("", driver.options_type), ("options of every node:", NodeOptions)):
        lines += [title] if title else []
        lines += _lines(describe_options(options))
    return "\n".join(lines)


def export_help(text: str) -> str | None:
    """What to print for this value of `--export`; None if it does not ask for help."""
    if not any(word in _HELP for word in text.split(",")):
        return None
    return "\n".join(["vhost-user-blk options:", *_lines(describe_export())])


def _lines(options: Iterable[tuple[str, str, str]]) -> list[str]:
    return [f"  {key}=<{values}>  {about}" for key, values, about in options]
