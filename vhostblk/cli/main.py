"""The `vhostblk` command: parse, set up logging, run a subcommand, turn errors into one line and an exit code.

Exit codes: 0 done, 1 wrong options or a failure that one line explains. No traceback reaches a user unless
`--log-level debug` asks for it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from vhostblk import __version__
from vhostblk.cli import bench, check, serve, stats, storage_daemon
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


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="vhostblk",
        description="Serve disks to virtual machines over vhost-user-blk.",
        epilog="Start with 'vhostblk serve --help'.",
    )
    add_common_options(parser)
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in (serve, storage_daemon, bench, check, stats):
        command = commands.add_parser(
            module.NAME,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_common_options(command, again=True)
        module.add_options(command)
        command.set_defaults(run=module.run)
    return parser


def build_storage_daemon_parser() -> Parser:
    """`vhostblk-storage-daemon`: the subcommand as a program of its own."""
    parser = Parser(
        prog="vhostblk-storage-daemon",
        description=storage_daemon.DESCRIPTION,
        epilog=storage_daemon.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_options(parser)
    storage_daemon.add_options(parser)
    parser.set_defaults(run=storage_daemon.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `vhostblk` command; returns its exit code."""
    return _run(build_parser(), argv)


def storage_daemon_main(argv: Sequence[str] | None = None) -> int:
    """Run the `vhostblk-storage-daemon` command; returns its exit code."""
    return _run(build_storage_daemon_parser(), argv)


def _run(parser: Parser, argv: Sequence[str] | None) -> int:
    args = parser.parse_args(argv)
    if args.run is None:
        parser.error("a COMMAND is needed: serve, storage-daemon, bench, check or stats")
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
