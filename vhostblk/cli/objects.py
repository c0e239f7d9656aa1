"""Objects that several commands can make with `--object`; those of the daemon alone are in `storage_daemon.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vhostblk.block.keyval import flatten, parse_options
from vhostblk.block.leaky_bucket import ThrottleLimits
from vhostblk.block.options import IDENTIFIER, consume, consume_all, option
from vhostblk.errors import ConfigError


@dataclass(frozen=True, slots=True)
class _ThrottleGroupOptions:
    """`--object throttle-group`, besides its limits."""

    id: str = option(IDENTIFIER, about="name of the group")


def parse_object(text: str) -> tuple[str, ThrottleLimits]:
    """The id and the limits of `--object`, for tools that have throttle groups only.

    Raises:
        ConfigError: it is of another kind, or wrong.
    """
    options = flatten(parse_options(text, "qom-type"))
    kind = options.pop("qom-type", None)
    if kind is None:
        raise ConfigError("Parameter 'qom-type' is missing")
    if kind != "throttle-group":
        raise ConfigError(
            f"type '{kind}' is not supported (allowed: throttle-group)",
            qemu_text=f"Parameter 'qom-type' does not accept value '{kind}'",
        )
    return throttle_group(options)


def throttle_group(options: dict[str, Any]) -> tuple[str, ThrottleLimits]:
    """The id and the limits of `--object throttle-group`.

    Args:
        options: flat; consumed.

    Raises:
        ConfigError: one is wrong.
    """
    group = consume(_ThrottleGroupOptions, options)
    return group.id, _throttle_limits(options)


def _throttle_limits(options: dict[str, Any]) -> ThrottleLimits:
    """The limits of a throttle group: `limits.iops-total`, or `x-iops-total` as in older command lines."""
    limits: dict[str, Any] = {}
    for name, value in options.items():
        bare = name.removeprefix("limits.") if name.startswith("limits.") else name[2:]
        if not name.startswith(("limits.", "x-")) or bare in limits:
            raise ConfigError(f"Parameter '{name}' is unexpected")
        limits[bare] = value
    return consume_all(ThrottleLimits, limits, "limits.")
