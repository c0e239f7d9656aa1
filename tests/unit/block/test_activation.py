"""Handing images over to another process, and taking them back (row B40)."""

from __future__ import annotations

import asyncio
import errno
import random
from functools import partial
from pathlib import Path

import pytest

from tests.unit.block.fakes import PassNode, turns
from vhostblk.block.activation import activate, inactivate
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode
from vhostblk.block.permissions import Perm
from vhostblk.errors import BlockError, ConfigError

KIB = 1024


class Remembering(PassNode):
    driver_name = "remembering"
    fails = False
    told = ""

    async def driver_inactivate(self) -> None:
        self.told += "i"
        if self.fails:
            raise ConfigError("cannot store")

    async def driver_activate(self) -> None:
        self.told += "a"
        if self.fails:
            raise ConfigError("cannot read")


async def disk(image: Path) -> tuple[BlockGraph, BlockBackend]:
    """What a daemon has: an image, and an export of it; still inactive."""
    graph = BlockGraph({**DRIVERS, "remembering": Remembering})
    node = await graph.add(
        {
            "driver": "remembering",
            "node-name": "top",
            "file": {"driver": "raw", "file": {"driver": "file", "filename": str(image)}},
        }
    )
    await inactivate(graph)
    backend = BlockBackend(node, "export", writable=False, shared=Perm.ALL)
    return graph, backend


async def close(graph: BlockGraph, *backends: BlockBackend) -> None:
    for backend in backends:
        await backend.close()
    await graph.close_all()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(64 * KIB))
    return path


def added(graph: BlockGraph) -> BlockNode:
    return graph.find("top")


def test_image_goes_back_and_forth_between_two_owners_without_a_lost_byte(image: Path) -> None:
    async def scenario() -> None:
        choice = random.Random(5)
        model = bytearray(64 * KIB)
        graphs = []
        for _ in range(2):
            graph = BlockGraph()
            file = {"driver": "file", "filename": str(image)}
            await graph.add({"driver": "raw", "node-name": "top", "file": file})
            backend = BlockBackend(added(graph), "export", writable=True)
            await inactivate(graph)
            graphs.append((graph, backend))
        for turn in range(60):
            (graph, backend), (other, _) = graphs[turn % 2], graphs[1 - turn % 2]
            await activate(graph)
            with pytest.raises(ConfigError, match="is another process using the image"):
                await activate(other)
            found = bytearray(len(model))
            await backend.preadv(0, IoVec([memoryview(found)]))
            assert found == model
            tasks = []
            for _ in range(8):
                offset, data = (
                    choice.randrange(63 * KIB),
                    choice.randbytes(choice.randrange(1, KIB)),
                )
                model[offset : offset + len(data)] = data
                await backend.pwritev(offset, IoVec([memoryview(data)]))
            tasks.append(asyncio.create_task(backend.flush()))
            assert await backend.extents(0, 512)
            await inactivate(graph)
            await asyncio.gather(*tasks)
            assert await backend.extents(0, 512) == []
            with pytest.raises(BlockError) as caught:
                await backend.pwritev(0, IoVec([memoryview(b"late")]))
            assert caught.value.errno == errno.EPERM
        for graph, backend in graphs:
            await close(graph, backend)
        assert await asyncio.to_thread(image.read_bytes) == model

    asyncio.run(scenario())


def test_permissions_come_back_as_they_were(image: Path) -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        node = await graph.add("memory,node-name=top,size=64k")
        writer = BlockBackend(node, "writer", writable=True, shared=Perm.ALL)
        reader = BlockBackend(node, "reader", writable=False, shared=Perm.ALL)
        before = [(edge.perm, edge.shared) for edge in node.parents]
        await inactivate(graph)
        assert [(edge.perm, edge.shared) for edge in node.parents] == [(Perm.NONE, Perm.ALL)] * 2
        await inactivate(graph)
        late = BlockBackend(node, "late", writable=True, shared=Perm.ALL)
        assert (late.root.perm, late.root.shared) == (Perm.NONE, Perm.ALL)
        with pytest.raises(BlockError) as caught:
            await late.pwritev(0, IoVec.of(b"x" * 512))
        assert caught.value.errno == errno.EPERM
        await activate(graph)
        await activate(graph)
        given = [(edge.perm, edge.shared) for edge in node.parents]
        assert given == [*before, before[0]]  # what comes meanwhile waits for it, too
        await late.pwritev(0, IoVec.of(b"x" * 512))
        await close(graph, writer, reader, late)

    asyncio.run(scenario())


def test_driver_that_cannot_store_keeps_everything_active(image: Path) -> None:
    async def scenario() -> None:
        graph, reader = await disk(image)
        await activate(graph)
        node = added(graph)
        assert isinstance(node, Remembering)
        writer = BlockBackend(node, "writer", writable=True, shared=Perm.ALL)
        node.fails = True
        with pytest.raises(ConfigError, match="cannot store"):
            await inactivate(graph)
        assert not any(each.inactive for each in graph.nodes.values())
        await writer.pwritev(0, IoVec([memoryview(b"still ours")]))
        node.fails = False
        await inactivate(graph)
        node.fails = True
        with pytest.raises(ConfigError, match="cannot read"):
            await activate(graph)
        assert all(each.inactive for each in graph.nodes.values())
        node.fails = False
        await activate(graph)
        await close(graph, reader, writer)

    asyncio.run(scenario())


class Slow(PassNode):
    """Looks at its image for a while, and then may not like it."""

    driver_name = "slow"
    fails = False
    looking: asyncio.Event
    looked: asyncio.Event

    async def driver_activate(self) -> None:
        self.looking.set()
        await self.looked.wait()
        if self.fails:
            raise ConfigError("cannot read")


@pytest.mark.parametrize("fails", [False, True])
def test_nobody_comes_while_it_is_not_certain_whose_image_it_is(image: Path, fails: bool) -> None:
    async def scenario() -> None:
        graph = BlockGraph({**DRIVERS, "slow": Slow})
        file = {"driver": "file", "filename": str(image), "node-name": "file"}
        node = await graph.add({"driver": "slow", "node-name": "top", "file": file})
        assert isinstance(node, Slow)
        leaver = BlockBackend(node, "leaver", writable=False, shared=Perm.ALL)
        reader = BlockBackend(node, "reader", writable=False, shared=Perm.ALL)
        await inactivate(graph)
        looker = BlockBackend(node, "looker", writable=False, shared=Perm.ALL)
        held = [(edge.perm, edge.shared, edge.suspended) for edge in node.parents[1:]]
        node.fails, node.looking, node.looked = fails, asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(activate(graph))
        await node.looking.wait()
        with pytest.raises(ConfigError, match="Node 'top' is just being activated") as caught:
            BlockBackend(node, "late", writable=True, shared=Perm.ALL)
        assert caught.value.errno == errno.EBUSY
        # Who leaves does.
        leaver.root.detach()
        node.looked.set()
        if fails:
            with pytest.raises(ConfigError, match="cannot read"):
                await task
            now = [(edge.perm, edge.shared, edge.suspended) for edge in node.parents]
            assert now == held
            assert node.inactive
            node.fails = False
            task = asyncio.create_task(activate(graph))
        await task
        late = BlockBackend(node, "late", writable=True, shared=Perm.ALL)
        await late.pwritev(0, IoVec([memoryview(b"now it may")]))
        assert not node.inactive
        await close(graph, late, looker, reader)

    asyncio.run(scenario())


def test_image_that_is_given_up_twice_at_the_same_time_comes_back_with_all_permissions() -> None:
    """Two exports of one node, each told to hand it over."""

    async def scenario() -> None:
        graph = BlockGraph()
        node = await graph.add("memory,node-name=top,size=64k")
        writer = BlockBackend(node, "writer", writable=True, shared=Perm.ALL)
        before = (writer.root.perm, writer.root.shared)
        node.driver_flush_to_os = partial(turns, 3)  # type: ignore[method-assign]
        await asyncio.gather(inactivate(graph), inactivate(graph, [node]))
        await asyncio.gather(activate(graph), activate(graph, [node]))
        assert (writer.root.perm, writer.root.shared) == before
        await close(graph, writer)

    asyncio.run(scenario())


def test_flush_that_fails_keeps_everything_active() -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        node = await graph.add("memory,node-name=top,size=64k")

        async def fail() -> None:
            raise BlockError(errno.ENOSPC)

        node.driver_flush_to_os = fail  # type: ignore[method-assign]
        with pytest.raises(ConfigError, match="Error flushing node 'top'"):
            await inactivate(graph)
        assert not node.inactive
        del node.driver_flush_to_os
        await close(graph)

    asyncio.run(scenario())


def test_length_is_what_the_other_owner_has_made_of_it(image: Path) -> None:
    async def scenario() -> None:
        graph, backend = await disk(image)
        sizes: list[int] = []
        backend.attach(resized=sizes.append)
        with image.open("r+b") as other:
            other.truncate(128 * KIB)
        await activate(graph)
        assert sizes == [128 * KIB]
        await close(graph, backend)

    asyncio.run(scenario())


def test_node_is_not_given_up_while_somebody_outside_writes_it() -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        low = await graph.add("memory,node-name=low,size=64k")
        top = await graph.add("raw,node-name=top,file=low")
        writer = BlockBackend(top, "writer", writable=True)
        with pytest.raises(ConfigError, match="Node 'low' is inactive"):
            await inactivate(graph, [low])
        assert not low.inactive
        await inactivate(graph, [top])
        assert low.inactive
        await activate(graph, [top])
        await close(graph, writer)

    asyncio.run(scenario())
