"""`iothread-vq-mapping`: which iothread serves which queues, as QEMU spells it.

Sans-io. A list of iothreads, each with the indices of its queues (`vqs`); or none of them with any, and then the queues
go round. Whether the iothreads exist is found out by who starts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vhostblk.block.options import STRING, OptionType, consume, option, to_integer
from vhostblk.errors import ConfigError

__all__ = ["NAME", "MAPPING", "VqMapping", "assign", "unflatten"]

NAME = "iothread-vq-mapping"


def _read_list(name: str, value: Any) -> list[Any]:
    """What stood in a JSON list, or under the keys 0, 1, 2, …, which is the same."""
    if value == []:
        return []
    if not isinstance(value, Mapping):
        raise ConfigError(f"Parameter '{name}' expects a list, not '{value}'")
    for number in range(len(value)):
        if str(number) not in value:
            raise ConfigError(f"Parameter '{name}.{number}' is missing")
    return [value[str(number)] for number in range(len(value))]


def _read_numbers(name: str, value: Any) -> tuple[int, ...]:
    items = enumerate(_read_list(name, value))
    return tuple(to_integer(f"{name}.{number}", item) for number, item in items)


@dataclass(frozen=True, slots=True)
class VqMapping:
    """An item: an iothread, and its queues if that is said."""

    iothread: str = option(STRING, about="id of the iothread object")
    vqs: tuple[int, ...] = option(OptionType(_read_numbers, "list"), (), about="its queues")


def _read_mapping(name: str, value: Any) -> tuple[VqMapping, ...]:
    items = []
    for number, item in enumerate(_read_list(name, value)):
        where = f"{name}.{number}"
        if not isinstance(item, Mapping):
            raise ConfigError(f"Parameter '{where}' expects an iothread and its vqs, not '{item}'")
        left = dict(item)
        items.append(consume(VqMapping, left, f"{where}."))
        for key in left:
            raise ConfigError(f"Parameter '{where}.{key}' is unexpected")
    return tuple(items)


MAPPING = OptionType(_read_mapping, "list")


def unflatten(flat: dict[str, Any]) -> None:
    """Put the option's own dotted keys together again, in place: what `MAPPING` reads is nested."""
    prefix = f"{NAME}."
    nested: dict[str, Any] = {}
    for name in [name for name in flat if name.startswith(prefix)]:
        *path, last = name.removeprefix(prefix).split(".")
        target = nested
        for part in path:
            target = target.setdefault(part, {})
        target[last] = flat.pop(name)
    if nested:
        flat[NAME] = nested


def assign(
    mapping: tuple[VqMapping, ...], num_queues: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Who serves what.

    Returns:
        The iothreads, and for each queue the number of its own among them; the second is empty if nothing was said.

    Raises:
        ConfigError: in QEMU's words: a queue twice, not at all, or one that is not there; an iothread twice; queues for
            some of the iothreads only.
    """
    names: list[str] = []
    threads: dict[int, int] = {}
    for number, item in enumerate(mapping):
        if item.iothread in names:
            raise ConfigError(f'duplicate IOThread name "{item.iothread}" in {NAME}')
        if bool(item.vqs) != bool(mapping[0].vqs):
            raise ConfigError(
                f"either all items in {NAME} must have vqs or none of them must have it"
            )
        names.append(item.iothread)
        for queue in item.vqs:
            if queue >= num_queues:
                raise ConfigError(
                    f'vq index {queue} for IOThread "{item.iothread}" must be less than '
                    f"num_queues {num_queues} in {NAME}"
                )
            if queue in threads:
                raise ConfigError(
                    f'cannot assign vq {queue} to IOThread "{item.iothread}" because it is '
                    "already assigned"
                )
            threads[queue] = number
    missing = next((queue for queue in range(num_queues) if queue not in threads), num_queues)
    if threads and missing < num_queues:
        raise ConfigError(f"missing vq {missing} IOThread assignment in {NAME}")
    return tuple(names), tuple(threads[queue] for queue in sorted(threads))
