"""What every command line of vhostblk has in common: one parser, common options, errors as one line, exit codes.

Exit codes: 0 done, 1 wrong options or a failure that one line explains. No traceback reaches a user unless
`--log-level debug` asks for it. Imports no command, so that a program with one of them starts fast.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from vhostblk import __version__
from vhostblk.cli.streams import run_patiently
from vhostblk.errors import VhostBlkError

LOG_LEVELS = ("error", "warning", "info", "debug")


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong option is one line and exit code 1 (argparse: usage and 2)."""

    def error(self, message: str) -> NoReturn:
        # The first word of the program's name: subcommands have parsers of their own.
        program = self.prog.partition(" ")[0]
        self.exit(1, f"{program}: {one_line(message.removeprefix('argument '))}\n")


def add_common_options(parser: argparse.ArgumentParser, *, again: bool = False) -> None:
    """The options every command has.

    Args:
        again: for a subcommand, whose parser's defaults must not undo what stood before its name.
    """
    parser.add_argument(
        "--version",
        action="version",
        version=f"vhostblk {__version__}",
        help="show the version and exit",
    )
    parser.add_argument(
        "--log-level",
        choices=LOG_LEVELS,
        default=argparse.SUPPRESS if again else "info",
        help="how much to say on standard error (default: info)",
    )


def build_program(name: str, module: Any) -> Parser:
    """The parser of a subcommand that is installed as a program of its own."""
    parser = Parser(
        prog=name,
        description=module.DESCRIPTION,
        epilog=module.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_options(parser)
    # As of any program of QEMU's.
    parser.add_argument(
        "-V", action="version", version=f"vhostblk {__version__}", help=argparse.SUPPRESS
    )
    module.add_options(parser)
    parser.set_defaults(run=module.run)
    return parser


def run_program(parser: Parser, argv: Sequence[str] | None) -> int:
    """Parse, run the command, and return its exit code."""
    return run_patiently(parser.prog, lambda: _run(parser, argv))


def _run(parser: Parser, argv: Sequence[str] | None) -> int:
    args = parser.parse_args(argv)
    if args.run is None:
        parser.error(args.complaint)
    logging.basicConfig(stream=sys.stderr, format=f"{parser.prog}: %(levelname)s: %(message)s")
    logging.getLogger("vhostblk").setLevel(args.log_level.upper())
    try:
        # A command that has more to say than 'done' returns its exit status.
        status: int = args.run(args) or 0
    except (VhostBlkError, OSError) as exc:
        if args.log_level == "debug":
            logging.getLogger(__name__).debug("", exc_info=True)
        print(f"{parser.prog}: {describe(exc)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def describe(exc: Exception) -> str:
    """One line for people."""
    if isinstance(exc, OSError) and not isinstance(exc, VhostBlkError):
        text = os.strerror(exc.errno) if exc.errno else str(exc)
        return one_line(f"{exc.filename}: {text}" if exc.filename else text)
    return one_line(str(exc)) or type(exc).__name__


def one_line(text: str) -> str:
    """Escape what would end the line, or play with the terminal: values come from users."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
