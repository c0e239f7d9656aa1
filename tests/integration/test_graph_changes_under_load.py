"""The graph is rebuilt and reopened under an export that the engine serves, while every byte is verified.

What the engine may do by itself has to be taken back before each change, and mapped again from the new graph after it
(rows B10 and B34; design of the extent map). The daemon runs on this test's loop, `vhostblk bench --verify` in another
process.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tests.requirements import require
from tests.unit.block.fakes import PassNode
from vhostblk.block import pipeline, submit, surgery
from vhostblk.block.backend import BlockBackend
from vhostblk.block.iov import IoVec
from vhostblk.block.keyval import parse_options
from vhostblk.block.length import resize
from vhostblk.block.node import BlockNode
from vhostblk.block.permissions import Perm
from vhostblk.block.quiesce import drained
from vhostblk.block.reopen import reopen
from vhostblk.block.tracking import RequestType
from vhostblk.daemon import Daemon, DaemonConfig
from vhostblk.errors import ConfigError
from vhostblk.export.options import parse_export
from vhostblk.testing.daemon_process import VHOSTBLK

_IMAGE = 32 << 20
_SPAN = 4 << 20
_LEAST_CHANGES = 60


class Changer:
    """Changes the graph of a daemon at random, and puts it back."""

    def __init__(self, daemon: Daemon) -> None:
        self.done: Counter[str] = Counter()
        self._graph = daemon.graph
        self._export = daemon.exports["e"]
        self._top = daemon.graph.find("d")
        self._choice = random.Random(11)
        self._filters: list[BlockNode] = []

    async def change(self) -> None:
        kinds = [self.insert, self.drop, self.reopen, self.grow, self.swap, self.snapshot]
        kind = self._choice.choice([*kinds, self.serialise, self.serialise, self.drain, self.visit])
        await kind()
        self.done[kind.__name__] += 1
        wanted = self._export.statistics().requests + self._choice.choice([0, 1, 50])
        for _ in range(50):
            await asyncio.sleep(0.0005)
            if self._export.statistics().requests >= wanted:
                break

    async def insert(self) -> None:
        below = self._choice.choice([*self._filters, self._top, self._top.children["file"].node])
        self._filters.append(await surgery.insert_filter(self._graph, below, {"driver": "pass"}))

    async def drop(self) -> None:
        while self._filters:
            await surgery.drop_filter(self._graph, self._filters.pop())

    async def reopen(self) -> None:
        """Another fd, where the file system has O_DIRECT."""
        direct = self._choice.choice(["on", "off"])
        file = self._graph.find("f")
        try:
            await reopen(self._graph, {file: {"cache.direct": direct}})
        except ConfigError as error:
            assert "O_DIRECT" in str(error)  # noqa: PT017

    async def grow(self) -> None:
        file = self._graph.find("f")
        await resize(self._graph, self._export.device.backend, file, file.length + 65536)

    async def swap(self) -> None:
        """The same bytes through another node: everybody moves to it and back."""
        await self.drop()
        other = await self._graph.add("raw,node-name=other,discard=unmap,file=f")
        await surgery.replace_node(self._graph, self._top, other)
        assert self._export.device.backend.node is other
        await asyncio.sleep(0.002)
        await surgery.replace_node(self._graph, other, self._top)
        await self._graph.remove("other")

    async def serialise(self) -> None:
        """Nobody writes what somebody has to themselves, neither through an extent nor otherwise."""
        node = self._choice.choice([self._top, self._graph.find("f")])
        size = self._choice.choice([4096, 65536, _SPAN])
        offset = self._choice.randrange(_SPAN // size) * size
        once, again = bytearray(size), bytearray(size)
        node.in_flight += 1
        request = node.tracker.begin(RequestType.WRITE, offset, size)
        try:
            await pipeline.serialise(node, request, 0)
            await submit.read(node, offset, IoVec.of(once))
            await asyncio.sleep(0.002)
            await submit.read(node, offset, IoVec.of(again))
        finally:
            node.tracker.end(request)
            node.leave()
        assert once == again, f"somebody wrote into {offset}..{offset + size} of {node!r}"

    async def drain(self) -> None:
        """Nothing at all is written meanwhile."""
        once, again = bytearray(_SPAN), bytearray(_SPAN)
        file = self._graph.find("f")
        async with drained(self._choice.choice([self._top, file])):
            await submit.read(file, 0, IoVec.of(once))
            await asyncio.sleep(0.002)
            await submit.read(file, 0, IoVec.of(again))
        assert once == again, "somebody wrote in a drain"

    async def visit(self) -> None:
        """Another user, who may write, then may not."""
        visitor = BlockBackend(self._top, "a visitor", writable=True, shared=Perm.ALL)
        await visitor.flush()
        await visitor.ask(writable=False)
        await visitor.preadv(self._choice.randrange(_SPAN), IoVec.of(bytearray(700)))
        await visitor.ask(writable=True)
        await visitor.close()

    async def snapshot(self) -> None:
        """Old bytes are kept while the engine writes what was copied already; they never change."""
        await self.drop()
        size = self._top.length
        options = {"driver": "copy-before-write", "target": {"driver": "memory", "size": size}}
        filter_ = await surgery.insert_filter(self._graph, self._top, options)
        node = await self._graph.add({"driver": "snapshot-access", "file": filter_.node_name})
        backup = BlockBackend(node, "backup", writable=False)
        once, again = bytearray(_SPAN), bytearray(_SPAN)
        await backup.preadv(0, IoVec.of(once))
        wanted = self._export.statistics().requests + 300
        for _ in range(100):
            await asyncio.sleep(0.0005)
            if self._export.statistics().requests >= wanted:
                break
        await backup.preadv(0, IoVec.of(again))
        assert once == again
        await backup.close()
        await self._graph.remove(node.node_name)
        await surgery.drop_filter(self._graph, filter_)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("place", ["/var/tmp", "/dev/shm"])
def test_every_byte_is_right_while_the_graph_changes(socket_directory: Path, place: str) -> None:
    require("engine")
    with tempfile.TemporaryDirectory(dir=place, prefix="vb-") as folder:
        image = Path(folder) / "image"
        with image.open("wb") as file:
            file.truncate(_IMAGE)
        asyncio.run(_run(image, socket_directory / "e"))


async def _run(image: Path, socket: Path) -> None:
    ready = asyncio.Event()
    node = f"raw,node-name=d,discard=unmap,file.driver=file,file.node-name=f,file.filename={image}"
    export = f"vhost-user-blk,id=e,node-name=d,writable=on,num-queues=2,addr.type=unix,addr.path={socket}"
    config = DaemonConfig(
        blockdevs=[parse_options(node, "driver")],
        exports=[parse_export(parse_options(export, "type"))],
        data_path="native",
    )
    daemon = Daemon(config, ready.set)
    daemon.graph.drivers.register(PassNode)
    running = asyncio.create_task(daemon.run())
    await asyncio.wait([running, asyncio.create_task(ready.wait())], return_when="FIRST_COMPLETED")
    try:
        changer = Changer(daemon)
        while changer.done.total() < _LEAST_CHANGES:
            bench = await asyncio.create_subprocess_exec(
                *(*VHOSTBLK, "bench", str(socket), "--verify", "--queues", "2", "--depth", "16"),
                *("--size", str(_SPAN), "--requests", "8000", "--block-size", "512-64k"),
                *("--pattern", "read=45,write=45,flush=1,discard=4,write-zeroes=5"),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            output = asyncio.create_task(bench.communicate())
            while not output.done():
                await changer.change()
            _, error = await output
            assert bench.returncode == 0, f"{changer.done}\n{error.decode()}"
        await changer.drop()
        statistics = daemon.exports["e"].statistics()
        assert statistics.hits > 0
        assert statistics.misses > 0
        assert all(not node.quiesced for node in daemon.graph.nodes.values())
    finally:
        daemon.stop()
        await running
