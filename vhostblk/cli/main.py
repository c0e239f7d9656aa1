"""The `vhostblk` command and its subcommands, and `vhostblk-storage-daemon`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vhostblk.cli import bench, check, serve, stats, storage_daemon
from vhostblk.cli.io import program as io
from vhostblk.cli.program import Parser, add_common_options, build_program, run_program


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="vhostblk",
        description="Serve disks to virtual machines over vhost-user-blk.",
        epilog="Start with 'vhostblk serve --help'.",
    )
    add_common_options(parser)
    parser.set_defaults(
        run=None,
        complaint="a COMMAND is needed: serve, storage-daemon, io, bench, check or stats",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in (serve, storage_daemon, io, bench, check, stats):
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
    return build_program("vhostblk-storage-daemon", storage_daemon)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `vhostblk` command; returns its exit code."""
    return run_program(build_parser(), argv)


def storage_daemon_main(argv: Sequence[str] | None = None) -> int:
    """Run the `vhostblk-storage-daemon` command; returns its exit code."""
    return run_program(build_storage_daemon_parser(), argv)
