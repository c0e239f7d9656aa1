"""Options of images as `qemu-img -o` takes them, tells them and lists them (block layer row B35).

What there are comes from drivers' `create_options_type` and `amend_options_type`, the format's before those of the file
it is in. A list of them is read from left to right, and the first that is wrong is named, in QEMU's words; whether
values go together is for the drivers. What was written is kept: QEMU shows it as it was.

Knows nothing about formats.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vhostblk.block.keyval import flatten, parse_items
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.options import BOOLEAN, INTEGER, SIZE, option_name, to_boolean
from vhostblk.block.sizes import read_size
from vhostblk.errors import ConfigError

_HELP = ("help", "?")
_KINDS = {BOOLEAN: "bool (on/off)", INTEGER: "num", SIZE: "size"}
_UINT64 = 1 << 64
_INT64 = 1 << 63
# From here on a column begins.
_COLUMN = 24
# Python refuses to read thousands of digits; these are too large anyway.
_MOST_DIGITS = 40


@lean_dataclass(frozen=True, slots=True)
class ImageOption:
    """What is known of one.

    Attributes:
        kind: what its values are.
        default: as it is told; None: it is not.
    """

    name: str
    kind: str
    about: str
    default: str | None

    def read(self, text: str) -> Any:
        """A value of this kind.

        Raises:
            ConfigError: it is none.
        """
        if self.kind == "size":
            return read_size_option(self.name, text)
        if self.kind == "num":
            return _number(self.name, text)
        if self.kind == "str":
            return text
        try:
            return to_boolean(self.name, text)
        except ConfigError:
            raise ConfigError(f"Parameter '{self.name}' expects 'on' or 'off'") from None


def wants_help(text: str) -> bool:
    """Whether somebody asks which options there are."""
    return any(item.bare in _HELP for item in parse_items(text))


def known_options(*types: type[Any]) -> dict[str, ImageOption]:
    """All options of some sets; where two have the same one, the first counts."""
    found: dict[str, ImageOption] = {}
    for options_type in types:
        for field in dataclasses.fields(options_type):
            if not field.metadata["listed"]:
                continue
            name = option_name(field)
            kind = _KINDS.get(field.metadata["type"], "str")
            told = None if field.metadata["tacit"] else _told(field.default)
            found.setdefault(name, ImageOption(name, kind, field.metadata["about"], told))
    return found


def _told(default: Any) -> str | None:
    if default is None or default is dataclasses.MISSING:
        return None
    if isinstance(default, bool):
        return "on" if default else "off"
    return str(default)


def describe(known: Iterable[ImageOption]) -> str:
    """Lines that tell people what there is."""
    return "".join(
        f"{f'  {one.name}=<{one.kind}>':{_COLUMN}} - {one.about}\n"
        for one in sorted(known, key=lambda one: f"  {one.name}=<{one.kind}>")
    )


class ImageOptions:
    """What somebody has said.

    Args:
        known: what may be said, in the order in which it is told.
    """

    def __init__(self, known: Mapping[str, ImageOption]) -> None:
        self.known = known
        self._texts: dict[str, str] = {}
        self._values: dict[str, Any] = {}

    def say(self, options: Mapping[str, Any] | str) -> None:
        """Take a list as people write it, or options of a program, which may write dashes.

        Raises:
            ConfigError: the first that is wrong; those before it count.
        """
        if isinstance(options, str):
            for item in parse_items(options):
                if item.key != "id":
                    self.set(item.key, item.value)
            return
        for name, value in flatten(options).items():
            self.set(name if name in self.known else name.replace("-", "_"), value)

    def set(self, name: str, value: Any) -> None:
        """Say one; text, or a value of its kind.

        Raises:
            ConfigError: it is wrong.
        """
        if name not in self.known:
            raise ConfigError(f"Invalid parameter '{name}'")
        if isinstance(value, str):
            self._values[name] = self.known[name].read(value)
            self._texts[name] = value
        else:
            self._values[name] = value
            self._texts[name] = ("on" if value else "off") if isinstance(value, bool) else ""

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def get(self, name: str) -> Any:
        """What was said, or None."""
        return self._values.get(name)

    def values(self) -> dict[str, Any]:
        """All that was said, for `options.consume`.

        Raises:
            ConfigError: EFBIG: a size is larger than any can be.
        """
        found = dict(self._values)
        for name, value in found.items():
            kind = self.known[name].kind
            if kind == "size" and value >= _INT64:
                raise ConfigError(f"The size '{name}' is too large", errno.EFBIG)
            if kind == "num":
                # No option takes so large a number, and each knows what it does.
                found[name] = min(value, _INT64 - 1)
        return found

    def __str__(self) -> str:
        """What was said, and defaults, in one line that can be read again."""
        found = []
        for name, one in self.known.items():
            text = self._texts.get(name, one.default)
            if text is None:
                continue
            if name in self._values and one.kind in ("size", "num"):
                number = self._values[name]
                text = str(number - _UINT64 if number >= _INT64 else number)
            elif one.kind == "str":
                text = text.replace(",", ",,")
            found.append(f"{name}={text}")
        return " ".join(found)


def read_size_option(name: str, text: str) -> int:
    """A size.

    Raises:
        ConfigError: it is none.
    """
    try:
        return read_size(text)
    except OverflowError:
        raise ConfigError(f"Value '{text}' is out of range for parameter '{name}'") from None
    except ValueError:
        text = SIZE.qemu_text.format(name=name)
        raise ConfigError(text.partition("\n")[0], qemu_text=text) from None


def _number(name: str, text: str) -> int:
    """As strtoull(3) reads them; what is negative counts from the other end."""
    digits = text.lstrip("\t\n\v\f\r ")
    sign, digits = (digits[0], digits[1:]) if digits[:1] in ("+", "-") else ("", digits)
    try:
        if not digits.isascii() or not digits.isalnum():
            raise ValueError
        if digits[:2].lower() == "0x":
            value = int(digits[: _MOST_DIGITS + 2], 16)
        elif digits.startswith("0"):
            value = int(digits[1:_MOST_DIGITS] or "0", 8)
        else:
            value = int(digits[:_MOST_DIGITS])
    except ValueError:
        raise ConfigError(f"Parameter '{name}' expects a number") from None
    if value >= _UINT64:
        raise ConfigError(f"Value '{text}' is too large for parameter '{name}'")
    return (_UINT64 - value) % _UINT64 if sign == "-" else value
