"""`vhostblk storage-daemon`: qemu-storage-daemon's options and option syntax, so an existing command line works.

What this version does not have yet (`--monitor`, `--chardev`, `--nbd-server`, other export types and objects) is
refused by name.
"""

from __future__ import annotations

import argparse
import itertools
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vhostblk.block.crypto.secret import SecretConfig
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.keyval import flatten, parse_options
from vhostblk.block.options import IDENTIFIER, INTEGER, consume_all, option
from vhostblk.block.registry import DriverRegistry
from vhostblk.cli.blockdev_help import blockdev_help, export_help, object_help
from vhostblk.cli.objects import OBJECTS, secret, throttle_group
from vhostblk.cli.run import add_sandbox_option, run_daemon, sandbox_mode
from vhostblk.cli.serve import (
    add_data_path_option,
    add_lock_timeout_option,
    add_shutdown_timeout_option,
)
from vhostblk.cli.trace_option import read_trace_option
from vhostblk.daemon import (
    DEFAULT_POLL_MAX_NS,
    DaemonConfig,
    IOThreadConfig,
    ThrottleGroupConfig,
)
from vhostblk.errors import ConfigError
from vhostblk.export.options import ExportConfig, parse_export

DESCRIPTION = """\
Serve block nodes to virtual machines over vhost-user-blk. Takes qemu-storage-daemon's options, in its
syntax: key=value lists with dotted keys (',,' stands for a comma in a value) or JSON."""
EXAMPLES = """\
Example: two disks of one daemon, the second one read-only:

  vhostblk-storage-daemon \\
    --blockdev driver=file,node-name=disk0,filename=a.img,cache.direct=on \\
    --blockdev driver=raw,node-name=disk1,file.driver=file,file.filename=b.img,read-only=on \\
    --object iothread,id=io0 \\
    --export type=vhost-user-blk,id=e0,addr.type=unix,addr.path=/tmp/a.sock,\\
node-name=disk0,writable=on,iothread=io0 \\
    --export type=vhost-user-blk,id=e1,addr.type=unix,addr.path=/tmp/b.sock,node-name=disk1

"""
EXAMPLES += textwrap.fill(f"Block drivers: {', '.join(sorted(DRIVERS))}.", 112)
EXAMPLES += """
'--blockdev NAME,help' lists the options of one, '--export help' those of exports,
'--object help' the kinds of objects. See vhostblk-storage-daemon(1).
"""

_KINDS: MappingProxyType[type, str] = MappingProxyType(
    {IOThreadConfig: "iothread", ThrottleGroupConfig: "throttle-group", SecretConfig: "secret"}
)
_NOT_YET = ("chardev", "monitor", "nbd-server")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument(
        "--blockdev",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="a block node: driver=…,node-name=…[,…]; repeatable, in order; "
        "`help` lists the drivers, `driver=…,help` the options of one",
    )
    parser.add_argument(
        "--export",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="type=vhost-user-blk,id=…,node-name=…,addr.type=unix,addr.path=…[,…]: serve a node; "
        "repeatable; `help` lists all options",
    )
    parser.add_argument(
        "--object",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="iothread,id=…[,poll-max-ns=…][,poll-grow=…][,poll-shrink=…] or "
        "throttle-group,id=…[,limits.iops-total=…][,limits.…] or "
        "secret,id=…,file=…|data=…[,format=raw|base64][,keyid=…,iv=…]; repeatable",
    )
    for access, use in (("rw", "any"), ("ro", "read-only")):
        parser.add_argument(
            f"--block-drv-{access}-whitelist",
            action="extend",
            type=_names,
            default=[],
            metavar="DRIVERS",
            help=f"comma-separated drivers that {use} nodes may use; with either of the two "
            "options no others may be used",
        )
    parser.add_argument("--pidfile", type=Path, metavar="FILE", help="write the process id there")
    parser.add_argument(
        "--daemonize", action="store_true", help="go to the background when all exports listen"
    )
    add_data_path_option(parser)
    add_lock_timeout_option(parser)
    add_sandbox_option(parser)
    add_shutdown_timeout_option(parser)
    parser.add_argument(
        "-T",
        "--trace",
        action="append",
        default=[],
        metavar="EVENTS",
        help="for scripts of qemu-storage-daemon's; there are no trace events here",
    )
    for name in _NOT_YET:
        parser.add_argument(f"--{name}", action=_NotYet, nargs="?", help=argparse.SUPPRESS)


class _NotYet(argparse.Action):
    """An option of qemu-storage-daemon's that has no counterpart yet."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        parser.error(f"{option_string}: not supported by this version of vhostblk")


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM.

    Raises:
        ConfigError, BlockError, OSError: one line explains it.
    """
    drivers = _drivers(args.block_drv_rw_whitelist, args.block_drv_ro_whitelist)
    if (help_text := _help(args, drivers)) is not None:
        print(help_text)
        return
    for text in args.trace:
        if read_trace_option(text):
            return
    objects = [_parse_object(text) for text in args.object]
    config = DaemonConfig(
        blockdevs=[_parse("--blockdev", text, "driver") for text in args.blockdev],
        io_threads=[thing for thing in objects if isinstance(thing, IOThreadConfig)],
        secrets=[thing for thing in objects if isinstance(thing, SecretConfig)],
        throttle_groups=[thing for thing in objects if isinstance(thing, ThrottleGroupConfig)],
        exports=[_parse_export(text) for text in args.export],
        pid_file=args.pidfile,
        data_path=args.data_path,
        lock_timeout=args.lock_timeout,
        shutdown_timeout=args.shutdown_timeout,
        drivers=drivers,
        blockdev_option="--blockdev",
        export_option="--export",
    )
    names = [thing.name for thing in objects]
    for thing in objects:
        if names.count(thing.name) > 1:
            raise ConfigError(f"--object {_KINDS[type(thing)]},id={thing.name}: this id is in use")
    run_daemon(config, detach=args.daemonize, sandbox=sandbox_mode(args.sandbox))


def _help(args: argparse.Namespace, drivers: DriverRegistry) -> str | None:
    """What the first option that asks for help is told."""
    answers = itertools.chain(
        (blockdev_help(text, drivers) for text in args.blockdev),
        (export_help(text) for text in args.export),
        (object_help(text, _OBJECTS) for text in args.object),
    )
    return next((answer for answer in answers if answer is not None), None)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _drivers(read_write: list[str], read_only: list[str]) -> DriverRegistry:
    """All there are, and which of them may be used."""
    drivers = DriverRegistry(DRIVERS, read_write=read_write, read_only=read_only)
    for access, names in (("rw", read_write), ("ro", read_only)):
        for name in names:
            drivers.find(name, f"--block-drv-{access}-whitelist")
    return drivers


def _parse(option: str, text: str, implied_key: str) -> dict[str, Any]:
    try:
        return parse_options(text, implied_key)
    except ConfigError as exc:
        raise ConfigError(f"{option}: {exc}") from None


def _parse_export(text: str) -> ExportConfig:
    try:
        return parse_export(parse_options(text, "type"))
    except ConfigError as exc:
        raise ConfigError(f"--export: {exc}") from None


@dataclass(frozen=True, slots=True)
class _IOThreadOptions:
    """`--object iothread`, as qemu-storage-daemon spells it."""

    id: str = option(IDENTIFIER, about="name of the thread")
    poll_max_ns: int = option(
        INTEGER, DEFAULT_POLL_MAX_NS, about="how long it may look for work before it sleeps"
    )
    poll_grow: int = option(INTEGER, 0, about="factor by which that grows; 0: 2")
    poll_shrink: int = option(
        INTEGER, 2, about="divisor by which it shrinks; 0: to nothing, as QEMU does by default"
    )
    aio_max_batch: int = option(INTEGER, 0, about="accepted; QEMU's aio=native has a use for it")


_OBJECTS = {"iothread": {"": _IOThreadOptions}, **OBJECTS}


def _parse_object(text: str) -> IOThreadConfig | ThrottleGroupConfig | SecretConfig:
    options = flatten(_parse("--object", text, "qom-type"))
    kind = options.pop("qom-type", None)
    if kind not in _OBJECTS:
        raise ConfigError(
            f"--object: type '{kind}' is not supported (allowed: {', '.join(_OBJECTS)})"
        )
    try:
        if kind == "throttle-group":
            return ThrottleGroupConfig(*throttle_group(options))
        if kind == "secret":
            return secret(options)
        parsed = consume_all(_IOThreadOptions, options)
    except ConfigError as exc:
        raise ConfigError(f"--object {kind}: {exc}") from None
    return IOThreadConfig(parsed.id, parsed.poll_max_ns, parsed.poll_grow, parsed.poll_shrink)
