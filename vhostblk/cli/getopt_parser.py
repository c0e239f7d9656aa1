"""A program whose command line is read as getopt_long(3) reads it, but declared as any argparse parser.

So help and manual are made as everywhere, and scripts find options in any place, names cut short, and the words of
getopt for what is wrong (`option_reader.py`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from vhostblk.cli.option_reader import OptionError, OptionReader
from vhostblk.cli.program import Parser


class GetoptParser(Parser):
    """Reads options as getopt_long(3) does; for programs without subcommands.

    An option that is wrong, or one word too many: help on standard output, exit code 1.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """What `parse_args` calls; there are no unknown ones."""
        found = argparse.Namespace() if namespace is None else namespace
        for action in self._actions:
            if action.default is not argparse.SUPPRESS:
                setattr(found, action.dest, action.default)
        for name, default in self._defaults.items():
            setattr(found, name, default)
        reader = OptionReader(self.prog, sys.argv[1:] if args is None else args, *self._options())
        try:
            for option, text in reader:
                self._take(found, option, text)
        except OptionError as error:
            self._refuse(f"{self.prog}: {error}")
        places = [action for action in self._actions if not action.option_strings]
        if len(reader.rest) > len(places):
            self._refuse()
        for action, word in zip(places, reader.rest, strict=False):
            setattr(found, action.dest, word)
        return found, []

    def _options(self) -> tuple[str, dict[str, bool]]:
        """Letters and names, as `OptionReader` wants them."""
        letters, names = "", {}
        for option, action in self._option_string_actions.items():
            takes_value = action.nargs != 0
            if option.startswith("--"):
                names[option[2:]] = takes_value
            else:
                letters += option[1:] + (":" if takes_value else "")
        return letters, names

    def _take(self, found: argparse.Namespace, option: str, text: str) -> None:
        action = self._option_string_actions[option]
        try:
            value: Any = action.type(text) if callable(action.type) else text
        except argparse.ArgumentTypeError as error:
            self.exit(1, f"{self.prog}: {error}\n")
        if action.choices is not None and value not in action.choices:
            self.error(f"{option}: '{value}' is none of {', '.join(action.choices)}")
        action(self, found, [] if action.nargs == 0 else value, option)

    def _refuse(self, *lines: str) -> NoReturn:
        self.print_help(sys.stdout)
        self.exit(1, "".join(f"{line}\n" for line in lines))
