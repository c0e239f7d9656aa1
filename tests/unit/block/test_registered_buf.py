"""Memory that requests come from is announced to every node below, whenever it comes there (row B13.3)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tests.unit.block.fakes import ArrayNode, NoOptions, PassNode
from vhostblk.block import surgery
from vhostblk.block.backend import BlockBackend
from vhostblk.block.edge import Edge
from vhostblk.block.graph import BlockGraph
from vhostblk.block.length import resize
from vhostblk.block.node import BlockNode, OpenContext
from vhostblk.block.options import NodeOptions
from vhostblk.block.permissions import Perm
from vhostblk.block.reopen import reopen
from vhostblk.block.roles import Role
from vhostblk.block.transaction import GraphTransaction
from vhostblk.errors import ConfigError

HERE, SIZE = 0x7F0000000000, 1 << 20


class Listener(BlockNode):
    """Notes what it hears."""

    def __init__(self, name: str, common: NodeOptions, options: NoOptions) -> None:
        super().__init__(name, common, options)
        self.known: dict[int, int] = {}
        self.heard: list[str] = []

    def driver_register_buf(self, host: int, size: int) -> None:
        assert host not in self.known
        self.known[host] = size
        self.heard.append("register")

    def driver_unregister_buf(self, host: int) -> None:
        del self.known[host]
        self.heard.append("unregister")


class Leaf(Listener, ArrayNode):
    driver_name = "leaf"

    def __init__(self, name: str, common: NodeOptions, options: NoOptions) -> None:
        ArrayNode.__init__(self, common=common)
        self.node_name, self.known, self.heard = name, {}, []


class Filter(Listener, PassNode):
    driver_name = "listener"


class Overlay(Listener):
    driver_name = "overlay"
    options_type = NoOptions
    child_keys = ("backing",)

    async def open(self, context: OpenContext) -> None:
        self.length = 65536


class Pair(Listener):
    """Reaches one leaf on two ways."""

    driver_name = "pair"
    options_type = NoOptions
    child_keys = ("a", "b")

    async def open(self, context: OpenContext) -> None:
        for key in self.child_keys:
            self.length = (await context.open_child(self, key, Role.DATA)).node.length


Scenario = Callable[[BlockGraph, BlockBackend, Leaf], Awaitable[None]]


def with_user(scenario: Scenario) -> None:
    async def run() -> None:
        graph = BlockGraph({kind.driver_name: kind for kind in (Leaf, Filter, Overlay, Pair)})
        leaf = await graph.add("leaf,node-name=leaf")
        assert isinstance(leaf, Leaf)
        user = BlockBackend(leaf, "user", writable=False, shared=Perm.ALL)
        user.register_buf(HERE, SIZE)
        await scenario(graph, user, leaf)
        await user.close()
        assert not any(node.buffers.sizes for node in graph.nodes.values())
        await graph.close_all()

    asyncio.run(run())


def known(node: BlockNode) -> dict[int, int]:
    assert isinstance(node, Listener)
    assert node.known == node.buffers.sizes
    return node.known


def test_filter_that_comes_in_between_is_told_and_who_is_below_hears_nothing() -> None:
    async def scenario(graph: BlockGraph, user: BlockBackend, leaf: Leaf) -> None:
        above = await surgery.insert_filter(graph, leaf, {"driver": "listener"})
        between = await surgery.insert_filter(graph, leaf, {"driver": "listener"})
        assert between.parents[0].parent is above
        for node in (above, between, leaf):
            assert known(node) == {HERE: SIZE}
        user.register_buf(HERE + SIZE, 4096)
        assert known(leaf) == known(between) == {HERE: SIZE, HERE + SIZE: 4096}
        user.unregister_buf(HERE)
        await surgery.drop_filter(graph, above)
        await surgery.drop_filter(graph, between)
        assert known(leaf) == {HERE + SIZE: 4096}
        assert leaf.heard == ["register", "register", "unregister"]

    with_user(scenario)


def test_who_takes_another_ones_place_is_told_and_the_other_forgets() -> None:
    async def scenario(graph: BlockGraph, user: BlockBackend, leaf: Leaf) -> None:
        other = await graph.add("leaf,node-name=other")
        await surgery.replace_node(graph, leaf, other)
        assert (known(leaf), known(other)) == ({}, {HERE: SIZE})
        top = await surgery.insert_filter(graph, other, {"driver": "listener", "node-name": "top"})
        await reopen(graph, {top: {"file": "leaf"}})
        assert (known(leaf), known(other)) == ({HERE: SIZE}, {})
        await surgery.replace_child(graph, top.children["file"], other)
        assert (known(leaf), known(other)) == ({}, {HERE: SIZE})
        overlay = await graph.add("overlay,node-name=overlay")
        await surgery.append(graph, overlay, top)
        assert known(overlay) == known(top) == known(other) == {HERE: SIZE}

    with_user(scenario)


def test_who_is_reached_on_two_ways_is_told_once_and_forgets_with_the_last() -> None:
    async def scenario(graph: BlockGraph, user: BlockBackend, leaf: Leaf) -> None:
        pair = await graph.add("pair,node-name=pair,a=leaf,b=leaf")
        second = BlockBackend(pair, "second", writable=False, shared=Perm.ALL)
        second.register_buf(HERE, SIZE)
        assert leaf.heard == ["register"]
        user.unregister_buf(HERE)
        other = await graph.add("leaf,node-name=other")
        await surgery.replace_child(graph, pair.children["a"], other)
        assert known(leaf) == known(other) == {HERE: SIZE}
        await surgery.replace_child(graph, pair.children["b"], other)
        assert (known(leaf), known(other)) == ({}, {HERE: SIZE})
        await second.close()
        assert known(other) == {}
        second.unregister_buf(HERE)

    with_user(scenario)


def test_order_of_the_steps_of_a_change_does_not_matter() -> None:
    async def scenario(graph: BlockGraph, user: BlockBackend, leaf: Leaf) -> None:
        for name, moved_first in (("a", True), ("b", False)):
            top = user.node
            overlay = await graph.add({"driver": "overlay", "node-name": name})
            edge = Edge(overlay, top, "backing", Role.COW, Perm.NONE, Perm.ALL)
            with GraphTransaction() as change:
                if moved_first:
                    change.move(user._edge, overlay)
                change.attach(edge)
                if not moved_first:
                    change.move(user._edge, overlay)
            assert known(overlay) == known(top) == {HERE: SIZE}
        assert leaf.heard == ["register"]
        user.unregister_buf(HERE)
        assert known(leaf) == {}

    with_user(scenario)


def test_memory_may_come_and_go_while_a_node_is_resized_for_its_user() -> None:
    async def scenario(graph: BlockGraph, user: BlockBackend, leaf: Leaf) -> None:
        async def resize_slowly(length: int, *_: object) -> None:
            user.register_buf(HERE + SIZE, 4096)
            user.unregister_buf(HERE)
            leaf.set_length(length)

        leaf.driver_truncate = resize_slowly  # type: ignore[method-assign, assignment]
        await resize(graph, user, leaf, leaf.length + 65536)
        assert known(leaf) == {HERE + SIZE: 4096}
        assert leaf.heard == ["register", "register", "unregister"]
        user.unregister_buf(HERE + SIZE)

    with_user(scenario)


def test_refused_change_tells_nobody() -> None:
    async def scenario(graph: BlockGraph, user: BlockBackend, leaf: Leaf) -> None:
        user._edge.frozen = True
        with pytest.raises(ConfigError, match="frozen"):
            await surgery.insert_filter(graph, leaf, {"driver": "listener"})
        user._edge.frozen = False
        assert leaf.heard == ["register"]

    with_user(scenario)
