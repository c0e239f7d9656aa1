"""The `vhostblk` command and its subcommands, and `vhostblk-storage-daemon`.

A subcommand is imported when it is used: `vhostblk stats` needs next to nothing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from vhostblk.cli.program import Parser, add_common_options, build_program, run_program

COMMANDS = {
    "serve": "serve one disk image or block device",
    "storage-daemon": "serve block nodes, with qemu-storage-daemon's options",
    "img": "make, convert and repair images, as qemu-img does",
    "io": "try the block layer by hand, with qemu-io's commands",
    "bench": "measure a vhost-user-blk back-end",
    "check": "check that a back-end keeps to the specifications",
    "stats": "show what running exports serve",
}
"""What each is for, in the order of the help."""

# These read their words themselves, as scripts for qemu-img and qemu-io expect.
_IMG = "img"
_IO = "io"


def build_parser(*wanted: str) -> Parser:
    """The command line.

    Args:
        wanted: the commands whose options are needed; none: all.
    """
    *others, last = COMMANDS
    parser = Parser(
        prog="vhostblk",
        description="Serve disks to virtual machines over vhost-user-blk.",
        epilog="Start with 'vhostblk serve --help'.",
    )
    add_common_options(parser)
    parser.set_defaults(run=None, complaint=f"a COMMAND is needed: {', '.join(others)} or {last}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name not in (_IMG, _IO) and (name in wanted or not wanted):
            module = _module(name)
            command.description = module.DESCRIPTION
            command.epilog = module.EXAMPLES
            add_common_options(command, again=True)
            module.add_options(command)
            command.set_defaults(run=module.run)
    return parser


def _module(command: str) -> Any:
    return importlib.import_module(f"vhostblk.cli.{command.replace('-', '_')}")


def build_storage_daemon_parser() -> Parser:
    """`vhostblk-storage-daemon`: the subcommand as a program of its own."""
    return build_program("vhostblk-storage-daemon", _module("storage-daemon"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `vhostblk` command; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] == _IMG:
        from vhostblk.cli.img.program import main as img_main

        return img_main(words[1:], "vhostblk-img")
    if words and words[0] == _IO:
        from vhostblk.cli.io.program import main as io_main

        return io_main(words[1:], "vhostblk-io")
    # The first that could be one is the command, or the value of an option that does not take it.
    command = next((word for word in words if word in COMMANDS), "")
    return run_program(build_parser(command), argv)


def storage_daemon_main(argv: Sequence[str] | None = None) -> int:
    """Run the `vhostblk-storage-daemon` command; returns its exit code."""
    return run_program(build_storage_daemon_parser(), argv)
