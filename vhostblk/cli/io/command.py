"""What a command of `vhostblk io` is: a row with its name, its arguments, what it needs, and what it does.

Arguments are declared as fields of a dataclass, made by `flag`, `valued`, `operand` and `operands`, and read by
`parse`. argparse is of no use here: scripts rely on what getopt(3) does, which takes options in any place and complains
about the first thing that is wrong, in words of its own; and what is wrong ends a command, not the program.

Knows nothing about images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from vhostblk.block.permissions import Perm
from vhostblk.errors import ConfigError

if TYPE_CHECKING:
    from vhostblk.cli.io.session import Session

T = TypeVar("T")


class CommandError(Exception):
    """A command has failed. The text is for standard output; there may be none."""


class ComplaintError(CommandError):
    """The same, for standard error."""


class RefusedError(ComplaintError):
    """The same, for standard error, where the program's name comes first."""


class UsageError(ComplaintError):
    """Arguments that make no sense; how to use the command is said, too."""


# ---------------------------------------------------------------------- arguments


@dataclasses.dataclass
class Arguments:
    """Of a command that takes none; base of all others."""

    def check(self) -> None:
        """Look at the options together, before the operands are read.

        Raises:
            CommandError: they do not go together.
        """


def flag(letter: str, *, ends: bool = False, refuse: Callable[[Any], None] | None = None) -> Any:
    """An option without a value: a field that is True if it was given.

    Args:
        ends: whatever comes behind it is not looked at.
        refuse: called with what was found before it, raises CommandError if they do not go together.
    """
    metadata = {"letter": letter, "ends": ends, "refuse": refuse}
    return dataclasses.field(default=False, metadata=metadata)


def valued(letter: str, read: Callable[[str], Any]) -> Any:
    """An option with a value; None if it was not given."""
    return dataclasses.field(default=None, metadata={"letter": letter, "read": read})


def operand(read: Callable[[str], Any]) -> Any:
    """A word that has to be there; they are taken in order."""
    return dataclasses.field(default=None, metadata={"operand": read})


def operands(at_least: int, at_most: int | None = None) -> Any:
    """The words that are left, as they are; the last field."""
    return dataclasses.field(default=(), metadata={"rest": (at_least, at_most)})


def parse(kind: type[T], name: str, words: Sequence[str]) -> T:
    """The arguments of a command; where it has no options, dashes mean nothing.

    Args:
        name: what the command was called.

    Raises:
        CommandError: the first thing that is wrong.
    """
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    options = {field.metadata["letter"]: field for field in fields if "letter" in field.metadata}
    needed = [field for field in fields if "operand" in field.metadata]
    rest = [field for field in fields if "rest" in field.metadata]
    found = kind()
    left: list[str] = []
    if not options:
        left.extend(words)
        words = ()
    valued_letters = {letter for letter, field in options.items() if "read" in field.metadata}
    for letter, text in _getopt(name, words, options.keys(), valued_letters, left):
        field = options[letter]
        read = field.metadata.get("read")
        if field.metadata.get("refuse") is not None:
            field.metadata["refuse"](found)
        try:
            setattr(found, field.name, True if read is None else read(text))
        except ConfigError as error:
            raise RefusedError(error.qemu_text) from None
        if field.metadata.get("ends"):
            return found
    at_least, at_most = rest[0].metadata["rest"] if rest else (0, 0)
    if len(left) < len(needed) + at_least or (
        at_most is not None and len(left) > len(needed) + at_most
    ):
        raise UsageError
    if isinstance(found, Arguments):
        found.check()
    for field, word in zip(needed, left, strict=False):
        setattr(found, field.name, field.metadata["operand"](word))
    if rest:
        setattr(found, rest[0].name, tuple(left[len(needed) :]))
    return found


def _getopt(
    name: str,
    words: Sequence[str],
    letters: Any,
    valued_letters: set[str],
    left: list[str],
) -> Iterator[tuple[str, str]]:
    """getopt(3) with GNU's order: (letter, value) for each option; other words go to `left`."""
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == "--":
            left.extend(words[position:])
            return
        if word == "-" or not word.startswith("-"):
            left.append(word)
            continue
        for index, letter in enumerate(word[1:], 1):
            if letter not in letters:
                raise UsageError(f"{name}: invalid option -- '{letter}'")
            if letter not in valued_letters:
                yield letter, ""
                continue
            value = word[index + 1 :]
            if not value:
                if position == len(words):
                    raise UsageError(f"{name}: option requires an argument -- '{letter}'")
                value = words[position]
                position += 1
            yield letter, value
            break


# ---------------------------------------------------------------------- commands


@dataclasses.dataclass(frozen=True)
class Command:
    """A row of the table.

    Attributes:
        synopsis: its arguments, for people; None: it takes none.
        about: what it does, in a line.
        words: how many words may follow its name, options and all; None: any number.
        takes: its arguments.
        alias: another name.
        details: what `help` says besides.
        needs_image: it fails unless an image is open.
        perm: what it needs to be allowed to do to the image.
    """

    name: str
    run: Callable[[Session, Any], Awaitable[None]]
    synopsis: str | None
    about: str
    words: tuple[int, int | None] = (0, 0)
    takes: type[Arguments] = Arguments
    alias: str = ""
    details: str = ""
    needs_image: bool = True
    perm: Perm = Perm.NONE

    @property
    def usage(self) -> str:
        """One line for `help`, and for those who use it wrongly."""
        return self.usage_as(self.name)

    def usage_as(self, name: str) -> str:
        """The same under another name."""
        synopsis = "" if self.synopsis is None else f" {self.synopsis}"
        return f"{name}{synopsis} -- {self.about}"

    def check_words(self, name: str, count: int) -> None:
        """Refuse what has too few or too many words.

        Args:
            name: what the command was called.

        Raises:
            ComplaintError: says how many there may be.
        """
        at_least, at_most = self.words
        if count >= at_least and (at_most is None or count <= at_most):
            return
        if at_most is None:
            expected = f"at least {at_least}"
        elif at_least == at_most:
            expected = f"{at_least}"
        else:
            expected = f"between {at_least} and {at_most}"
        raise ComplaintError(f"bad argument count {count} to {name}, expected {expected} arguments")
