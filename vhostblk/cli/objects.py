"""Objects that several commands can make with `--object`; those of the daemon alone are in `storage_daemon.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from vhostblk.block.crypto.secret import SecretConfig, Secrets
from vhostblk.block.keyval import flatten, parse_options
from vhostblk.block.leaky_bucket import ThrottleLimits
from vhostblk.block.options import IDENTIFIER, STRING, consume, consume_all, option, word
from vhostblk.block.throttle_group import ThrottleGroup
from vhostblk.errors import ConfigError

if TYPE_CHECKING:
    from vhostblk.block.graph import BlockGraph

Object: TypeAlias = ThrottleLimits | SecretConfig


@dataclass(frozen=True, slots=True)
class _ThrottleGroupOptions:
    """`--object throttle-group`, besides its limits."""

    id: str = option(IDENTIFIER, about="name of the group")


@dataclass(frozen=True, slots=True)
class _SecretOptions:
    """`--object secret`."""

    id: str = option(IDENTIFIER, about="name of the secret", missing="Parameter 'id' is missing")
    data: str | None = option(STRING, None, about="the secret itself, for tests only")
    file: str | None = option(STRING, None, about="a file that has it")
    format: str = option(word("raw", "base64"), "raw", about="how it is written")
    keyid: str | None = option(STRING, None, about="the secret that it is encrypted with")
    iv: str | None = option(STRING, None, about="for that, in base64")


#: The kinds, with their options: declarations, by what stands before the names.
OBJECTS: Mapping[str, Mapping[str, type]] = MappingProxyType(
    {
        "secret": {"": _SecretOptions},
        "throttle-group": {"": _ThrottleGroupOptions, "limits.": ThrottleLimits},
    }
)


def parse_object(text: str) -> tuple[str, Object]:
    """The id and the rest of `--object`, for tools.

    Raises:
        ConfigError: it is of another kind, or wrong.
    """
    options = flatten(parse_options(text, "qom-type"))
    kind = options.pop("qom-type", None)
    if kind is None:
        raise ConfigError("Parameter 'qom-type' is missing")
    if kind not in OBJECTS:
        raise ConfigError(
            f"type '{kind}' is not supported (allowed: {', '.join(OBJECTS)})",
            qemu_text=f"Parameter 'qom-type' does not accept value '{kind}'",
        )
    if kind == "secret":
        config = secret(options)
        return config.name, config
    return throttle_group(options)


@dataclass(frozen=True, slots=True)
class Objects:
    """Those of a run that has several graphs."""

    throttle_groups: dict[str, ThrottleGroup] = field(default_factory=dict)
    secrets: Secrets = field(default_factory=Secrets)


def add_objects(graph: BlockGraph | Objects, objects: Sequence[tuple[str, Object]]) -> None:
    """Make what `parse_object` has read, in this order.

    Raises:
        ConfigError: two have the same name; a secret cannot be had.
    """
    for name, wanted in objects:
        if name in graph.throttle_groups or name in graph.secrets:
            raise ConfigError(
                f"attempt to add duplicate property '{name}' to object (type 'container')"
            )
        if isinstance(wanted, SecretConfig):
            graph.secrets.add(wanted)
        else:
            graph.throttle_groups[name] = ThrottleGroup(name, wanted)


def secret(options: dict[str, Any]) -> SecretConfig:
    """What `--object secret` says.

    Args:
        options: flat; consumed.

    Raises:
        ConfigError: one is wrong.
    """
    if "loaded" in options:
        raise ConfigError("Property 'secret.loaded' is not writable")
    said = consume_all(_SecretOptions, options)
    return SecretConfig(said.id, said.data, said.file, said.format, said.keyid, said.iv)


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
