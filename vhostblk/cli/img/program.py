"""`vhostblk img`, also installed as `vhostblk-img`: what stands before the subcommand, how a run ends.

Exit codes are those of the subcommands; 1: anything that one line explains. SIGINT and SIGTERM end a run as they end
any program, after what is unfinished has been named and closed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from vhostblk import __version__
from vhostblk.cli import interruption
from vhostblk.cli.img import session as sessions
from vhostblk.cli.img.arguments import (
    Arguments,
    HelpRequest,
    ImgError,
    UsageError,
    parse,
    refusal,
)
from vhostblk.cli.img.table import SYNOPSES, Command, find_command
from vhostblk.cli.option_reader import OptionError, OptionReader
from vhostblk.cli.streams import run_patiently
from vhostblk.cli.tool_log import ToolLog
from vhostblk.cli.trace_option import read_trace_option
from vhostblk.errors import BlockError, ConfigError

HELP = """\
usage: {program} [standard options] command [command options]
Make, look at, convert and repair disk images, with qemu-img's commands and options.

    -h, --help       show this, and exit
    -V, --version    show the version, and exit
    -T, --trace      accepted, as scripts write it: there is nothing to trace

Commands:
{commands}

Supported formats: {formats}
Every command and option is explained in qemu-img(1); what differs here, in docs/vhostblk-img.md.
"""


# Scripts ask for the version to know what they may use: that is what qemu-img has had since then.
_LIKE = "7.2.0"


def main(argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run `vhostblk-img`; returns its exit code.

    Args:
        argv: without the program's name.
        program: its name for messages; the one it was called by if absent.
    """
    program = program or os.path.basename(sys.argv[0])
    words = list(sys.argv[1:] if argv is None else argv)
    return run_patiently(program, lambda: _end(program, words))


def _end(program: str, words: list[str]) -> int:
    try:
        with ToolLog(program):
            return _main(program, words)
    except HelpRequest as request:
        if str(request):
            sys.stderr.write(f"{request}\n")
        sys.stdout.write(_help(program))
        return 0
    except ImgError as error:
        for line in (str(error), *error.more):
            if line:
                sys.stderr.write(f"{program}: {line}\n")
        sys.stderr.write(error.hint)
        if isinstance(error, UsageError):
            sys.stderr.write(f"Try '{program} --help' for more information\n")
        return error.status


def _main(program: str, words: list[str]) -> int:
    if not words:
        raise UsageError("Not enough arguments")
    names = {"help": False, "version": False, "trace": True}
    reader = OptionReader(program, words, "hVT:", names, in_order=True)
    try:
        for option, value in reader:
            if option in ("-h", "--help"):
                raise HelpRequest
            if option in ("-V", "--version"):
                sys.stdout.write(f"{program} version {_LIKE} (vhostblk {__version__})\n")
                return 0
            if read_trace_option(value):
                return 0
    except OptionError as error:
        raise refusal(error) from None
    except ConfigError as error:
        raise ImgError(error.qemu_text) from None
    if not reader.rest:
        return 0
    name, *left = reader.rest
    command = find_command(name)
    if command is None:
        raise UsageError(f"Command not found: {name}")
    session = sessions.Session(program)
    work = _run(session, command, parse(command.takes, left, name))
    return interruption.run_interruptible(work, session.name_unfinished)


async def _run(session: sessions.Session, command: Command, args: Arguments) -> int:
    try:
        async with session:
            session.add_objects(getattr(args, "objects", ()))
            return await command.run(session, args)
    except (ConfigError, BlockError) as error:
        raise ImgError(sessions.reason(error)) from None


def _help(program: str) -> str:
    from vhostblk.block.drivers import DRIVERS

    commands = "\n".join(f"  {name} {synopsis}" for name, synopsis in sorted(SYNOPSES.items()))
    return HELP.format(program=program, commands=commands, formats=" ".join(sorted(DRIVERS)))
