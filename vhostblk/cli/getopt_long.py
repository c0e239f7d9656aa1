"""Options read as getopt_long(3) reads them, one after the other, with its words for what is wrong.

Scripts rely on that: options stand in any place, names are cut short, and what comes first is looked at first. Python's
`getopt` and argparse have other words.

`GetoptParser` is for programs: declared as any argparse parser, so that help and manual are made as everywhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from vhostblk.cli.program import Parser


class GetoptError(Exception):
    """An option that there is not, or without its value. The text is a line for standard error."""


def getopt_long(
    program: str, words: Sequence[str], options: Mapping[str, bool], left: list[str]
) -> Iterator[tuple[str, str]]:
    """(option, value) for each option, in their order.

    Args:
        program: its name, for messages.
        options: `-x` or `--name`, and whether it takes a value.
        left: gets the words that are no options.

    Raises:
        GetoptError: at the first option that is wrong, after those before it.
    """
    rest = iter(words)
    for word in rest:
        if word == "--":
            left.extend(rest)
        elif word.startswith("--"):
            yield _long(program, word, rest, options)
        elif word.startswith("-") and word != "-":
            yield from _letters(program, word[1:], rest, options)
        else:
            left.append(word)


def _long(
    program: str, word: str, rest: Iterator[str], options: Mapping[str, bool]
) -> tuple[str, str]:
    _, equals, value = word.partition("=")
    found = _named(program, word, [option for option in options if option.startswith("--")])
    if not options[found]:
        if equals:
            raise GetoptError(f"{program}: option '{found}' doesn't allow an argument")
        return found, ""
    if not equals:
        following = next(rest, None)
        if following is None:
            raise GetoptError(f"{program}: option '{found}' requires an argument")
        value = following
    return found, value


def _named(program: str, word: str, options: Sequence[str]) -> str:
    """The option that this has the name of, or its beginning."""
    name = word.partition("=")[0]
    if name in options:
        return name
    found = [option for option in options if option.startswith(name)]
    if not found:
        raise GetoptError(f"{program}: unrecognized option '{word}'")
    if len(found) > 1:
        possible = " ".join(f"'{option}'" for option in found)
        raise GetoptError(f"{program}: option '{word}' is ambiguous; possibilities: {possible}")
    return found[0]


def _letters(
    program: str, letters: str, rest: Iterator[str], options: Mapping[str, bool]
) -> Iterator[tuple[str, str]]:
    for index, letter in enumerate(letters, 1):
        option = f"-{letter}"
        if option not in options:
            raise GetoptError(f"{program}: invalid option -- '{letter}'")
        if not options[option]:
            yield option, ""
            continue
        value = letters[index:] or next(rest, None)
        if value is None:
            raise GetoptError(f"{program}: option requires an argument -- '{letter}'")
        yield option, value
        return


class GetoptParser(Parser):
    """Reads options as getopt_long(3) does; for programs without subcommands.

    An option that is wrong, or one word too many: help on standard output, exit code 1.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """What `parse_args` calls; there are no unknown ones."""
        found = argparse.Namespace() if namespace is None else namespace
        actions = self._option_string_actions
        for action in self._actions:
            if action.default is not argparse.SUPPRESS:
                setattr(found, action.dest, action.default)
        for name, default in self._defaults.items():
            setattr(found, name, default)
        takes_value = {option: action.nargs != 0 for option, action in actions.items()}
        left: list[str] = []
        try:
            words = sys.argv[1:] if args is None else args
            for option, text in getopt_long(self.prog, words, takes_value, left):
                self._take(found, option, text)
        except GetoptError as error:
            self._refuse(str(error))
        places = [action for action in self._actions if not action.option_strings]
        if len(left) > len(places):
            self._refuse()
        for action, word in zip(places, left, strict=False):
            setattr(found, action.dest, word)
        return found, []

    def _take(self, found: argparse.Namespace, option: str, text: str) -> None:
        action = self._option_string_actions[option]
        try:
            value: Any = action.type(text) if callable(action.type) else text
        except argparse.ArgumentTypeError as error:
            self.error(str(error))
        if action.choices is not None and value not in action.choices:
            self.error(f"{option}: '{value}' is none of {', '.join(action.choices)}")
        action(self, found, [] if action.nargs == 0 else value, option)

    def _refuse(self, *lines: str) -> NoReturn:
        self.print_help(sys.stdout)
        self.exit(1, "".join(f"{line}\n" for line in lines))
