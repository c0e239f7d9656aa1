"""`vhostblk serve IMAGE`: one disk, one socket, for people."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vhostblk.block.foreign_formats import foreign_format
from vhostblk.block.registry import PROBE_SIZE
from vhostblk.cli.run import run_daemon
from vhostblk.daemon import DaemonConfig
from vhostblk.errors import ConfigError
from vhostblk.export.error_policy import ErrorPolicy, OnError
from vhostblk.export.options import (
    DEFAULT_QUEUES,
    DEFAULT_SERIAL,
    ERROR_POLICIES,
    ExportConfig,
)
from vhostblk.vhost.session import MAX_QUEUES
from vhostblk.virtio.blk import ID_BYTES

DESCRIPTION = """\
Serve a disk image (raw or qcow2) or a host block device to a virtual machine over vhost-user-blk, until SIGTERM.
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
# More threads than queues have nothing to do.
_MAX_THREADS = MAX_QUEUES
_MAX_INT = (1 << 31) - 1
# What is served: a file's bytes, or what is in it. Nobody guesses: a guest may write anything to its disk.
FORMATS = ("raw", "qcow2")
_QCOW2 = b"QFI\xfb"


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
        help="what IMAGE is: bytes to be served as they are, or a qcow2 image, with all that it is backed by "
        "(default: raw, but a file that looks like another format is refused)",
    )
    add_data_path_option(parser)
    parser.add_argument("--pidfile", type=Path, metavar="FILE", help="write the process id there")


def add_data_path_option(parser: argparse.ArgumentParser) -> None:
    """`--data-path`, which both serving commands have."""
    parser.add_argument(
        "--data-path",
        choices=("auto", "native", "python"),
        default="auto",
        help="'python' is the readable reference, slow (default: the engine where it was built)",
    )


def run(args: argparse.Namespace) -> None:
    """Serve until SIGTERM.

    Raises:
        ConfigError, BlockError, OSError: one line explains it.
    """
    fd, listen_option = args.fd, "--fd" if args.socket is None else "--socket"
    if args.socket is None and fd is None:
        fd, listen_option = _systemd_socket(), "systemd's socket"
    direct, no_flush, write_cache = CACHE_MODES[args.cache]
    if args.format is None:
        _refuse_other_formats(args.image)
    file: dict[str, Any] = {"driver": "file", "filename": args.image}
    if args.aio is not None:
        file["aio"] = args.aio
    blockdev: dict[str, Any] = {
        **(file if args.format != "qcow2" else {"driver": "qcow2", "file": file}),
        "node-name": "disk",
        # Children inherit these.
        "read-only": args.read_only,
        "snapshot": args.snapshot,
        "discard": args.discard,
        "cache": {"direct": direct, "no-flush": no_flush},
    }
    export = ExportConfig(
        id="disk",
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
    )
    run_daemon(
        DaemonConfig(
            blockdevs=[blockdev],
            exports=[export],
            pid_file=args.pidfile,
            data_path=args.data_path,
            listen_option=listen_option,
        )
    )


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
    if start.startswith(_QCOW2) and not name:
        name = "qcow2"
        advice = "--format qcow2 serves the disk that is in it"
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
