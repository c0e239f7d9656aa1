"""The power goes while layers are committed, rebased, and say another name: the image shows what it did (row B32).

What reaches the files of two layers is recorded in one log. A state after a crash has what each file had been sent
before its last flush, and any subset of what came later, sectors of it torn. In each state the image shows the same
bytes, and `qemu-img check` finds leaks at worst; but for an image that says that it has to be repaired first, which
was being emptied: whoever writes to it does that.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.chains import Layer, make, shown
from tests.qcow2_images import MIB, contents, qemu_img, qemu_io
from vhostblk.block.backing import change_backing_file
from vhostblk.block.commit import commit
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.filters.filter import FilterNode
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode
from vhostblk.block.rebase import rebase
from vhostblk.testing.requirements import require

STATES = int(os.environ.get("VHOSTBLK_CRASH_STATES", "25"))
"""Of each operation."""
SECTOR = 512
FLUSH = None
Entry = tuple[Path, int, bytes | None]
"""A write to a file, or a flush of it."""
Work = Callable[[BlockGraph, BlockNode], Awaitable[None]]


class TapeNode(FilterNode):
    """Writes down what reaches its file."""

    driver_name = "tape"
    path: Path
    log: list[Entry]

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        self.log.append((self.path, offset, iov.tobytes()))
        await self.file.pwritev(offset, iov, flags)

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        self.log.append((self.path, offset, bytes(length)))
        await self.file.pwrite_zeroes(offset, length, flags)

    async def driver_pdiscard(self, offset: int, length: int) -> None:
        self.log.append((self.path, offset, bytes(length)))
        await self.file.pdiscard(offset, length)

    async def driver_flush_to_disk(self) -> None:
        self.log.append((self.path, 0, FLUSH))


def record(paths: list[Path], drivers: list[str], work: Work) -> list[Entry]:
    """What an operation on a chain, the base last, sends to its files."""
    log: list[Entry] = []

    async def everything() -> None:
        graph = BlockGraph({**DRIVERS, "tape": TapeNode})
        below: BlockNode | None = None
        for path, driver in zip(reversed(paths), reversed(drivers), strict=True):
            file = {"driver": "file", "filename": str(path)}
            tape = await graph.add(
                {"driver": "tape", "file": file, "discard": "unmap", "auto-read-only": True}
            )
            assert isinstance(tape, TapeNode)
            tape.path, tape.log = path, log
            options = {"driver": driver, "file": tape.node_name, "discard": "unmap"}
            if below is not None:
                options["backing"] = below.node_name
            below = await graph.add(options)
        assert below is not None
        await work(graph, below)
        await graph.close_all()

    asyncio.run(everything())
    return log


def survives(entry: Entry, is_safe: bool, rnd: random.Random) -> Iterator[tuple[int, bytes]]:
    _, offset, data = entry
    luck = rnd.random()
    if data is None:
        return
    if is_safe or luck < 0.4:
        yield offset, data
    elif luck < 0.6:
        for at in range(0, len(data), SECTOR):
            if rnd.random() < 0.5:
                yield offset + at, data[at : at + SECTOR]


def state(before: dict[Path, bytes], log: list[Entry], end: int, rnd: random.Random) -> None:
    """Make the files as they are if the power goes after so many entries."""
    files = {path: bytearray(content) for path, content in before.items()}
    safe = dict.fromkeys(files, -1)
    for at, (path, _, data) in enumerate(log[:end]):
        if data is FLUSH:
            safe[path] = at
    for at, entry in enumerate(log[:end]):
        file = files[entry[0]]
        for offset, data in survives(entry, at < safe[entry[0]], rnd):
            if len(file) < offset + len(data):
                file.extend(bytes(offset + len(data) - len(file)))
            file[offset : offset + len(data)] = data
    for path, content in files.items():
        path.write_bytes(content)


async def say_other_names(graph: BlockGraph, node: BlockNode) -> None:
    for name in ("./base", "sub/../base", "./././base", "sub/../sub/../base"):
        await change_backing_file(graph, node, name, "qcow2")


async def keep_and_leave(graph: BlockGraph, node: BlockNode) -> None:
    await rebase(graph, node, "other", "qcow2")
    await rebase(graph, node, "")


_INCOMPATIBLE, _DIRTY = 72, 1  # qcow2 specification, "Header"

OPERATIONS: dict[str, tuple[Work, list[tuple[int, str]]]] = {
    "commit": (commit, [(2 * MIB, ""), (MIB, "")]),
    "commit of a shorter one": (commit, [(MIB, "cluster_size=4k"), (2 * MIB, "extended_l2=on")]),
    "rebase": (keep_and_leave, [(2 * MIB, "extended_l2=on"), (MIB, "")]),
    "other names": (say_other_names, [(MIB, ""), (MIB, "")]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_image_shows_the_same_after_a_crash_at_any_moment(tmp_path: Path, name: str) -> None:
    require("qemu-img")
    require("qemu-io")
    work, shape = OPERATIONS[name]
    (tmp_path / "sub").mkdir()
    rnd = random.Random(len(name))
    layers = [Layer(("top", "base")[number], *of) for number, of in enumerate(shape)]
    make(tmp_path, layers, rnd)
    if name == "commit":
        qemu_img("snapshot", "-c", "s", tmp_path / "top")
        qemu_io(tmp_path / "top", "write -P 77 64k 64k")
        layers[0].write(65536, b"M" * 65536)
    make(tmp_path, [Layer("other", MIB)], rnd)
    content = shown(layers)
    paths = [tmp_path / layer.name for layer in layers]
    before = {path: path.read_bytes() for path in paths}
    log = record(paths, ["qcow2", "qcow2"], work)
    ends = [rnd.randrange(len(log) + 1) for _ in range(STATES)]
    for end in [*ends, len(log)]:
        state(before, log, end, rnd)
        assert contents(tmp_path / "top", tmp_path) == content, f"after {end} entries"
        for path in paths:
            if path.read_bytes()[_INCOMPATIBLE + 7] & _DIRTY:
                qemu_io(path, "flush")
                assert contents(tmp_path / "top", tmp_path) == content, f"after {end} entries"
            done = subprocess.run(
                ["qemu-img", "check", path], capture_output=True, text=True, check=False, timeout=60
            )
            assert done.returncode in (0, 3), f"after {end} entries: {done.stdout}{done.stderr}"
