"""Options of a subcommand, declared as the fields of a dataclass and read as getopt_long(3) reads them.

argparse is of no use here: scripts rely on what getopt does (options in any place, names cut short) and on the words
that qemu-img has for what is wrong. `option_reader.py` reads; here are the declarations.

Knows nothing about images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.cli.option_reader import OptionError, OptionReader

T = TypeVar("T", bound="Arguments")


class ImgError(Exception):
    """A subcommand has failed; the text is one line for standard error, and the program's name comes first.

    Args:
        message: empty: what there is to say has been said.
        status: the exit code.
        more: further lines.
        hint: what may be said besides, without the program's name; ends its lines itself.
    """

    def __init__(
        self, message: str = "", status: int = 1, more: Sequence[str] = (), hint: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.more = more
        self.hint = hint


class UsageError(ImgError):
    """The same, for words that make no sense; where to find help is said, too."""


class HelpRequest(Exception):  # noqa: N818 - it is no error
    """`-h` was given; the text is for standard error."""


def flag(short: str = "", long: str = "") -> Any:
    """An option without a value: True if it was given.

    Args:
        short: a letter, or nothing.
        long: the name behind two dashes, or nothing.
    """
    return dataclasses.field(default=False, metadata={"short": short, "long": long})


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


def option_list(text: str) -> str:
    """`-o`: what can be put between others of its kind.

    Raises:
        ImgError: the commas of it and the next one would be taken for something else.
    """
    if not text or text.startswith(",") or (len(text) - len(text.rstrip(","))) % 2:
        raise ImgError(f"Invalid option list: {text}")
    return text


def object_options(text: str) -> tuple[str, Any]:
    """`--object`: an id, and what it is for.

    Raises:
        ImgError: it is something else, or wrong.
    """
    from vhostblk.cli.objects import parse_object
    from vhostblk.errors import ConfigError

    try:
        return parse_object(text)
    except ConfigError as error:
        raise ImgError(error.qemu_text) from None


@lean_dataclass(slots=True)
class Arguments:
    """What a subcommand was given; the base of all declarations.

    Attributes:
        words: what is no option, in order.
        order: names of the fields of all options, in the order in which they were given.
        forgiving: an option that there is not is a reason to show the help, and no error.
    """

    forgiving: ClassVar[bool] = False

    words: tuple[str, ...] = ()
    order: tuple[str, ...] = ()

    @classmethod
    def prepare(cls, words: Sequence[str]) -> tuple[Sequence[str], tuple[str, ...]]:
        """Take off words that must not be read as options; they are added to `words` as they are."""
        return words, ()

    def taken(self) -> None:
        """Look at what there is so far; called after each option.

        Raises:
            ImgError: the last one does not go with those before it.
        """

    def check(self) -> None:
        """Look at everything together.

        Raises:
            ImgError: it does not go together, or something is missing.
        """

    def check_one_image(self) -> None:
        """For those that have just one image.

        Raises:
            UsageError: there are more words, or none.
        """
        if len(self.words) != 1:
            raise UsageError("Expecting one image file name")


@lean_dataclass(slots=True)
class ImageArguments(Arguments):
    """Of a subcommand that opens images.

    Attributes:
        objects: `--object`: throttle groups and secrets. They are made before the subcommand runs.
        image_opts: names of images are lists of options.
    """

    objects: tuple[tuple[str, Any], ...] = listed("", "object", read=object_options)
    image_opts: bool = flag("", "image-opts")


def wants_json(output: str | None) -> bool:
    """What `--output` asks for: JSON, or what people read.

    Raises:
        ImgError: neither.
    """
    if output not in (None, "json", "human"):
        raise ImgError("--output must be used with human or json as argument.")
    return output == "json"


def parse(kind: type[T], words: Sequence[str], command: str = "") -> T:
    """Read the words of a subcommand; each value is looked at before the next word is.

    Args:
        command: its name.

    Raises:
        HelpRequest: help was asked for.
        ImgError: the first thing that is wrong.
    """
    by_word: dict[str, dataclasses.Field[Any]] = {}
    letters, names = "h", {"help": False}
    for field in dataclasses.fields(kind):
        if "short" not in field.metadata:
            continue
        short, long = field.metadata["short"], field.metadata["long"]
        takes_value = "read" in field.metadata
        if short:
            by_word[f"-{short}"] = field
            letters += short + (":" if takes_value else "")
        if long:
            by_word[f"--{long}"] = field
            names[long] = takes_value
    words, more = kind.prepare(words)
    found = kind()
    reader = OptionReader(command, words, letters, names)
    try:
        for word, text in reader:
            if word in ("-h", "--help"):
                raise HelpRequest
            _take(found, by_word[word], text)
    except OptionError as error:
        if kind.forgiving:
            raise HelpRequest(f"{command}: {error}") from None
        raise refusal(error) from None
    found.words = (*reader.rest, *more)
    found.check()
    return found


def refusal(error: OptionError) -> UsageError:
    """What qemu-img says of words that are no options of it."""
    if error.lacks_value:
        return UsageError(f"missing argument for option '{error.word}'")
    return UsageError(f"unrecognized option '{error.word}'")


def _take(found: Arguments, field: dataclasses.Field[Any], text: str) -> None:
    before = getattr(found, field.name)
    value: Any
    if "read" not in field.metadata:
        value = True
    else:
        value = field.metadata["read"](text)
        if field.metadata.get("listed"):
            value = (*before, value)
    setattr(found, field.name, value)
    found.order += (field.name,)
    found.taken()
