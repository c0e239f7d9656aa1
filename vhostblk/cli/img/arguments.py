"""Options of a subcommand, declared as the fields of a dataclass and read as getopt_long(3) reads them.

argparse is of no use here: scripts rely on what getopt does (options in any place, names cut short) and on the words
that qemu-img has for what is wrong. The `getopt` of Python's library reads; here are the declarations.

Knows nothing about images.
"""

from __future__ import annotations

import dataclasses
import getopt
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T", bound="Arguments")


class ImgError(Exception):
    """A subcommand has failed; the text is one line for standard error, and the program's name comes first.

    Args:
        message: empty: what there is to say has been said.
        status: the exit code.
        more: further lines.
    """

    def __init__(self, message: str = "", status: int = 1, more: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.more = more


class UsageError(ImgError):
    """The same, for words that make no sense; where to find help is said, too."""


class HelpRequest(Exception):  # noqa: N818 - it is no error
    """`-h` was given."""


def flag(short: str = "", long: str = "") -> Any:
    """An option without a value: True if it was given.

    Args:
        short: a letter, or nothing.
        long: the name behind two dashes, or nothing.
    """
    return dataclasses.field(default=False, metadata={"short": short, "long": long})


def counted(short: str = "", long: str = "") -> Any:
    """An option without a value that may be given several times: how often."""
    metadata = {"short": short, "long": long, "counted": True}
    return dataclasses.field(default=0, metadata=metadata)


def valued(
    short: str = "", long: str = "", read: Callable[[str], Any] = str, default: Any = None
) -> Any:
    """An option with a value, the last one that was given.

    Args:
        read: raises ImgError if the value makes no sense.
    """
    metadata = {"short": short, "long": long, "read": read}
    return dataclasses.field(default=default, metadata=metadata)


def listed(short: str = "", long: str = "", read: Callable[[str], Any] = str) -> Any:
    """An option with a value that may be given several times: all of them, in order."""
    metadata = {"short": short, "long": long, "read": read, "listed": True}
    return dataclasses.field(default=(), metadata=metadata)


@dataclasses.dataclass
class Arguments:
    """What a subcommand was given; the base of all declarations.

    Attributes:
        words: what is no option, in order.
        order: names of the fields of all options, in the order in which they were given.
    """

    words: tuple[str, ...] = ()
    order: tuple[str, ...] = ()

    @classmethod
    def prepare(cls, words: Sequence[str]) -> tuple[Sequence[str], tuple[str, ...]]:
        """Take off words that must not be read as options; they are added to `words` as they are."""
        return words, ()

    def check(self) -> None:
        """Look at everything together.

        Raises:
            ImgError: it does not go together, or something is missing.
        """


@dataclasses.dataclass
class ImageArguments(Arguments):
    """Of a subcommand that opens images.

    Attributes:
        objects: `--object`, as they were given.
        image_opts: names of images are lists of options.
    """

    objects: tuple[str, ...] = listed("", "object")
    image_opts: bool = flag("", "image-opts")


def wants_json(output: str | None) -> bool:
    """What `--output` asks for: JSON, or what people read.

    Raises:
        ImgError: neither.
    """
    if output not in (None, "json", "human"):
        raise ImgError("--output must be used with human or json as argument.")
    return output == "json"


def parse(kind: type[T], words: Sequence[str]) -> T:
    """Read the words of a subcommand.

    Raises:
        HelpRequest: help was asked for.
        ImgError: the first thing that is wrong.
    """
    fields = [field for field in dataclasses.fields(kind) if "short" in field.metadata]
    by_word: dict[str, dataclasses.Field[Any]] = {}
    letters, names = "h", ["help"]
    for field in fields:
        short, long = field.metadata["short"], field.metadata["long"]
        takes_value = "read" in field.metadata
        if short:
            by_word[f"-{short}"] = field
            letters += short + (":" if takes_value else "")
        if long:
            by_word[f"--{long}"] = field
            names.append(long + ("=" if takes_value else ""))
    words, more = kind.prepare(words)
    try:
        given, left = getopt.gnu_getopt(words, letters, names)
    except getopt.GetoptError as error:
        raise _refusal(error, words) from None
    found = kind()
    for word, text in given:
        if word in ("-h", "--help"):
            raise HelpRequest
        _take(found, by_word[word], text)
    found.words = (*left, *more)
    found.check()
    return found


def _take(found: Arguments, field: dataclasses.Field[Any], text: str) -> None:
    before = getattr(found, field.name)
    value: Any
    if field.metadata.get("counted"):
        value = before + 1
    elif "read" not in field.metadata:
        value = True
    else:
        value = field.metadata["read"](text)
        if field.metadata.get("listed"):
            value = (*before, value)
    setattr(found, field.name, value)
    found.order += (field.name,)


def _refusal(error: getopt.GetoptError, words: Sequence[str]) -> UsageError:
    dashed = f"-{error.opt}" if len(error.opt) == 1 else f"--{error.opt}"
    word = next((word for word in words if word.partition("=")[0] == dashed), dashed)
    if "requires argument" in error.msg:
        return UsageError(f"missing argument for option '{word}'")
    return UsageError(f"unrecognized option '{word}'")
