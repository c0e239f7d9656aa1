"""A parser for programs whose options are read as getopt_long(3) reads them, with its words for what is wrong.

It is declared as any argparse parser, so that help and manual are made as everywhere; `option_reader.py` reads.
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
        actions = self._option_string_actions
        for action in self._actions:
            if action.default is not argparse.SUPPRESS:
                setattr(found, action.dest, action.default)
        for name, default in self._defaults.items():
            setattr(found, name, default)
        takes_value = {option: action.nargs != 0 for option, action in actions.items()}
        letters = "".join(
            option[1] + ":" * takes for option, takes in takes_value.items() if option[1] != "-"
        )
        names = {option[2:]: takes for option, takes in takes_value.items() if option[1] == "-"}
        reader = OptionReader(self.prog, sys.argv[1:] if args is None else args, letters, names)
        try:
            for option, text in reader:
                self._take(found, option, text)
        except OptionError as error:
            self._refuse(f"{self.prog}: {error}")
        left = reader.rest
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
