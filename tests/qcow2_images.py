"""qcow2 images for tests: made and checked by QEMU's tools, opened here."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.disks import Scenario, read, with_disk
from tests.requirements import require
from tests.stock_tools import run_stock
from vhostblk.block.check import CheckResult
from vhostblk.block.check import check as check_node
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.flags import CheckMode, OpenFlag
from vhostblk.block.graph import BlockGraph
from vhostblk.testing.daemon_process import DaemonProcess
from vhostblk.testing.plugin import DaemonStarter

__all__ = [
    "COUNTS",
    "FOR_CHECK",
    "MIB",
    "SHAPES",
    "check",
    "contents",
    "counts",
    "create",
    "export",
    "no_worse_than_leaks",
    "our_check",
    "qemu_check",
    "qemu_img",
    "qemu_io",
    "read",
    "scribble",
    "with_image",
]

MIB = 1 << 20
FOR_CHECK = OpenFlag.CHECK | OpenFlag.NO_BACKING

SHAPES = {
    "version 2": "compat=0.10",
    "512 byte clusters": "cluster_size=512",
    "4 KiB clusters": "cluster_size=4k",
    "64 KiB clusters": "cluster_size=64k",
    "2 MiB clusters": "cluster_size=2M",
    "subclusters of 2 KiB": "extended_l2=on,cluster_size=64k",
    "subclusters of 512 bytes": "extended_l2=on,cluster_size=16k",
    "metadata preallocated": "preallocation=metadata",
    "all preallocated": "preallocation=full",
    "1 bit reference counts": "refcount_bits=1",
    "64 bit reference counts": "refcount_bits=64,cluster_size=512",
    "lazy reference counts": "lazy_refcounts=on",
}
"""What `qemu-img create -o` makes differently."""


def qemu_img(*words: object) -> str:
    """Run it; gives its output."""
    require("qemu-img")
    done = run_stock(["qemu-img", *map(str, words)])
    try:
        done.check_returncode()
    except subprocess.CalledProcessError as exc:
        exc.add_note(done.stderr.decode())
        raise
    return done.stdout.decode()


def check(path: Path) -> str:
    """What `qemu-img check` finds; nothing: all is well."""
    done = _check(path)
    return done.stdout + done.stderr if done.returncode else ""


def no_worse_than_leaks(path: Path, *words: str) -> None:
    """`qemu-img check` finds clusters that nobody uses, at worst."""
    done = _check(path, *words)
    assert done.returncode in (0, 3), done.stdout + done.stderr


def _check(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    require("qemu-img")
    command = ["qemu-img", "check", *words, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


COUNTS = (
    *("corruptions", "leaks", "check_errors", "image_end_offset", "total_clusters"),
    *("allocated_clusters", "compressed_clusters", "fragmented_clusters"),
)
"""What both checks give."""


def qemu_check(path: Path, *words: str) -> dict[str, int] | None:
    """What `qemu-img check` counts; None: it refuses to open the image."""
    done = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", "--output=json", *words, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if not done.stdout.startswith("{"):
        return None
    found = json.loads(done.stdout)
    return {name: found.get(name.replace("_", "-"), 0) for name in COUNTS}


def our_check(path: Path, fix: int = 0, **options: Any) -> CheckResult:
    """What our check finds; raises ConfigError if it refuses to open the image."""

    async def run() -> CheckResult:
        graph = BlockGraph(DRIVERS)
        try:
            options.setdefault("read-only", not fix)
            node = await graph.open_image(
                str(path), {"driver": "qcow2", **options}, flags=FOR_CHECK
            )
            return await check_node(node, CheckMode(fix))
        finally:
            await graph.close_all()

    return asyncio.run(run())


def counts(result: CheckResult) -> dict[str, int]:
    """What QEMU's tool would say."""
    return {name: getattr(result, name) for name in COUNTS}


def create(path: Path, size: int, *words: object) -> Path:
    """A new image."""
    qemu_img("create", "-q", "-f", "qcow2", *words, path, size)
    return path


def qemu_io(path: Path, *commands: str) -> None:
    """Commands that succeed."""
    require("qemu-io")
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", *words, path], capture_output=True, text=True, check=True, timeout=120
    )
    assert "failed" not in done.stdout + done.stderr


@contextmanager
def used_by_qemu(path: Path) -> Iterator[None]:
    """QEMU has the image open for writing inside `with`."""
    user = subprocess.Popen(
        ["qemu-io", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert user.stdin is not None
    assert user.stdout is not None
    try:
        user.stdin.write("length\n")
        user.stdin.flush()
        while "MiB" not in (line := user.stdout.readline()):
            assert line
        yield
    finally:
        user.stdin.close()
        user.stdout.close()
        user.wait(timeout=60)


def scribble(path: Path, size: int, seed: int, times: int = 40) -> None:
    """Writes of all kinds by QEMU, at random places."""
    rnd = random.Random(seed)
    commands = []
    for _ in range(times):
        length = rnd.choice([512, 3584, 4096, 65536, 300 * 1024])
        length = min(length, size // 4)
        offset = rnd.randrange(0, size - length + 1) // 512 * 512
        kind = rnd.choice(["write", "write", "write -z", "write -z -u", "discard"])
        pattern = f" -P {rnd.randrange(1, 255)}" if kind == "write" else ""
        commands.append(f"{kind}{pattern} {offset} {length}")
    qemu_io(path, *commands)


def contents(path: Path, folder: Path) -> bytes:
    """What QEMU reads in an image."""
    qemu_img("convert", "-O", "raw", path, folder / "raw")
    return (folder / "raw").read_bytes()


def with_image(name: Path | str | None, scenario: Scenario, **options: Any) -> None:
    """Open an image by name, or by options that say where it is, run, close everything."""
    filename = None if name is None else str(name)
    with_disk(lambda graph: graph.open_image(filename, options), scenario)


def export(daemon: DaemonStarter, image: Path, socket: Path, *words: str) -> DaemonProcess:
    """A daemon that serves an image, writable, and gives back what is discarded."""
    return daemon(
        *("storage-daemon", "--blockdev"),
        f"qcow2,node-name=d,discard=unmap,file.driver=file,file.filename={image}",
        *(
            "--export",
            f"vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={socket}",
        ),
        *words,
        sockets=[socket],
    )
