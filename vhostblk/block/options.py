"""Typed options: each is declared once, with its QEMU name, type, default and help.

An option set is a frozen dataclass whose fields are made by `option()`. `consume()` takes from a
flat dictionary what the set understands and leaves the rest, so that the last stage can name the
first leftover (block layer rows B05.6, B05.13).

Knows nothing about drivers: they declare their own sets.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from vhostblk.block.keyval import flatten, parse_keyval, parse_options
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.errors import ConfigError

__all__ = [
    "NodeOptions",
    "choice",
    "consume",
    "consume_all",
    "describe_options",
    "flatten",
    "immutable_options",
    "leftover",
    "list_of",
    "option",
    "option_name",
    "option_names",
    "parse_keyval",
    "parse_options",
    "refuse_changes",
    "strong_options",
    "to_boolean",
    "to_identifier",
    "to_integer",
    "to_size",
    "to_string",
    "word",
    "words_of",
]

T = TypeVar("T")

_SIZE = r"(0[xX][0-9a-fA-F]+|[0-9]+(?:\.[0-9]+)?)([bBkKmMgGtTpPeE]?)\Z"
_SUFFIXES = "BKMGTPE"
_INT64_MAX = (1 << 63) - 1
# More than any number that fits; Python refuses to read thousands of digits.
_DIGITS = 64
_IDENTIFIER = r"[A-Za-z][A-Za-z0-9\-._]*\Z"


@lean_dataclass(frozen=True, slots=True)
class OptionType:
    """How a value is read, and what messages and help call it."""

    read: Callable[[str, Any], Any]
    name: str
    is_list: bool = False  # `read` is given what is under the name, with the numbers as keys
    item: type[Any] | None = None  # the option set of each item of a list: `list_of`
    # What QEMU's image tools say of a value that is none; {name} and {value} stand for both.
    qemu_text: str = ""


def to_boolean(name: str, value: Any) -> bool:
    """`on`/`off` (and yes/no, true/false, y/n) or a JSON boolean."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        word = value.lower()
        if word in ("on", "yes", "true", "y"):
            return True
        if word in ("off", "no", "false", "n"):
            return False
    raise ConfigError(f"Parameter '{name}' expects 'on' or 'off', not '{value}'")


def to_size(name: str, value: Any) -> int:
    """Bytes, with an optional suffix K, M, G, T, P or E (powers of 1024), or a JSON number."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _INT64_MAX:
        return value
    if isinstance(value, str) and len(value) <= _DIGITS and (match := re.match(_SIZE, value)):
        number, suffix = match.groups()
        scale: int = 1024 ** _SUFFIXES.index(suffix.upper() or "B")
        if number[:2].lower() == "0x":
            size = int(number, 16) * scale
        elif "." in number:
            whole, fraction = number.split(".")
            size = int(whole) * scale + int(fraction) * scale // 10 ** len(fraction)
        else:
            size = int(number) * scale
        if size <= _INT64_MAX:
            return size
    raise ConfigError(
        f"Parameter '{name}' expects a size from 0 to {_INT64_MAX}, with an optional suffix "
        f"k, M, G, T, P or E, not '{value}'"
    )


def to_integer(name: str, value: Any) -> int:
    """A whole number that is not negative and fits into 63 bits."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _INT64_MAX:
        return value
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= _DIGITS:
        number = int(value)
        if number <= _INT64_MAX:
            return number
    raise ConfigError(f"Parameter '{name}' expects a number from 0 to {_INT64_MAX}, not '{value}'")


def to_string(name: str, value: Any) -> str:
    """A string; JSON could write one that no C function, and no path, can hold."""
    if isinstance(value, str) and "\0" not in value:
        return value
    raise ConfigError(f"Parameter '{name}' expects a string, not '{value}'")


def to_identifier(name: str, value: Any) -> str:
    """The id of an object or export, as QEMU wants it."""
    if isinstance(value, str) and re.match(_IDENTIFIER, value):
        return value
    raise ConfigError(
        f"Parameter '{name}' expects an identifier (a letter, then letters, digits, '-', '.' or "
        f"'_'), not '{value}'"
    )


BOOLEAN = OptionType(to_boolean, "on|off", qemu_text="Parameter '{name}' expects 'on' or 'off'")
SIZE = OptionType(
    to_size,
    "size",
    qemu_text="Parameter '{name}' expects a non-negative number below 2^64\n"
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
    "and exabytes, respectively.",
)
INTEGER = OptionType(to_integer, "number", qemu_text="Parameter '{name}' expects a number")
STRING = OptionType(to_string, "string")
IDENTIFIER = OptionType(
    to_identifier,
    "string",
    qemu_text="Parameter '{name}' expects an identifier\n"
    "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
)


def choice(*values: str, qemu_text: str = "invalid parameter value: {value}") -> OptionType:
    """One of several words.

    Args:
        qemu_text: see `OptionType`.
    """

    def read(name: str, value: Any) -> str:
        if value in values:
            return str(value)
        raise ConfigError(
            f"Parameter '{name}' does not accept value '{value}' (allowed: {', '.join(values)})"
        )

    return OptionType(read, "|".join(values), qemu_text=qemu_text)


def word(*values: str, said: str = "") -> OptionType:
    """One of several words, of options for images.

    Args:
        said: what QEMU's image tools call the option.
    """
    name = said or "{name}"
    return choice(*values, qemu_text=f"Parameter '{name}' does not accept value '{{value}}'")


def list_of(item: type[Any]) -> OptionType:
    """A list of option sets: `name.0.key=value,name.1.key=value`, or a list in JSON."""

    def read(name: str, flat: Any) -> tuple[Any, ...]:
        items: list[Any] = []
        while left := _below(flat, str(len(items))):
            where = f"{name}.{len(items)}."
            items.append(consume_all(item, left, where))
        for key in flat:
            raise ConfigError(f"Parameter '{name}.{key}' is unexpected")
        return tuple(items)

    return OptionType(read, "list", is_list=True, item=item)


def words_of(*values: str) -> OptionType:
    """A list of words: `name.0=word,name.1=word`, or a list in JSON."""
    word = choice(*values)

    def read(name: str, flat: Any) -> tuple[str, ...]:
        items: list[str] = []
        while str(len(items)) in flat:
            number = str(len(items))
            items.append(word.read(f"{name}.{number}", flat.pop(number)))
        for key in flat:
            raise ConfigError(f"Parameter '{name}.{key}' is unexpected")
        return tuple(items)

    return OptionType(read, "list", is_list=True)


def _below(flat: dict[str, Any], name: str) -> dict[str, Any]:
    """Take what is under a name."""
    prefix = f"{name}."
    keys = [key for key in flat if key.startswith(prefix)]
    return {key.removeprefix(prefix): flat.pop(key) for key in keys}


def option(
    kind: OptionType,
    default: Any = dataclasses.MISSING,
    *,
    about: str,
    name: str = "",
    mutable: bool = False,
    strong: bool = False,
    missing: str = "",
    tacit: bool = False,
    listed: bool = True,
) -> Any:
    """A field of an option set.

    Args:
        default: without one, the option is required.
        name: QEMU's name, dots included; by default the field's name with dashes.
        mutable: a reopen may change it (row B34.3).
        strong: it decides which bytes the node shows, so it is part of the node's name (row B41.2).
        missing: what QEMU's image tools say where it is required, and is not there.
        tacit: image tools do not tell its default. listed: they tell it at all (`image_options.py`).
    """
    metadata = {
        "type": kind,
        "about": about,
        "name": name,
        "mutable": mutable,
        "strong": strong,
        "missing": missing,
        "tacit": tacit,
        "listed": listed,
    }
    return dataclasses.field(default=default, metadata=metadata)


def option_name(field: dataclasses.Field[Any]) -> str:
    """QEMU's name of an option."""
    return str(field.metadata["name"]) or field.name.replace("_", "-")


def option_names(options_type: type[Any]) -> frozenset[str]:
    """QEMU's names of all options of a set."""
    return frozenset(option_name(field) for field in dataclasses.fields(options_type))


def consume(options_type: type[T], flat: dict[str, Any], where: str = "") -> T:
    """Take from `flat` the options of this set.

    Args:
        flat: dotted keys; what is understood is removed.
        where: prefix for names in messages (`file.` for a child's options).

    Raises:
        ConfigError: a bad value, or a required option that is missing.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(options_type):  # type: ignore[arg-type]
        name = option_name(field)
        kind = field.metadata["type"]
        if kind.is_list:
            if flat.get(name) == []:
                del flat[name]
            values[field.name] = kind.read(f"{where}{name}", _below(flat, name))
        elif name in flat:
            values[field.name] = _read(kind, name, flat.pop(name), where)
        elif field.default is dataclasses.MISSING:
            raise ConfigError(
                f"Parameter '{where}{name}' is missing", qemu_text=field.metadata["missing"]
            )
    return options_type(**values)


def _read(kind: OptionType, name: str, value: Any, where: str) -> Any:
    try:
        return kind.read(f"{where}{name}", value)
    except ConfigError as error:
        if not kind.qemu_text or error.qemu_text != str(error):
            raise
        text = kind.qemu_text.format(name=name, value=value)
        raise ConfigError(str(error), error.errno, qemu_text=text) from None


def consume_all(options_type: type[T], flat: dict[str, Any], where: str = "") -> T:
    """Take the options of this set, which are all there may be.

    Raises:
        ConfigError: as `consume`; or one is not of this set.
    """
    options = consume(options_type, flat, where)
    for name in flat:
        raise ConfigError(f"Parameter '{where}{name}' is unexpected")
    return options


def leftover(
    flat: dict[str, Any],
    driver: str,
    node_name: str,
    where: str,
    options_type: type[Any],
    level: str = "driver",
) -> None:
    """Refuse what is not in the last option set that is going to be consumed.

    Args:
        level: what the driver is: a format, a protocol.

    Raises:
        ConfigError: names the first leftover (row B05.13).
    """
    fields = dataclasses.fields(options_type)
    known = {option_name(field) for field in fields}
    lists = {option_name(field) for field in fields if field.metadata["type"].is_list}
    for name in flat:
        if name not in known and name.partition(".")[0] not in lists:
            node = f" (node '{node_name}')" if node_name else ""
            raise ConfigError(
                f"Block {level} '{driver}'{node} does not support the option '{where}{name}'",
                qemu_text=_no_such_option(level, driver, name),
            )


def _no_such_option(level: str, driver: str, name: str) -> str:
    if level == "protocol":
        return f"Block protocol '{driver}' doesn't support the option '{name}'"
    return f"Block format '{driver}' does not support the option '{name}'"


def strong_options(options: Any, written: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a set that decide about content and are not as by default; names are QEMU's.

    Args:
        written: what has these values, and is there in any case.
    """
    found = {}
    for field in dataclasses.fields(options):
        name, value = option_name(field), getattr(options, field.name)
        if field.metadata["strong"] and (name in written or value != field.default):
            found[name] = written.get(name, value)
    return found


def immutable_options(options_type: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options as written that no reopen may change."""
    mutable = {
        option_name(field)
        for kind in (NodeOptions, options_type)
        for field in dataclasses.fields(kind)
        if field.metadata["mutable"]
    }
    return {name: value for name, value in given.items() if name not in mutable}


def refuse_changes(old: Any, new: Any, where: str = "") -> None:
    """Refuse a reopen that changes what only opening can decide (row B34.3).

    Raises:
        ConfigError: names the first such option.
    """
    for field in dataclasses.fields(new):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if before != after and not field.metadata["mutable"]:
            raise ConfigError(
                f"Cannot change the option '{where}{option_name(field)}' from '{before}' to '{after}'",
                qemu_text=f"Cannot change the option '{option_name(field)}'",
            )


def describe_options(options_type: type[Any]) -> list[tuple[str, str, str]]:
    """(name, values and default, help) of every option, for `--help` and the manual."""
    rows = []
    for field in dataclasses.fields(options_type):
        values = str(field.metadata["type"].name)
        if field.default is dataclasses.MISSING:
            values += " (required)"
        elif field.default not in (None, "", ()):
            default = field.default
            if isinstance(default, bool):
                default = "on" if default else "off"
            values += f" (default: {default})"
        rows.append((option_name(field), values, str(field.metadata["about"])))
    return rows


@lean_dataclass(frozen=True, slots=True)
class NodeOptions:
    """What every node understands, whatever its driver (row B02, "Option keys")."""

    node_name: str | None = option(STRING, None, about="name of the node; generated if absent")
    read_only: bool = option(BOOLEAN, False, about="refuse writes", mutable=True)
    auto_read_only: bool = option(
        BOOLEAN, False, about="open read-only if the file does not allow writing", mutable=True
    )
    discard: str = option(
        choice("ignore", "unmap", "off", "on", qemu_text="Invalid discard option"),
        "ignore",
        about="whether discards reach the file",
        mutable=True,
    )
    detect_zeroes: str = option(
        choice("off", "on", "unmap"),
        "off",
        about="turn writes of zeroes into zero-writes",
        mutable=True,
    )
    force_share: bool = option(
        BOOLEAN, False, about="share the image with any other user; read-only nodes only"
    )
    active: bool = option(
        BOOLEAN, True, about="off: leave the image to whoever has it, until it is needed"
    )
    cache_direct: bool = option(
        BOOLEAN,
        False,
        about="bypass the host's page cache (O_DIRECT)",
        name="cache.direct",
        mutable=True,
    )
    cache_no_flush: bool = option(
        BOOLEAN,
        False,
        about="ignore flushes: fast, and unsafe",
        name="cache.no-flush",
        mutable=True,
    )

    def __post_init__(self) -> None:
        # Row B06.2: on and off are other names.
        words = {"on": "unmap", "off": "ignore"}
        object.__setattr__(self, "discard", words.get(self.discard, self.discard))
        if self.detect_zeroes == "unmap" and self.discard != "unmap":
            raise ConfigError(
                # row B06.4
                "Parameter 'detect-zeroes=unmap' can only be used with 'discard=unmap'",
                qemu_text="setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
            )
        if self.force_share and not self.read_only:
            raise ConfigError(
                "Parameter 'force-share=on' can only be used with 'read-only=on'",
                qemu_text="force-share=on can only be used with read-only images",
            )
