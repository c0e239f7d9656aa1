"""qcow2 images for tests: made and checked by QEMU's tools, opened here."""

from __future__ import annotations

import asyncio
import random
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.opening import open_image

MIB = 1 << 20
Scenario = Callable[[BlockBackend], Awaitable[None]]

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
    done = subprocess.run(
        ["qemu-img", *map(str, words)], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout


def check(path: Path) -> str:
    """What `qemu-img check` finds; nothing: all is well."""
    done = subprocess.run(
        ["qemu-img", "check", str(path)], capture_output=True, text=True, check=False, timeout=120
    )
    return done.stdout + done.stderr if done.returncode else ""


def create(path: Path, size: int, *words: object) -> Path:
    """A new image."""
    qemu_img("create", "-q", "-f", "qcow2", *words, path, size)
    return path


def qemu_io(path: Path, *commands: str) -> None:
    """Commands that succeed."""
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", *words, path], capture_output=True, text=True, check=True, timeout=120
    )
    assert "failed" not in done.stdout + done.stderr


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


def with_image(name: Path | str, scenario: Scenario, **options: Any) -> None:
    """Open an image by name, run, close everything."""

    async def everything() -> None:
        graph = BlockGraph(DRIVERS)
        try:
            node = await open_image(graph, str(name), options)
            writable = not node.read_only
            backend = BlockBackend(node, "the test", writable=writable, resize=writable)
            try:
                await scenario(backend)
            finally:
                await backend.close()
        finally:
            await graph.close_all()

    asyncio.run(everything())


async def read(backend: BlockBackend, offset: int, length: int) -> bytes:
    """All of it."""
    data = bytearray(b"\xee" * length)
    await backend.preadv(offset, IoVec.of(data))
    return bytes(data)
