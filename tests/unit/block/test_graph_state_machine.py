"""Any sequence of changes of a graph: it stays legal, and what was refused has left no trace (rows B07 to B11, B34)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.schedule import HUNT
from tests.unit.block.fakes import NoOptions, PassNode
from vhostblk.block import surgery
from vhostblk.block.activation import activate, inactivate
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode, OpenContext
from vhostblk.block.op_blockers import freeze_backing_chain, unfreeze_backing_chain
from vhostblk.block.permissions import Perm, cumulative_permissions, parents_first
from vhostblk.block.reopen import reopen
from vhostblk.block.roles import Role, check_children
from vhostblk.errors import ConfigError

SIZE = 64 * 1024
CHANGES = Perm.WRITE | Perm.WRITE_UNCHANGED | Perm.RESIZE
names = st.sampled_from([f"n{number}" for number in range(8)])
perms = st.sampled_from([Perm.ALL, Perm.CONSISTENT_READ, Perm.ALL & ~Perm.WRITE, Perm.ALL & ~Perm.RESIZE])  # fmt: skip

changes = st.fixed_dictionaries(
    {},
    optional={
        "read-only": st.booleans(),
        "cache.no-flush": st.booleans(),
        "discard": st.sampled_from(["unmap", "ignore"]),
        "file": names,
    },
)


class Overlay(BlockNode):
    """A format with a backing file."""

    driver_name = "overlay"
    options_type = NoOptions
    child_keys = ("file", "backing")

    async def open(self, context: OpenContext) -> None:
        await context.open_child(self, "file", Role.IMAGE)
        await context.open_optional_child(self, "backing", Role.COW)
        self.length = SIZE


ALL = {**DRIVERS, "pass": PassNode, "overlay": Overlay}


class GraphMachine(RuleBasedStateMachine):
    """Adds, removes, moves, reopens and freezes at random."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.graph = BlockGraph(ALL)
        self.users: list[BlockBackend] = []
        self.frozen: list[tuple[BlockNode, BlockNode | None]] = []

    # ------------------------------------------------------------------ doing

    def run(self, coro: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(coro, 10))

    def attempt(self, coro: Coroutine[Any, Any, Any]) -> Any:
        """Do it, or be refused and see that nothing has changed."""
        before = self.picture()
        try:
            return self.run(coro)
        except ConfigError:
            assert self.picture() == before
            return None

    def picture(self) -> list[Any]:
        return [
            (
                node, node.common, node.options, node.read_only, node.inactive, node.references,
                node.quiesced, node.limits, node.length, node.inherits_from, dict(node.children),
                [(edge, edge.node, edge.perm, edge.shared, edge.frozen) for edge in node.parents],
                {op: list(found) for op, found in node.op_blockers._reasons.items()},
            )
            for node in self.graph.nodes.values()
        ]  # fmt: skip

    def pick(self, name: str) -> BlockNode | None:
        return self.graph.nodes.get(name)

    # ------------------------------------------------------------------ rules

    @rule(name=names, read_only=st.booleans(), kind=st.sampled_from(["memory", "null-co"]))
    def add_leaf(self, name: str, read_only: bool, kind: str) -> None:
        options = {"driver": kind, "node-name": name, "size": SIZE, "read-only": read_only}
        self.attempt(self.graph.add(options))

    @rule(
        name=names,
        child=names,
        kind=st.sampled_from(["raw", "pass"]),
        read_only=st.booleans(),
        auto=st.booleans(),
        offset=st.sampled_from([None, 512]),
    )
    def add_layer(
        self, name: str, child: str, kind: str, read_only: bool, auto: bool, offset: int | None
    ) -> None:
        options = {"driver": kind, "node-name": name, "file": child, "read-only": read_only}
        options["auto-read-only"] = auto
        if kind == "raw" and offset:
            options["offset"] = offset
        self.attempt(self.graph.add(options))

    @rule(name=names, inner=names, backing=names, read_only=st.booleans())
    def add_overlay(self, name: str, inner: str, backing: str, read_only: bool) -> None:
        file = {"driver": "memory", "size": SIZE, "node-name": inner}
        self.attempt(
            self.graph.add(
                {
                    "driver": "overlay",
                    "node-name": name,
                    "file": file,
                    "backing": backing,
                    "read-only": read_only,
                }
            )
        )

    @rule(name=names)
    def remove(self, name: str) -> None:
        self.attempt(self.graph.remove(name))

    @rule(name=names, writable=st.booleans(), resize=st.booleans(), shared=perms)
    def use(self, name: str, writable: bool, resize: bool, shared: Perm) -> None:
        node = self.pick(name)
        if node is None:
            return

        async def attach() -> None:
            self.users.append(
                BlockBackend(
                    node, f"user {len(self.users)}", writable=writable, resize=resize, shared=shared
                )
            )

        self.attempt(attach())

    @precondition(lambda self: self.users)
    @rule(index=st.integers(0, 7))
    def leave(self, index: int) -> None:
        self.run(self.users.pop(index % len(self.users)).close())

    @rule(name=names, filter_name=names)
    def insert(self, name: str, filter_name: str) -> None:
        if (node := self.pick(name)) is not None:
            options = {"driver": "pass", "node-name": filter_name, "auto-read-only": True}
            self.attempt(surgery.insert_filter(self.graph, node, options))

    @rule(name=names)
    def drop(self, name: str) -> None:
        if (node := self.pick(name)) is not None:
            self.attempt(surgery.drop_filter(self.graph, node))

    @rule(old=names, new=names)
    def replace(self, old: str, new: str) -> None:
        before, after = self.pick(old), self.pick(new)
        if before is not None and after is not None and before is not after:
            self.attempt(surgery.replace_node(self.graph, before, after))

    @rule(parent=names, new=names)
    def replace_child(self, parent: str, new: str) -> None:
        above, after = self.pick(parent), self.pick(new)
        if above is not None and after is not None and above.children:
            edge = next(iter(above.children.values()))
            self.attempt(surgery.replace_child(self.graph, edge, after))

    @rule(changes=st.dictionaries(names, changes, max_size=3), keep=st.booleans())
    def change_options(self, changes: dict[str, dict[str, Any]], keep: bool) -> None:
        found = {node: options for name, options in changes.items() if (node := self.pick(name))}
        self.attempt(reopen(self.graph, found, keep_options=keep))

    @rule(name=names)
    def freeze(self, name: str) -> None:
        if (node := self.pick(name)) is not None:

            async def do() -> None:
                freeze_backing_chain(node, None)
                self.frozen.append((node, None))

            self.attempt(do())

    @precondition(lambda self: self.frozen)
    @rule()
    def thaw(self) -> None:
        unfreeze_backing_chain(*self.frozen.pop())

    @rule()
    def give_up(self) -> None:
        self.attempt(inactivate(self.graph))

    @rule()
    def take_back(self) -> None:
        self.attempt(activate(self.graph))

    @precondition(lambda self: self.users)
    @rule(index=st.integers(0, 7))
    def read_and_write(self, index: int) -> None:
        """Whoever has the permission gets through, whatever the graph looks like by now."""
        user = self.users[index % len(self.users)]
        data = IoVec([memoryview(bytearray(512))])
        below = parents_first([user.node])
        if any(isinstance(node, Overlay) for node in below) or user.length < 512:
            return
        self.run(user.preadv(0, data))
        if user.writable and not any(node.inactive for node in below):
            self.run(user.pwritev(0, data))

    # ------------------------------------------------------------------ what always holds

    @invariant()
    def graph_is_legal(self) -> None:
        for node in self.graph.nodes.values():
            assert self.graph.nodes[node.node_name] is node
            assert node.quiesced == node.in_flight == 0
            assert node.parents or node.references or self.graph.is_owned(node)
            check_children(node, complete=True)
            for name, edge in node.children.items():
                assert edge.name == name
                assert edge.parent is node
                assert edge in edge.node.parents
                assert self.graph.nodes[edge.node.node_name] is edge.node
            for edge in node.parents:
                assert edge.node is node
                if isinstance(edge.parent, BlockNode):
                    assert edge.parent.children[edge.name] is edge
                else:
                    assert edge.parent in self.users
                    assert edge.parent.node is node
            assert node not in parents_first([node])[1:]
            blocked = any(edge.role & Role.COW for edge in node.parents)
            assert bool(node.op_blockers) == blocked
            if node.inherits_from is not None:
                assert node in parents_first([node.inherits_from])

    @invariant()
    def permissions_are_legal_and_what_they_would_be_if_they_were_asked_for_now(self) -> None:
        for node in self.graph.nodes.values():
            perm, shared = cumulative_permissions(node)  # raises if two exclude each other
            assert not (perm & CHANGES and (node.read_only or node.inactive))
            for edge in node.children.values():
                assert (edge.perm, edge.shared) == node.child_perm(edge, perm, shared)

    @invariant()
    def limits_and_lengths_follow(self) -> None:
        for node in self.graph.nodes.values():
            before = node.limits
            node.compute_limits()
            assert node.limits == before
            if node.is_filter:
                assert node.length == node.children["file"].node.length

    def teardown(self) -> None:
        while self.frozen:
            self.thaw()
        for user in self.users:
            self.run(user.close())
        self.run(self.graph.close_all())
        assert not self.graph.nodes
        self.loop.close()


TestGraphMachine = GraphMachine.TestCase
TestGraphMachine.settings = settings(
    max_examples=60 * HUNT,
    stateful_step_count=40,
    suppress_health_check=list(HealthCheck),
)
