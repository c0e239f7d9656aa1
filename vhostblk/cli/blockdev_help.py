"""`--blockdev help`, `--export help`, `--object help`, and of one driver or kind: what there is, as it is declared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vhostblk.block.keyval import parse_keyval
from vhostblk.block.options import NodeOptions, describe_options
from vhostblk.block.registry import DriverRegistry
from vhostblk.errors import ConfigError
from vhostblk.export.options import describe_export

_HELP = ("help", "?")


def blockdev_help(text: str, drivers: DriverRegistry) -> str | None:
    """What to print for this value of `--blockdev`; None if it does not ask for help.

    Args:
        drivers: which there are; those that may not be used are not listed.

    Raises:
        ConfigError: it asks about a driver that does not exist.
    """
    if (asked := _asked(text, "driver")) is None:
        return None
    if (name := asked.get("driver")) is None:
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
    if _asked(text, "type") is None:
        return None
    return "\n".join(["vhost-user-blk options:", *_lines(describe_export())])


def object_help(text: str, kinds: Mapping[str, Mapping[str, type]]) -> str | None:
    """What to print for this value of `--object`; None if it does not ask for help.

    Args:
        kinds: which there are, with the declarations of their options by what stands before the names.

    Raises:
        ConfigError: it asks about a kind that does not exist.
    """
    if (asked := _asked(text, "qom-type")) is None:
        return None
    if (kind := asked.get("qom-type")) is None:
        return "\n".join(["Objects (--object KIND,help):", *sorted(kinds)])
    if kind not in kinds:
        raise ConfigError(f"--object: type '{kind}' is not supported (allowed: {', '.join(kinds)})")
    lines = [f"{kind} options:"]
    for prefix, declared in kinds[kind].items():
        lines += [f"  {prefix}{line.lstrip()}" for line in _lines(describe_options(declared))]
    return "\n".join(lines)


def _asked(text: str, implied_key: str) -> dict[str, str] | None:
    """What else a value says that asks for help; None if it does not."""
    words = text.split(",")
    rest = [word for word in words if word not in _HELP]
    return parse_keyval(",".join(rest), implied_key) if len(rest) < len(words) else None


def _lines(options: Iterable[tuple[str, str, str]]) -> list[str]:
    return [f"  {key}=<{values}>  {about}" for key, values, about in options]
