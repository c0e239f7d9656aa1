"""Chains are committed, rebased and shortened under an export that the engine serves, while every byte is verified.

What the engine may do by itself has to be taken back before bytes or links change, and mapped again after it (row B32;
design of the extent map). The daemon runs on this test's loop, `vhostblk bench --verify` in another process.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.qcow2_images import check, create, qemu_io
from tests.requirements import require
from vhostblk.block import backing
from vhostblk.block.chain import depth, layers
from vhostblk.block.commit import commit
from vhostblk.block.keyval import parse_options
from vhostblk.block.rebase import rebase
from vhostblk.daemon import Daemon, DaemonConfig
from vhostblk.export.options import parse_export
from vhostblk.testing.daemon_process import VHOSTBLK

_SIZE = 8 << 20
_SPAN = 4 << 20
_LEAST_CHANGES = 8


class Changer:
    """Changes what a daemon's disk is backed by; what it shows stays the same."""

    def __init__(self, daemon: Daemon) -> None:
        self.done: Counter[str] = Counter()
        self._graph = daemon.graph
        self._export = daemon.exports["e"]
        self._top = daemon.graph.find("d")
        self._choice = random.Random(5)

    async def change(self) -> None:
        kind = self._choice.choice([self.commit, self.rebase, self.rebase, self.shorten])
        await kind()
        self.done[kind.__name__] += 1
        await self._let_it_run()

    async def _let_it_run(self) -> None:
        wanted = self._export.statistics().requests + self._choice.choice([0, 50, 400])
        for _ in range(100):
            await asyncio.sleep(0.0005)
            if self._export.statistics().requests >= wanted:
                break

    async def commit(self) -> None:
        if self._top.backing is not None:
            await commit(self._graph, self._top)

    async def rebase(self) -> None:
        name = self._choice.choice(["", "base", "other"])
        await rebase(self._graph, self._top, name, "qcow2" if name else "")

    async def shorten(self) -> None:
        """A layer that has nothing comes in between, and goes."""
        await rebase(self._graph, self._top, "hollow", "qcow2")
        await self._let_it_run()
        _, hollow, base = layers(self._top)
        await backing.drop_intermediate(self._graph, hollow, base)
        assert depth(self._top) == 1


@pytest.mark.timeout(240)
def test_every_byte_is_right_while_the_chain_changes(
    tmp_path: Path, socket_directory: Path
) -> None:
    for tool in ("engine", "qemu-img", "qemu-io"):
        require(tool)
    for name, pattern in (("base", 1), ("other", 2)):
        qemu_io(create(tmp_path / name, _SIZE), f"write -P {pattern} 0 3M")
    create(tmp_path / "hollow", _SIZE, "-b", "base", "-F", "qcow2")
    top = create(tmp_path / "top", _SIZE, "-b", "base", "-F", "qcow2")
    asyncio.run(_run(top, socket_directory / "e"))
    for name in ("base", "other", "hollow", "top"):
        assert check(tmp_path / name) == ""


async def _run(image: Path, socket: Path) -> None:
    ready = asyncio.Event()
    node = f"qcow2,node-name=d,discard=unmap,file.driver=file,file.filename={image}"
    export = f"vhost-user-blk,id=e,node-name=d,writable=on,num-queues=2,addr.type=unix,addr.path={socket}"
    config = DaemonConfig(
        blockdevs=[parse_options(node, "driver")],
        exports=[parse_export(parse_options(export, "type"))],
        data_path="native",
    )
    daemon = Daemon(config, ready.set)
    running = asyncio.create_task(daemon.run())
    await asyncio.wait([running, asyncio.create_task(ready.wait())], return_when="FIRST_COMPLETED")
    try:
        changer = Changer(daemon)
        while changer.done.total() < _LEAST_CHANGES:
            bench = await asyncio.create_subprocess_exec(
                *(*VHOSTBLK, "bench", str(socket), "--verify", "--queues", "2", "--depth", "8"),
                *("--size", str(_SPAN), "--requests", "1500", "--block-size", "512-64k"),
                *("--pattern", "read=45,write=45,flush=1,discard=4,write-zeroes=5"),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            output = asyncio.create_task(bench.communicate())
            while not output.done():
                await changer.change()
            _, error = await output
            assert bench.returncode == 0, f"{changer.done}\n{error.decode()}"
        statistics = daemon.exports["e"].statistics()
        assert statistics.hits > 0
        assert statistics.misses > 0
        assert all(not node.quiesced for node in daemon.graph.nodes.values())
    finally:
        daemon.stop()
        await running
