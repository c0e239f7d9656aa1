"""Which subcommands there are; a subcommand is imported when it is used, so that a short one starts fast."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.cli.img.arguments import Arguments

if TYPE_CHECKING:
    from vhostblk.cli.img.session import Session


@lean_dataclass(frozen=True, slots=True)
class Command:
    """A subcommand.

    Attributes:
        takes: its options.
        run: does it, and returns the exit code; raises ImgError.
    """

    takes: type[Arguments]
    run: Callable[[Session, Any], Awaitable[int]]


SYNOPSES: Mapping[str, str] = MappingProxyType(
    {
        "amend": "[--object objectdef] [--image-opts] [-p] [-q] [-f fmt] [-t cache] [--force]"
        " -o options filename",
        "bench": "[-c count] [-d depth] [-f fmt] [--flush-interval=flush_interval] [-i aio] [-n] [--no-drain]"
        " [-o offset] [--pattern=pattern] [-q] [-s buffer_size] [-S step_size] [-t cache] [-w] [-U] filename",
        "bitmap": "(--merge SOURCE | --add | --remove | --clear | --enable | --disable)..."
        " [-b source_file [-F source_fmt]] [-g granularity] [--object objectdef]"
        " [--image-opts | -f fmt] filename bitmap",
        "check": "[--object objectdef] [--image-opts] [-q] [-f fmt] [--output=ofmt]"
        " [-r [leaks | all]] [-T src_cache] [-U] filename",
        "commit": "[--object objectdef] [--image-opts] [-q] [-f fmt] [-t cache] [-b base] [-r rate_limit]"
        " [-d] [-p] filename",
        "compare": "[--object objectdef] [--image-opts] [-f fmt] [-F fmt] [-T src_cache] [-p] [-q] [-s]"
        " [-U] filename1 filename2",
        "convert": "[--object objectdef] [--image-opts] [--target-image-opts] [--target-is-zero] [--bitmaps]"
        " [-U] [-C] [-c] [-p] [-q] [-n] [-f fmt] [-t cache] [-T src_cache] [-O output_fmt]"
        " [-B backing_file [-F backing_fmt]] [-o options] [-l snapshot_param] [-S sparse_size]"
        " [-r rate_limit] [-m num_coroutines] [-W] [--salvage] filename [filename2 [...]] output_filename",
        "create": "[--object objectdef] [-q] [-f fmt] [-b backing_file [-F backing_fmt]] [-u]"
        " [-o options] filename [size]",
        "dd": "[--image-opts] [-U] [-f fmt] [-O output_fmt] [bs=block_size] [count=blocks] [skip=blocks]"
        " if=input of=output",
        "info": "[--object objectdef] [--image-opts] [-f fmt] [--output=ofmt] [--backing-chain] [-U]"
        " filename",
        "map": "[--object objectdef] [--image-opts] [-f fmt] [--start-offset=offset]"
        " [--max-length=len] [--output=ofmt] [-U] filename",
        "measure": "[--output=ofmt] [-O output_fmt] [-o options] [--size N | [--object objectdef]"
        " [--image-opts] [-f fmt] [-l snapshot_param] filename]",
        "rebase": "[--object objectdef] [--image-opts] [-U] [-q] [-f fmt] [-t cache] [-T src_cache] [-p]"
        " [-u] -b backing_file [-F backing_fmt] filename",
        "resize": "[--object objectdef] [--image-opts] [-f fmt] [--preallocation=prealloc] [-q]"
        " [--shrink] filename [+ | -]size",
        "snapshot": "[--object objectdef] [--image-opts] [-U] [-q] [-l | -a snapshot | -c snapshot |"
        " -d snapshot] filename",
    }
)
"""Options and words of each, for `--help`; the name is that of its module (`create`: `create.py`)."""


def find_command(name: str) -> Command | None:
    """The subcommand of this name, if there is one."""
    if name not in SYNOPSES:
        return None
    command: Command = importlib.import_module(f"vhostblk.cli.img.{name}").COMMAND
    return command
