"""`vhostblk io`, also installed as `vhostblk-io`: the options of qemu-io's command line."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vhostblk import __version__
from vhostblk.block.modes import parse_cache_mode
from vhostblk.cli import objects
from vhostblk.cli.getopt_parser import GetoptParser
from vhostblk.cli.interruption import run_interruptible
from vhostblk.cli.io.command import RefusedError
from vhostblk.cli.io.image import aio_mode, discard_mode, image_options, modes_of
from vhostblk.cli.io.session import Modes, Session
from vhostblk.cli.io.shell import run_commands
from vhostblk.cli.program import LOG_LEVELS
from vhostblk.cli.streams import run_patiently
from vhostblk.cli.tool_log import ToolLog
from vhostblk.cli.trace_option import read_trace_option
from vhostblk.errors import ConfigError

if TYPE_CHECKING:
    from vhostblk.cli.objects import Object

DESCRIPTION = """\
Open an image and make single requests: read, write, discard, flush, and look at what they did. Takes
qemu-io's options and commands. Without -c, commands are read from standard input, one a line."""
EXAMPLES = """\
Example: write a pattern, look whether it is there, and what is allocated:

  vhostblk-io -f raw -c 'write -P 0xab 4k 64k' -c 'read -P 0xab 4k 64k' -c map disk.img

'-c help' lists the commands, '-c "help read"' explains one. See docs/vhostblk-io.md.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command, in qemu-io's order: messages name several in it."""
    add = parser.add_argument
    add("file", nargs="?", metavar="FILE", help="the image; none: `open` opens one")
    add("-V", action="version", version=f"%(prog)s version {__version__}", help=argparse.SUPPRESS)
    add(
        "-c",
        "--cmd",
        action="append",
        default=[],
        metavar="COMMAND",
        help="a command with its arguments; repeatable, in order",
    )
    add("-f", "--format", metavar="DRIVER", help="the image's format; found out if absent")
    add("-r", "--read-only", action="store_true", help="open it read-only")
    add("-s", "--snapshot", action="store_true", help="keep what is written in a temporary file")
    add("-n", "--nocache", dest="no_cache", action="store_true", help="as -t none")
    add("-C", "--copy-on-read", action="store_true", help="write what is read to the top layer")
    add("-m", "--misalign", action="store_true", help="use buffers that are not aligned")
    add("-k", "--native-aio", action="store_true", help="as -i native")
    add(
        "-i",
        "--aio",
        type=_value(aio_mode),
        metavar="MODE",
        help="how to do I/O: threads, io_uring or native",
    )
    add(
        "-d",
        "--discard",
        type=_value(discard_mode),
        metavar="MODE",
        help="unmap or ignore; unmap if absent",
    )
    add(
        "-t",
        "--cache",
        type=_value(parse_cache_mode),
        metavar="MODE",
        help="none, off, directsync, writeback, unsafe or writethrough; writethrough if absent",
    )
    add(
        "-T",
        "--trace",
        type=_value(_trace),
        metavar="EVENTS",
        help="for qemu-io's scripts; there are no trace events here",
    )
    add(
        "--object",
        action="append",
        type=_value(objects.parse_object),
        default=[],
        metavar="OPTIONS",
        help="throttle-group,id=…[,limits.…] or secret,id=…,file=…|data=…; repeatable",
    )
    add("--image-opts", action="store_true", help="FILE is a list of options: driver=raw,…")
    add("-U", "--force-share", action="store_true", help="share the image; needs --read-only")
    parser.set_defaults(program="vhostblk-io")


def _value(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """What reads the value of an option; a refusal ends the program at once."""

    def convert(text: str) -> Any:
        try:
            return read(text)
        except RefusedError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except ConfigError as error:
            raise argparse.ArgumentTypeError(error.qemu_text) from None

    return convert


def _trace(text: str) -> None:
    if read_trace_option(text):
        sys.exit(0)


def run(args: argparse.Namespace) -> int:
    """Carry out the commands; the exit status is 1 if one has failed.

    Raises:
        ConfigError: the options are wrong, or the image cannot be opened.
    """
    if args.format is not None and args.image_opts:
        raise ConfigError("--image-opts and -f are mutually exclusive")
    try:
        modes = modes_of(args)
        given = image_options(args.file) if args.image_opts and args.file is not None else {}
        if args.format is not None:
            given["driver"] = args.format
        return run_interruptible(_run(args, given, modes, args.object), lambda: None)
    except RefusedError as error:
        raise ConfigError(str(error)) from None


async def _run(
    args: argparse.Namespace,
    given: dict[str, str],
    modes: Modes,
    wanted: Sequence[tuple[str, Object]],
) -> int:
    session = Session(args.program, wanted, misalign=args.misalign)
    notices = Notices(session)
    logger = logging.getLogger("vhostblk.block.filters.breakpoints")
    logger.addHandler(notices)
    logger.propagate = False
    try:
        if args.file is not None:
            await session.open(None if args.image_opts else args.file, given, modes)
        return 0 if await run_commands(session, args.cmd) else 1
    finally:
        await session.close()
        logger.removeHandler(notices)
        logger.propagate = True
        sys.stdout.flush()


class Notices(logging.Handler):
    """Prints what blkdebug has to say about suspended requests, as a part of the output."""

    def __init__(self, session: Session) -> None:
        super().__init__(logging.INFO)
        self._session = session

    def emit(self, record: logging.LogRecord) -> None:
        """Print it."""
        self._session.out(record.getMessage())


def build_io_parser(name: str = "vhostblk-io") -> GetoptParser:
    """`vhostblk-io`; scripts that call it by another name find that in its messages."""
    parser = GetoptParser(
        prog=name,
        usage="%(prog)s [OPTIONS]... [-c STRING]... [file]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument("--version", action="version", version=f"%(prog)s version {__version__}")
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="error", help=argparse.SUPPRESS)
    parser.set_defaults(program=name)
    return parser


def main(argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run `vhostblk-io`; returns its exit code.

    Args:
        argv: without the program's name.
        program: its name for messages; the one it was called by if absent.
    """
    program = program or Path(sys.argv[0]).name
    return run_patiently(program, lambda: _main(program, argv))


def _main(program: str, argv: Sequence[str] | None) -> int:
    with ToolLog(program) as log:
        args = build_io_parser(program).parse_args(argv)
        log.show(args.log_level)
        try:
            return run(args)
        except ConfigError as error:
            sys.stderr.write(f"{program}: {error.qemu_text}\n")
            return 1
        except KeyboardInterrupt:
            return 130
