"""Whatever takes extents back is heard by whoever has some, with the right range (rows B08.9, B14, B26; extent map).

Each way to take them back has a test that fails without it, whatever random runs happen to find.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.qcow2_images import create
from tests.unit.block.fakes import ArrayNode, NoOptions, PassNode, put_above, run_now, turns
from vhostblk.block import pipeline, surgery
from vhostblk.block.activation import activate, inactivate
from vhostblk.block.backend import BlockBackend
from vhostblk.block.dirty_map import DirtyMap, record, stop_recording
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.edge import Edge
from vhostblk.block.extent import ExtentFlag, HostExtent, PastWrites
from vhostblk.block.flags import Req
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.length import resize
from vhostblk.block.node import BlockNode, Role
from vhostblk.block.options import NodeOptions
from vhostblk.block.permissions import Perm
from vhostblk.block.reopen import reopen
from vhostblk.block.tracking import RequestType

KIB = 1024
SIZE = 64 * KIB
CLUSTER = 64 * KIB


class MappedNode(ArrayNode):
    """All of it is a file, for whoever asks."""

    waits = 0

    async def host_extent(self, offset: int, length: int) -> HostExtent | None:
        await turns(self.waits)
        return HostExtent(0, self.length, 7, 0, ExtentFlag.READ | ExtentFlag.WRITE)


class Listener:
    """A user of a node, and what it was told."""

    def __init__(self, node: BlockNode) -> None:
        self.user = BlockBackend(node, "listener", writable=True, shared=Perm.ALL)
        self.ranges: list[tuple[int, int]] = []
        self.flushes = 0
        self.taken: list[bool] = []
        self.user.attach(
            revoke=self._revoke, revoke_flush=self._revoke_flush, take_writes=self._take
        )

    async def _revoke(self, offset: int, length: int) -> None:
        self.ranges.append((offset, length))

    async def _revoke_flush(self) -> None:
        self.flushes += 1

    def _take(self, ranges: bool) -> PastWrites:
        self.taken.append(ranges)
        return PastWrites(0)


def user_of(node: BlockNode) -> BlockBackend:
    return BlockBackend(node, "user", writable=True, shared=Perm.ALL)


# ---------------------------------------------------------------------- who is told


def test_revocation_goes_up_through_filters_as_it_is() -> None:
    leaf = ArrayNode(SIZE)
    listener = Listener(put_above(put_above(leaf), "top"))
    run_now(leaf.revoke(4096, 512))
    run_now(leaf.revoke_flush())
    assert (listener.ranges, listener.flushes) == ([(4096, 512)], 1)


def test_who_does_not_know_where_its_data_are_loses_all() -> None:
    leaf = ArrayNode(SIZE)
    top = PassNode("top", NodeOptions(), NoOptions())
    edge = Edge(top, leaf, "data", Role.DATA, Perm.NONE, Perm.ALL)
    edge.attach()
    top.length = 4 * SIZE
    listener = Listener(top)
    run_now(leaf.revoke(4096, 512))
    assert listener.ranges == [(0, 4 * SIZE)]


def test_map_that_is_given_up_is_not_kept_any_longer() -> None:
    node = MappedNode(SIZE)
    listener = Listener(node)
    dirty = DirtyMap(SIZE, 512)
    run_now(record(node, dirty))
    listener.ranges.clear()
    run_now(stop_recording(node, dirty))
    assert listener.ranges == [(0, SIZE)]


def test_user_that_gives_up_writing_gives_up_extents_that_allow_it() -> None:
    listener = Listener(MappedNode(SIZE))
    run_now(listener.user.ask(writable=True, resize=True))
    assert not listener.ranges
    run_now(listener.user.ask(writable=False))
    assert listener.ranges == [(0, SIZE)]


def test_drain_brings_in_what_was_written_before_the_graph_can_change() -> None:
    node = MappedNode(SIZE)
    listener = Listener(node)
    run_now(node.revoke(0, 512))
    assert not listener.taken
    run_now(node.drained_begin())
    assert listener.taken == [True]
    node.drained_end()


def test_snapshots_filter_passes_on_what_its_file_takes_back_not_what_its_target_does() -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        await graph.add("null-co,node-name=file,size=64k")
        await graph.add("null-co,node-name=target,size=64k")
        top = await graph.add("copy-before-write,node-name=top,file=file,target=target")
        listener = Listener(top)
        await graph.find("target").revoke(0, 512)
        await graph.find("target").revoke_flush()
        assert (listener.ranges, listener.flushes) == ([], 0)
        await graph.find("file").revoke(4096, 512)
        await graph.find("file").revoke_flush()
        assert (listener.ranges, listener.flushes) == ([(4096, 512)], 1)
        await listener.user.close()
        await graph.close_all()

    asyncio.run(scenario())


# ---------------------------------------------------------------------- nothing is given out meanwhile


def while_asking(node: MappedNode, disturb: Callable[[], Any]) -> list[HostExtent]:
    """What a user is given if something happens while a driver looks."""

    async def scenario() -> list[HostExtent]:
        user = user_of(node)
        node.waits = 2
        task = asyncio.create_task(user.extents(0, 512))
        await turns(1)
        result = disturb()
        if isinstance(result, Coroutine):
            await result
        found = await task
        node.waits = 0
        return found

    return asyncio.run(scenario())


def serialise(node: ArrayNode) -> None:
    request = node.tracker.begin(RequestType.WRITE, 0, 512)
    node.tracker.mark_serialising(request, 512)


DISTURBANCES: dict[str, Callable[[MappedNode], Any]] = {
    "drained": lambda node: node.quiesce(),
    "user stopped": lambda node: node.parents[0].parent.child_drained_begin(node.parents[0]),
    "range revoked": lambda node: node.revoke(0, 512),
    "serialising request": serialise,
}


@pytest.mark.parametrize("name", DISTURBANCES)
def test_extent_that_a_driver_took_time_to_find_is_not_given_out_any_more(name: str) -> None:
    node = MappedNode(SIZE)
    assert while_asking(node, lambda: None)
    node = MappedNode(SIZE)
    assert while_asking(node, lambda: DISTURBANCES[name](node)) == []


def test_layers_ask_again_whether_an_extent_from_below_still_holds() -> None:
    """A user notices a drain by itself; a layer in between, whose user is not drained yet, has to look."""

    async def scenario() -> None:
        node = MappedNode(SIZE)
        node.waits = 2
        task = asyncio.create_task(pipeline.host_extent(node, 0, 512))
        await turns(1)
        node.quiesce()
        assert await task is None

    asyncio.run(scenario())


def test_no_extent_is_given_out_in_the_way_of_a_serialising_request() -> None:
    node = MappedNode(SIZE)
    asked: list[int] = []
    host_extent = node.host_extent

    async def ask(offset: int, length: int) -> HostExtent | None:
        asked.append(offset)
        return await host_extent(offset, length)

    node.host_extent = ask  # type: ignore[method-assign]
    request = node.tracker.begin(RequestType.WRITE, 4096, 512)
    node.tracker.mark_serialising(request, 512)
    assert not node.mappable(4096 + 511, 1)
    assert not node.mappable(0, SIZE)
    assert node.mappable(0, 4096)
    assert run_now(pipeline.host_extent(node, 4096, 512)) is None
    assert not asked  # drivers may count on it
    extent = run_now(pipeline.host_extent(node, 8192, 512))
    assert extent is not None
    assert (extent.offset, extent.end) == (4608, SIZE)
    node.tracker.end(request)
    assert node.mappable(0, SIZE)


def test_extents_of_a_read_only_node_give_no_right_to_write() -> None:
    node = MappedNode(SIZE)
    node.read_only = True
    extent = run_now(pipeline.host_extent(node, 0, 512))
    assert extent is not None
    assert extent.flags == ExtentFlag.READ


# ---------------------------------------------------------------------- everybody who serialises revokes


SERIALISING: dict[str, tuple[Callable[[BlockNode], Coroutine[Any, Any, None]], tuple[int, int]]] = {
    "padded write": (
        lambda node: pipeline.pwritev(node.lane, 700, IoVec.of(b"x" * 100)),
        (512, 512),
    ),
    "write that asks for it": (
        lambda node: pipeline.pwritev(node.lane, 512, IoVec.of(bytes(512)), int(Req.SERIALISING)),
        (512, 512),
    ),
    "shrinking": (lambda node: pipeline.truncate(node, SIZE - 4096), (SIZE - 4096, 4096)),
    "growing": (lambda node: pipeline.truncate(node, SIZE + 4096), (SIZE, 4096)),
}


@pytest.mark.parametrize("name", SERIALISING)
def test_serialising_request_takes_its_range_back_before_the_driver_hears_of_it(name: str) -> None:
    perform, expected = SERIALISING[name]
    node = MappedNode(SIZE)
    node.limits.request_alignment = 512
    node.limits.check()
    listener = Listener(node)
    before: list[list[tuple[int, int]]] = []

    async def look() -> None:
        before.append(list(listener.ranges))

    node.pause = look
    run_now(perform(node))
    assert before
    assert all(expected in ranges for ranges in before)


# ---------------------------------------------------------------------- every change of the graph takes all back


async def insert(graph: BlockGraph) -> None:
    await surgery.insert_filter(graph, graph.find("top"), {"driver": "pass", "node-name": "above"})


async def drop(graph: BlockGraph) -> None:
    await surgery.drop_filter(graph, graph.find("filter"))


async def swap(graph: BlockGraph) -> None:
    other = await graph.add("raw,node-name=other,file=file")
    await surgery.replace_node(graph, graph.find("filter"), other)


async def grow(graph: BlockGraph) -> None:
    other = BlockBackend(graph.find("file"), "other", writable=False, shared=Perm.ALL)
    await resize(graph, other, graph.find("file"), 2 * SIZE)
    await other.close()


async def hand_over(graph: BlockGraph) -> None:
    await inactivate(graph)
    await activate(graph)


CHANGES: dict[str, Callable[[BlockGraph], Coroutine[Any, Any, None]]] = {
    "insert": insert,
    "drop": drop,
    "swap": swap,
    "resize": grow,
    "reopen": lambda graph: reopen(graph, {graph.find("file"): {"detect-zeroes": "on"}}),
    "hand over": hand_over,
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_of_the_graph_takes_everything_back_first_and_waits_for_requests(name: str) -> None:
    async def scenario() -> None:
        graph = BlockGraph({**DRIVERS, "pass": PassNode})
        file = await graph.add("memory,node-name=file,size=64k")
        await graph.add("pass,node-name=filter,file=file")
        top = await graph.add("raw,node-name=top,file=filter")
        listener = Listener(top)
        go = asyncio.Event()
        pwritev = file.driver_pwritev

        async def wait(offset: int, length: int, iov: IoVec, flags: int) -> None:
            await go.wait()
            await pwritev(offset, length, iov, flags)

        file.driver_pwritev = wait  # type: ignore[method-assign]
        write = asyncio.create_task(listener.user.pwritev(0, IoVec.of(bytes(512))))
        await turns(2)
        task = asyncio.create_task(CHANGES[name](graph))
        await turns(20)
        assert (0, SIZE) in listener.ranges
        assert not task.done()
        assert not file.inactive
        assert (file.length, file.detect_zeroes) == (SIZE, "")
        assert [edge.parent for edge in file.parents][:1] == [graph.find("filter")]
        assert listener.user.node is top
        go.set()
        await task
        await write
        await listener.user.close()
        await graph.close_all()

    asyncio.run(scenario())


# ---------------------------------------------------------------------- images whose clusters move


def test_qcow2_image_takes_back_what_moves_and_what_its_children_take_back(tmp_path: Path) -> None:
    base = create(tmp_path / "base", 4 * CLUSTER)
    image = create(tmp_path / "image", 4 * CLUSTER, "-b", base, "-F", "qcow2")

    async def scenario() -> None:
        graph = BlockGraph()
        file = {"driver": "file", "filename": str(image), "node-name": "file"}
        node = await graph.add({"driver": "qcow2", "node-name": "top", "file": file})
        listener = Listener(node)
        await listener.user.pwritev(CLUSTER + 512, IoVec.of(b"x" * 512))
        assert any(start <= CLUSTER < start + length for start, length in listener.ranges)
        assert listener.flushes
        listener.ranges.clear()
        await node.children["backing"].node.revoke(4096, 512)
        assert listener.ranges == [(4096, 512)]
        await graph.find("file").revoke(4096, 512)
        assert listener.ranges[1:] == [(0, 4 * CLUSTER)]
        await listener.user.close()
        await graph.close_all()

    asyncio.run(scenario())
