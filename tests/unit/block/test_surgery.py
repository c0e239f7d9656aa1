"""Rebuilding the graph: append, replace, insert and drop filters, and what is refused (row B10)."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.block.fakes import NoOptions, PassNode, turns
from vhostblk.block import surgery
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.edge import Edge
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode, HostExtent, OpenContext
from vhostblk.block.op_blockers import OpType, Reason, freeze_backing_chain, unfreeze_backing_chain
from vhostblk.block.permissions import Perm
from vhostblk.block.pipeline import host_extent
from vhostblk.block.quiesce import drained
from vhostblk.block.roles import Role
from vhostblk.errors import BlockError, ConfigError

KIB = 1024


class Overlay(BlockNode):
    """A format that only ever reads its backing file."""

    driver_name = "overlay"
    options_type = NoOptions
    child_keys = ("backing",)

    async def open(self, context: OpenContext) -> None:
        self.length = 64 * KIB

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        await self.children["backing"].preadv(offset, iov)


class Clear(PassNode):
    """A filter that lets extents through."""

    driver_name = "clear"

    async def host_extent(self, offset: int, length: int) -> HostExtent | None:
        return await host_extent(self._filtered().node, offset, length)


ALL = {**DRIVERS, "overlay": Overlay, "pass": PassNode, "clear": Clear}


def with_graph(scenario: Callable[[BlockGraph], Awaitable[Any]]) -> None:
    async def run() -> None:
        graph = BlockGraph({**ALL, "gate": Gate})
        await scenario(graph)
        await graph.close_all()

    asyncio.run(run())


def picture(graph: BlockGraph) -> list[Any]:
    """The whole graph, bit for bit."""
    return [
        (
            node,
            node.quiesced,
            node.references,
            dict(node.children),
            [(edge, edge.node, edge.perm, edge.shared, edge.frozen) for edge in node.parents],
            node.limits,
            node.length,
            bool(node.op_blockers),
        )
        for node in graph.nodes.values()
    ]


async def byte_at(backend: BlockBackend, offset: int) -> bytes:
    data = bytearray(1)
    await backend.preadv(offset, IoVec([memoryview(data)]))
    return bytes(data)


def test_filter_is_put_between_a_node_and_its_users_and_taken_out_again() -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add("memory,node-name=m,size=64k")
        backend = BlockBackend(node, "export 'e'", writable=True)
        other = BlockBackend(node, "export 'f'", writable=False, shared=Perm.ALL)
        await backend.pwritev(0, IoVec([memoryview(b"x")]))
        before = picture(graph)
        new = await surgery.insert_filter(graph, node, {"driver": "pass", "node-name": "p"})
        assert backend.node is other.node is new
        assert [edge.parent for edge in node.parents] == [new]
        assert node.parents[0].perm & Perm.WRITE
        assert await byte_at(backend, 0) == b"x"
        assert await backend.extents(0, 512) == []
        with pytest.raises(ConfigError, match="Node 'm' is in use: node 'p' as 'file'"):
            await graph.remove("m")
        await surgery.drop_filter(graph, new)
        assert picture(graph) == before
        assert backend.node is node
        assert await backend.extents(0, 512)
        await backend.close()
        await other.close()

    with_graph(scenario)


def test_overlay_is_appended_below_everybody_who_used_the_top_except_edges_that_stay() -> None:
    async def scenario(graph: BlockGraph) -> None:
        base = await graph.add("memory,node-name=base,size=64k")
        guest = BlockBackend(base, "guest", writable=False)
        job = BlockBackend(base, "job", writable=False)
        job._edge.stays = True
        overlay = await graph.add("overlay,node-name=o")
        await surgery.append(graph, overlay, base)
        assert (guest.node, job.node) == (overlay, base)
        assert overlay.backing is base
        assert base.op_blockers.reason(OpType.RESIZE) is not None
        assert base.op_blockers.reason(OpType.COMMIT_TARGET) is None
        with pytest.raises(ConfigError, match="Node 'o' is in use already"):
            await surgery.append(graph, overlay, base)
        await guest.close()
        await job.close()

    with_graph(scenario)


class Gate(PassNode):
    """Reads wait at it."""

    driver_name = "gate"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.opened = asyncio.Event()
        self.asked = 0

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        self.asked += 1
        await self.opened.wait()
        await super().driver_preadv(offset, length, iov)


def test_append_waits_for_what_is_in_flight_and_what_comes_meanwhile_is_for_the_overlay() -> None:
    async def scenario(graph: BlockGraph) -> None:
        await graph.add("memory,node-name=low,size=64k")
        gate = await graph.add("gate,node-name=base,file=low")
        assert isinstance(gate, Gate)
        guest = BlockBackend(gate, "guest", writable=False)
        overlay = await graph.add("overlay,node-name=o")
        reads = [asyncio.create_task(byte_at(guest, 0))]
        await turns(2)
        appending = asyncio.create_task(surgery.append(graph, overlay, gate))
        await turns(10)
        reads.append(asyncio.create_task(byte_at(guest, 0)))
        await turns(10)
        assert gate.asked == 1
        assert not appending.done()
        assert guest.node is gate
        gate.opened.set()
        await asyncio.wait_for(asyncio.gather(appending, *reads), 10)
        assert guest.node is overlay
        assert gate.asked == 2
        await guest.close()

    with_graph(scenario)


class Quorum(BlockNode):
    """Any number of children, at least one."""

    driver_name = "quorum"
    options_type = NoOptions
    child_keys = ("children",)

    async def open(self, context: OpenContext) -> None:
        self.length = 64 * KIB

    def driver_add_child(self, child: BlockNode) -> tuple[str, Role]:
        return f"children.{len(self.children)}", Role.DATA

    def driver_del_child(self, edge: Edge) -> None:
        if len(self.children) == 1:
            raise ConfigError("at least one child has to stay", errno.EBUSY)


def test_children_come_and_go_where_the_driver_lets_them() -> None:
    async def scenario(graph: BlockGraph) -> None:
        graph.drivers.register(Quorum)
        quorum = await graph.add("quorum,node-name=q")
        plain = await graph.add("memory,node-name=plain,size=64k")
        nodes = [await graph.add(f"memory,node-name=c{number},size=64k") for number in range(2)]
        user = BlockBackend(quorum, "user", writable=True)
        for number, node in enumerate(nodes):
            edge = await surgery.add_child(graph, quorum, node)
            assert edge.name == f"children.{number}"
            assert quorum.children[edge.name] is edge
            assert edge.perm & Perm.WRITE
            assert [parent.parent for parent in node.parents] == [quorum]
        before = picture(graph)
        for refused, code, message in (
            (surgery.add_child(graph, plain, await graph.add("null-co")), 95, "support adding"),
            (
                surgery.add_child(graph, quorum, nodes[0]),
                errno.EBUSY,
                "already has a parent: node 'q'",
            ),
            (
                surgery.del_child(graph, quorum, "children.7"),
                errno.ENOENT,
                "no child named 'children.7'",
            ),
        ):
            with pytest.raises(ConfigError, match=message) as caught:
                await refused
            assert caught.value.errno == code
        assert picture(graph)[: len(before)] == before
        async with drained(quorum):
            pass
        await surgery.del_child(graph, quorum, "children.0")
        assert not nodes[0].parents
        with pytest.raises(ConfigError, match="at least one"):
            await surgery.del_child(graph, quorum, "children.1")
        assert nodes[1].parents
        await user.close()

    with_graph(scenario)


def test_driver_that_has_the_children_it_has_lets_none_go() -> None:
    async def scenario(graph: BlockGraph) -> None:
        raw = await graph.add("raw,file.driver=memory,file.size=64k")
        before = picture(graph)
        with pytest.raises(ConfigError, match="does not support removing a child") as caught:
            await surgery.del_child(graph, raw, "file")
        assert caught.value.errno == errno.ENOTSUP
        assert picture(graph) == before

    with_graph(scenario)


def test_overlays_record_what_they_are_backed_by_when_a_layer_has_left(tmp_path: Path) -> None:
    recorded: list[tuple[str, str, str]] = []

    class Recording(Overlay):
        driver_name = "recording"

        async def driver_change_backing(self, filename: str, driver: str) -> None:
            recorded.append((self.node_name, filename, driver))

    (tmp_path / "base").write_bytes(bytes(64 * KIB))

    async def scenario(graph: BlockGraph) -> None:
        graph.drivers.register(Recording)
        file = {"driver": "file", "filename": str(tmp_path / "base")}
        base = await graph.add({"driver": "raw", "node-name": "base", "file": file})
        overlay = await graph.add("recording,node-name=o")
        await surgery.append(graph, overlay, base)
        await surgery.record_backing(base)
        assert recorded.pop() == ("o", str(tmp_path / "base"), "raw")
        # A filter is none of the image's business.
        above = await surgery.insert_filter(graph, base, {"driver": "pass"})
        await surgery.record_backing(above)
        assert recorded.pop() == ("o", str(tmp_path / "base"), "raw")
        second = await graph.add("overlay,node-name=second")
        await surgery.append(graph, second, overlay)
        with pytest.raises(
            BlockError, match=r"Could not change the backing file to .*: Operation not supported"
        ):
            await surgery.record_backing(overlay)

    with_graph(scenario)


def test_refused_append_leaves_the_graph_as_it_was() -> None:
    async def scenario(graph: BlockGraph) -> None:
        base = await graph.add("memory,node-name=base,size=64k")
        # Whoever writes may not be put above an overlay that cannot.
        guest = BlockBackend(base, "guest", writable=True, shared=Perm.ALL)
        overlay = await graph.add("overlay,node-name=o,read-only=on")
        before = picture(graph)
        with pytest.raises(ConfigError, match="Block node 'o' is read-only"):
            await surgery.append(graph, overlay, base)
        assert picture(graph) == before
        await guest.pwritev(0, IoVec([memoryview(b"x")]))
        await guest.close()

    with_graph(scenario)


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        ("raw,node-name=n,file=other", "'n' does not support backing files"),
        ("null-co,node-name=n,size=64k", "'n' does not support backing files"),
        ("blkdebug,node-name=n,image=other", "Node 'n' is in use already"),
    ],
)
def test_what_cannot_be_an_overlay_is_not_put_above_a_disk(new: str, reason: str) -> None:
    """Its users would see another disk."""

    async def scenario(graph: BlockGraph) -> None:
        base = await graph.add("memory,node-name=base,size=64k")
        await graph.add("memory,node-name=other,size=64k")
        node = await graph.add(new)
        before = picture(graph)
        with pytest.raises(ConfigError, match=reason):
            await surgery.append(graph, node, base)
        assert picture(graph) == before

    with_graph(scenario)


def test_replaced_node_gives_all_its_users_to_the_new_one_or_none() -> None:
    async def scenario(graph: BlockGraph) -> None:
        old = await graph.add("memory,node-name=old,size=64k")
        new = await graph.add("memory,node-name=new,size=128k")
        sizes: list[int] = []
        guest = BlockBackend(old, "guest", writable=True, shared=Perm.ALL)
        guest.attach(resized=sizes.append)
        above = await graph.add("raw,node-name=r,file=old")
        window = await graph.add("raw,node-name=w,file=old,offset=4096")
        jealous = BlockBackend(new, "job", writable=False, shared=Perm.CONSISTENT_READ)
        before = picture(graph)
        with pytest.raises(ConfigError, match=r"guest cannot have permission 'write.*job does not"):
            await surgery.replace_node(graph, old, new)
        assert picture(graph) == before
        await jealous.close()
        await surgery.replace_node(graph, old, new)
        assert not old.parents
        assert guest.node is new
        assert (above.length, window.length) == (128 * KIB, 124 * KIB)
        assert sizes == [128 * KIB]
        await guest.close()

    with_graph(scenario)


def test_one_edge_moves_and_what_nobody_needs_any_more_is_closed() -> None:
    async def scenario(graph: BlockGraph) -> None:
        above = await graph.add("raw,node-name=r,file.driver=memory,file.size=4k,file.node-name=in")
        new = await graph.add("memory,node-name=new,size=8k")
        await surgery.replace_child(graph, above.children["file"], new)
        assert above.length == 8 * KIB
        assert sorted(graph.nodes) == ["new", "r"]

    with_graph(scenario)


def test_frozen_edges_and_cycles_are_refused_and_nothing_has_changed() -> None:
    async def scenario(graph: BlockGraph) -> None:
        low = await graph.add("memory,node-name=low,size=64k")
        top = await graph.add("pass,node-name=top,file=low")
        spare = await graph.add("memory,node-name=spare,size=64k")
        freeze_backing_chain(top, low)
        before = picture(graph)
        for refused in (
            surgery.replace_node(graph, low, spare),
            surgery.replace_child(graph, top.children["file"], spare),
            surgery.insert_filter(graph, low, {"driver": "pass", "node-name": "p"}),
        ):
            with pytest.raises(ConfigError, match="Cannot change frozen 'file' link") as caught:
                await refused
            assert caught.value.errno == errno.EPERM
            assert picture(graph) == before
        unfreeze_backing_chain(top, low)
        before = picture(graph)
        with pytest.raises(ConfigError, match="would create a cycle"):
            await surgery.replace_child(graph, top.children["file"], top)
        assert picture(graph) == before

    with_graph(scenario)


def test_only_the_first_node_below_the_filters_may_be_replaced() -> None:
    async def scenario(graph: BlockGraph) -> None:
        low = await graph.add("memory,node-name=low,size=64k")
        top = await graph.add("pass,node-name=top,file.driver=raw,file.file=low,file.node-name=r")
        node = graph.find("r")
        assert surgery.check_replaceable(graph, top, "r") is node
        assert surgery.check_replaceable(graph, node, "r") is node
        with pytest.raises(ConfigError, match="Cannot replace 'low'"):
            surgery.check_replaceable(graph, top, "low")
        with pytest.raises(ConfigError, match="Cannot find node 'nobody'"):
            surgery.check_replaceable(graph, top, "nobody")
        low.op_blockers.block(Reason("a job uses it"), (OpType.REPLACE,))
        with pytest.raises(ConfigError, match="Node 'low' is busy: a job uses it"):
            surgery.check_replaceable(graph, low, "low")
        low.op_blockers.unblock(Reason("another"))

    with_graph(scenario)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"driver": "raw"}, "Driver 'raw' is not a filter"),
        ({"driver": "pass", "node-name": "m"}, "Duplicate nodes"),
        ({"driver": "pass", "bogus": 1}, "Block filter 'pass' does not support the option 'bogus'"),
    ],
)
def test_filter_that_cannot_be_opened_changes_nothing(
    options: dict[str, Any], message: str
) -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add("memory,node-name=m,size=64k")
        backend = BlockBackend(node, "guest", writable=True)
        before = picture(graph)
        with pytest.raises(ConfigError, match=message):
            await surgery.insert_filter(graph, node, options)
        with pytest.raises(ConfigError, match="Node 'm' is not a filter"):
            await surgery.drop_filter(graph, node)
        assert picture(graph) == before
        await backend.close()

    with_graph(scenario)


def test_surgery_under_load_loses_no_byte() -> None:
    """Two users write and read while filters come and go below them."""

    async def user(
        backend: BlockBackend, start: int, choice: random.Random, done: Callable[[], bool]
    ) -> int:
        model = bytearray(16 * KIB)
        requests = 0
        while not done():
            offset = choice.randrange(16 * KIB - 512)
            data = choice.randbytes(choice.randrange(1, 512))
            await backend.pwritev(start + offset, IoVec([memoryview(data)]))
            model[offset : offset + len(data)] = data
            found = bytearray(16 * KIB)
            await backend.preadv(start, IoVec([memoryview(found)]))
            assert found == model
            requests += 1
            await asyncio.sleep(0)
        return requests

    async def scenario(graph: BlockGraph) -> None:
        choice = random.Random(7)
        low = await graph.add("memory,node-name=low,size=64k")
        await graph.add("raw,node-name=r,file=low")
        node = graph.find("r")
        backends = [BlockBackend(node, name, writable=True, shared=Perm.ALL) for name in ("u", "v")]
        ended = False
        users = [
            asyncio.create_task(user(backend, n * 16 * KIB, choice, lambda: ended))
            for n, backend in enumerate(backends)
        ]
        filters: list[BlockNode] = []
        for _ in range(150):
            if filters and choice.random() < 0.5:
                await surgery.drop_filter(graph, filters.pop(choice.randrange(len(filters))))
            else:
                below = choice.choice([low, node, *filters])
                kind = choice.choice(["pass", "clear"])
                filters.append(await surgery.insert_filter(graph, below, {"driver": kind}))
            for _ in range(choice.randrange(5)):
                await asyncio.sleep(0)
        ended = True
        assert min(await asyncio.gather(*users)) > 10
        for node in filters:
            await surgery.drop_filter(graph, node)
        assert sorted(graph.nodes) == ["low", "r"]
        assert all(not node.quiesced and not node.in_flight for node in graph.nodes.values())
        for backend in backends:
            await backend.close()

    with_graph(scenario)
