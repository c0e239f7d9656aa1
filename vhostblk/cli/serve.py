"""`vhostblk serve IMAGE`: one disk, one socket, for people."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vhostblk.block.crypto.secret import SecretConfig
from vhostblk.block.foreign_formats import foreign_format
from vhostblk.block.options import to_identifier
from vhostblk.block.registry import PROBE_SIZE
from vhostblk.block.seconds import seconds
from vhostblk.cli.objects import parse_object
from vhostblk.cli.run import add_sandbox_option, run_daemon, sandbox_mode
from vhostblk.daemon import DaemonConfig
from vhostblk.errors import ConfigError
from vhostblk.export.error_policy import ErrorPolicy, OnError
from vhostblk.export.options import (
    DEFAULT_HANDSHAKE_TIMEOUT,
    DEFAULT_MESSAGE_TIMEOUT,
    DEFAULT_QUEUES,
    DEFAULT_SERIAL,
    DEFAULT_STALL_WARNING,
    ERROR_POLICIES,
    ExportConfig,
)
from vhostblk.export.socket_options import (
    peer_rule,
    socket_access,
    to_group,
    to_mode,
    to_owner,
    to_user,
)
from vhostblk.vhost.access import SocketAccess
from vhostblk.vhost.session import MAX_QUEUES
from vhostblk.virtio.blk import ID_BYTES

DESCRIPTION = """\
Serve a disk image (raw, qcow2 or luks) or a host block device to a virtual machine over vhost-user-blk, until SIGTERM.
SIGHUP looks at the image again: tells the guest if its size has changed, and tries again what has
failed and waits for that (--werror)."""
EXAMPLES = """\
Example: a disk for QEMU, which must share the guest's memory:

  truncate -s 10G disk.img
  vhostblk serve disk.img --socket /tmp/disk.sock &
  qemu-system-x86_64 -m 1G \\
    -object memory-backend-memfd,id=mem,size=1G,share=on -numa node,memdev=mem \\
    -chardev socket,id=c0,path=/tmp/disk.sock -device vhost-user-blk-pci,chardev=c0 ...
"""

# QEMU's -drive cache= modes: cache.direct, cache.no-flush, write cache (B06.1)
CACHE_MODES = {
    "writeback": (False, False, True),
    "none": (True, False, True),
    "writethrough": (False, False, False),
    "directsync": (True, False, False),
    "unsafe": (False, True, True),
}
_SD_LISTEN_FDS_START = 3
DEFAULT_LOCK_TIMEOUT = 5  # seconds
DEFAULT_SHUTDOWN_TIMEOUT = 120  # seconds; the units in contrib/ allow for twice that
# More threads than queues have nothing to do.
_MAX_THREADS = MAX_QUEUES
_MAX_INT = (1 << 31) - 1
# What is served: a file's bytes, or what is in it. Nobody guesses: a guest may write anything to its disk.
FORMATS = ("raw", "qcow2", "luks")
_OWN_FORMATS = ((b"QFI\xfb", "qcow2"), (b"LUKS\xba\xbe\0\1", "luks"))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("image", metavar="IMAGE", help="image file or block device")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket", metavar="PATH", help="listen on this Unix socket")
    where.add_argument(
        "--fd",
        type=number(0, _MAX_INT),
        metavar="N",
        help="listen on this inherited file descriptor, a listening Unix socket "
        "(neither: the socket that systemd passes)",
    )
    _add_access_options(parser)
    parser.add_argument(
        "--name",
        type=_name,
        default="disk",
        metavar="NAME",
        help="what the log and 'vhostblk stats' call this disk (default: %(default)s)",
    )
    parser.add_argument("--read-only", action="store_true", help="the guest may not write")
    parser.add_argument(
        "--snapshot",
        action="store_true",
        help="leave the image as it is: what the guest writes is gone at the end",
    )
    parser.add_argument(
        "--serial",
        type=_serial,
        default=DEFAULT_SERIAL,
        metavar="S",
        help="at most 20 bytes (default: %(default)s)",
    )
    parser.add_argument(
        "--queues",
        type=number(1, MAX_QUEUES),
        default=DEFAULT_QUEUES,
        metavar="N",
        help="most queues a guest may use; QEMU asks for one per vCPU (default: %(default)s)",
    )
    parser.add_argument(
        "--cache",
        choices=CACHE_MODES,
        default="writeback",
        help="as QEMU's: 'none' and 'directsync' bypass the host's page cache, 'writethrough' and "
        "'directsync' make every write durable, 'unsafe' never flushes (default: %(default)s)",
    )
    parser.add_argument(
        "--discard",
        choices=("unmap", "ignore"),
        default="unmap",
        help="whether discarded blocks are given back to the host (default: %(default)s)",
    )
    parser.add_argument(
        "--aio",
        choices=("io_uring", "threads"),
        help="how the host file is accessed (default: io_uring where the kernel allows it)",
    )
    parser.add_argument(
        "--iothreads",
        type=number(1, _MAX_THREADS),
        default=1,
        metavar="N",
        help="engine threads that share the queues (default: %(default)s)",
    )
    parser.add_argument(
        "--pin-memory",
        action="store_true",
        help="with O_DIRECT, keep guest memory pinned: faster, and wrong for guests that give memory "
        "back (a balloon, free page reporting, virtio-mem, postcopy)",
    )
    for option, what, default in (
        ("--rerror", "a read", "report"),
        ("--werror", "a write, flush, discard or zero-write", "enospc"),
    ):
        parser.add_argument(
            option,
            choices=ERROR_POLICIES,
            default="auto",
            help=f"what to do when the image fails {what}, as QEMU's: tell the guest, ignore it, or stop taking "
            f"requests until SIGHUP, always or (enospc) when there is no room (auto: {default})",
        )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="what IMAGE is: bytes to be served as they are, a qcow2 image, with all that it is backed by, or a "
        "LUKS volume (default: raw, but a file that looks like another format is refused)",
    )
    add_object_option(parser)
    parser.add_argument(
        "--allow-inactive",
        action="store_true",
        help="for live migration: have IMAGE only while the guest's queues run; it is opened though another daemon "
        "has it, taken when they start, and given up when they have stopped",
    )
    parser.add_argument(
        "--handshake-timeout",
        type=duration,
        default=DEFAULT_HANDSHAKE_TIMEOUT,
        metavar="SECONDS",
        help="hang up on a connection whose first message is not there after that; it keeps nobody out meanwhile "
        "(default: %(default)g; 0: never)",
    )
    parser.add_argument(
        "--message-timeout",
        type=duration,
        default=DEFAULT_MESSAGE_TIMEOUT,
        metavar="SECONDS",
        help="hang up on a front-end that is in the middle of a message, or does not read an answer, for that long; "
        "between messages it may be silent for ever (default: %(default)g; 0: never)",
    )
    parser.add_argument(
        "--stall-warning",
        type=duration,
        default=DEFAULT_STALL_WARNING,
        metavar="SECONDS",
        help="say in the log that the disk does not answer when a request takes that long (default: %(default)g; "
        "0: never)",
    )
    add_data_path_option(parser)
    add_lock_timeout_option(parser)
    add_sandbox_option(parser)
    add_shutdown_timeout_option(parser)
    parser.add_argument("--pidfile", type=Path, metavar="FILE", help="write the process id there")


def _add_access_options(parser: argparse.ArgumentParser) -> None:
    """Who may connect."""
    for option, metavar, read, what in (
        ("--socket-mode", "MODE", to_mode, "permissions of the socket file, in octal digits"),
        ("--socket-owner", "USER[:GROUP]", to_owner, "whose the socket file is, by name or number"),
        ("--socket-group", "GROUP", to_group, "the group of the socket file"),
    ):
        parser.add_argument(option, type=_typed(read), metavar=metavar, help=what)
    for option, metavar, read, whom in (
        ("--allow-user", "USER", to_user, "this user"),
        ("--allow-group", "GROUP", to_group, "members of this group"),
    ):
        parser.add_argument(
            option,
            type=_typed(read),
            action="append",
            default=[],
            metavar=metavar,
            help=f"serve {whom}, and nobody who is not named so; repeatable",
        )


def _typed(read: Callable[[str, Any], Any]) -> Callable[[str], Any]:
    """The type of an option that the storage daemon has too."""

    def read_text(text: str) -> Any:
        try:
            return read("", text)
        except ConfigError as error:
            # argparse says which option it is.
            reason = str(error).removeprefix("Parameter ''").removeprefix(":").strip()
            raise argparse.ArgumentTypeError(reason) from None

    return read_text


def add_data_path_option(parser: argparse.ArgumentParser) -> None:
    """`--data-path`, which both serving commands have."""
    parser.add_argument(
        "--data-path",
        choices=("auto", "native", "python"),
        default="auto",
        help="'python' is the readable reference, slow (default: the engine where it was built)",
    )


def add_lock_timeout_option(parser: argparse.ArgumentParser) -> None:
    """`--lock-timeout`, which both serving commands have."""
    parser.add_argument(
        "--lock-timeout",
        type=number(0, _MAX_INT),
        default=DEFAULT_LOCK_TIMEOUT,
        metavar="SECONDS",
        help="how long to wait for an image that another process has: one that was killed has it until the kernel "
        "has ended what it had begun (default: %(default)s; 0: refuse at once)",
    )


def add_shutdown_timeout_option(parser: argparse.ArgumentParser) -> None:
    """`--shutdown-timeout`, which both serving commands have."""
    parser.add_argument(
        "--shutdown-timeout",
        type=duration,
        default=DEFAULT_SHUTDOWN_TIMEOUT,
        metavar="SECONDS",
        help="how long the end may take: requests in flight, the last flush; what has not ended then is named in the "
        "log and left to the kernel, and the exit status is 1 (default: %(default)g; 0: wait for ever)",
    )


def add_object_option(parser: argparse.ArgumentParser) -> None:
    """`--object`, for secrets, and which of them the image needs."""
    parser.add_argument(
        "--object",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="secret,id=…,file=…|data=…[,format=raw|base64][,keyid=…,iv=…]: what opens an encrypted "
        "image; repeatable",
    )
    parser.add_argument(
        "--key-secret",
        metavar="ID",
        help="the secret that opens IMAGE; needs --format qcow2 or luks",
    )


def _secret(text: str) -> SecretConfig:
    try:
        _, wanted = parse_object(text)
        if not isinstance(wanted, SecretConfig):
            raise ConfigError("type 'throttle-group' is not supported (allowed: secret)")
    except ConfigError as error:
        raise error.within("--object") from None
    return wanted


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM.

    Raises:
        ConfigError, BlockError, OSError: one line explains it.
    """
    fd, listen_option = args.fd, "--fd" if args.socket is None else "--socket"
    if args.socket is None and fd is None:
        fd, listen_option = _systemd_socket(), "systemd's socket"
    access = _socket_access(args)
    if access and args.socket is None:
        raise ConfigError(
            f"{listen_option}: --socket-mode, --socket-owner and --socket-group need --socket: "
            "a socket that is passed is as it was made"
        )
    direct, no_flush, write_cache = CACHE_MODES[args.cache]
    if args.format is None:
        _refuse_other_formats(args.image)
    file: dict[str, Any] = {"driver": "file", "filename": args.image}
    if args.aio is not None:
        file["aio"] = args.aio
    blockdev: dict[str, Any] = {
        **(file if args.format in (None, "raw") else {"driver": args.format, "file": file}),
        "node-name": "disk",
        # Children inherit these.
        "read-only": args.read_only,
        "snapshot": args.snapshot,
        "discard": args.discard,
        "cache": {"direct": direct, "no-flush": no_flush},
        "active": not args.allow_inactive,
    }
    if args.key_secret is not None:
        if args.format in (None, "raw"):
            raise ConfigError("--key-secret: needs --format qcow2 or luks")
        name = "key-secret" if args.format == "luks" else "encrypt.key-secret"
        blockdev[name] = args.key_secret
    export = ExportConfig(
        id=args.name,
        node_name="disk",
        socket_path=args.socket,
        fd=fd,
        writable=not args.read_only,
        write_cache=write_cache,
        serial=args.serial,
        num_queues=args.queues,
        pin_memory=args.pin_memory,
        errors=ErrorPolicy(OnError(args.rerror), OnError(args.werror)),
        own_threads=args.iothreads,
        allow_inactive=args.allow_inactive,
        socket_access=access,
        peers=peer_rule(tuple(args.allow_user), tuple(args.allow_group)),
        handshake_timeout=args.handshake_timeout,
        message_timeout=args.message_timeout,
        stall_warning=args.stall_warning,
    )
    run_daemon(
        DaemonConfig(
            blockdevs=[blockdev],
            secrets=[_secret(text) for text in args.object],
            exports=[export],
            pid_file=args.pidfile,
            data_path=args.data_path,
            lock_timeout=args.lock_timeout,
            shutdown_timeout=args.shutdown_timeout,
            listen_option=listen_option,
        ),
        sandbox=sandbox_mode(args.sandbox),
    )


def _socket_access(args: argparse.Namespace) -> SocketAccess:
    try:
        return socket_access(args.socket_mode, args.socket_owner, args.socket_group)
    except ConfigError as error:
        raise error.within("--socket-group") from None


def number(least: int, most: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number in a range."""

    def read(text: str) -> int:
        # No number that fits is longer; Python refuses to read very long ones.
        fits = text.isascii() and text.isdigit() and len(text) <= 20 and int(text) <= most
        value = int(text) if fits else -1
        if value < least:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number from {least} to {most}")
        return value

    return read


def duration(text: str) -> float:
    """The type of an option that takes seconds."""
    try:
        return seconds(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def _name(text: str) -> str:
    try:
        return to_identifier("name", text)
    except ConfigError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not made of letters, digits, '-', '.', '_', beginning with a letter"
        ) from None


def _serial(text: str) -> str:
    if len(os.fsencode(text)) > ID_BYTES:
        raise argparse.ArgumentTypeError(f"'{text}' has more than {ID_BYTES} bytes")
    return text


def _refuse_other_formats(path: str) -> None:
    """A qcow2 file served as raw would show the guest, and let it overwrite, the image's own structure."""
    # O_NONBLOCK: a FIFO is refused later, not waited for.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise ConfigError(f"IMAGE '{path}': {exc.strerror}") from None
    try:
        start = os.read(fd, PROBE_SIZE)
    except OSError as exc:
        raise ConfigError(f"IMAGE '{path}': {exc.strerror}") from None
    finally:
        os.close(fd)
    name = foreign_format(start)
    advice = "which this command cannot serve"
    for beginning, own in _OWN_FORMATS:
        if start.startswith(beginning) and not name:
            name = own
            advice = f"--format {own} serves the disk that is in it"
    if name:
        raise ConfigError(
            f"{path}: looks like a {name} image; {advice}, --format raw its bytes as they are "
            "(a guest may have made them look like that)"
        )


def _systemd_socket() -> int:
    """The one socket of systemd's socket activation (sd_listen_fds(3))."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        raise ConfigError("one of --socket, --fd, or systemd's socket activation is needed")
    count = os.environ.get("LISTEN_FDS", "")
    if count != "1":
        raise ConfigError(f"systemd's LISTEN_FDS='{count}': one socket is needed")
    return _SD_LISTEN_FDS_START
