"""Drain (row B26): nothing is in flight while it lasts, drains nest, and nobody slips in."""

from __future__ import annotations

import asyncio

import pytest

from tests.schedule import explore, sample, turns
from tests.unit.block.fakes import ArrayNode, put_above
from vhostblk.block.backend import BlockBackend
from vhostblk.block.edge import Edge
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode, Role
from vhostblk.block.permissions import Perm
from vhostblk.block.quiesce import all_drained, drained, subtree_drained


def root(node: BlockNode, name: str = "root") -> BlockBackend:
    return BlockBackend(node, name, writable=True, shared=Perm.ALL)


class HookedNode(ArrayNode):
    """Counts what a drain tells the driver."""

    begun = ended = 0

    def driver_drain_begin(self) -> None:
        self.begun += 1

    def driver_drain_end(self) -> None:
        self.ended += 1


def test_nested_drains_are_counted_and_the_driver_hears_of_the_first_and_the_last() -> None:
    async def scenario() -> None:
        node = HookedNode()
        user = root(node)
        async with drained(node):
            async with drained(node):
                write = asyncio.create_task(user.pwritev(0, IoVec.of(b"x")))
                await turns(3)
                assert (node.quiesced, user.quiesced, node.begun, node.ended) == (2, 2, 1, 0)
            await turns(3)
            assert not write.done()
            assert not node.asked.calls
        await asyncio.wait_for(write, 5)
        assert (node.quiesced, user.quiesced, node.begun, node.ended) == (0, 0, 1, 1)

    asyncio.run(scenario())


def test_who_attaches_to_a_drained_node_waits_and_who_leaves_goes_on() -> None:
    async def scenario() -> None:
        node = ArrayNode()
        async with drained(node), drained(node):
            user = root(node)
            assert user.quiesced == 2
            write = asyncio.create_task(user.pwritev(0, IoVec.of(b"x")))
            above = put_above(node)
            assert above.quiesced == 2
            above.children["file"].detach()
            assert above.quiesced == 0
            await turns(3)
            assert not write.done()
        await asyncio.wait_for(write, 5)
        assert not user.quiesced

    asyncio.run(scenario())


def test_subtree_drain_reaches_those_below_and_their_other_users() -> None:
    async def scenario() -> None:
        leaf = ArrayNode()
        top = put_above(leaf)
        other = root(leaf, "other")
        late = ArrayNode()
        async with subtree_drained(top), subtree_drained(top):
            write = asyncio.create_task(other.pwritev(0, IoVec.of(b"x")))
            await turns(3)
            assert not write.done()
            # A child that comes later is drained as often, until it goes.
            edge = Edge(top, late, "late", Role.DATA, Perm.NONE, Perm.ALL)
            edge.attach()
            top.children["late"] = edge
            assert late.subtree_quiesced == 2
            del top.children["late"]
            edge.detach()
            assert (late.subtree_quiesced, late.quiesced) == (0, 0)
        await asyncio.wait_for(write, 5)
        assert (leaf.quiesced, top.quiesced, leaf.subtree_quiesced) == (0, 0, 0)

    asyncio.run(scenario())


def test_drain_of_everything_also_holds_nodes_that_are_opened_meanwhile() -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        first = root(await graph.add("null-co,node-name=a"))
        async with all_drained(graph):
            second = root(await graph.add("raw,node-name=b,file.driver=null-co"))
            writes = [
                asyncio.create_task(user.pwritev(0, IoVec.of(b"x"))) for user in (first, second)
            ]
            await turns(3)
            assert not any(write.done() for write in writes)
        await asyncio.wait_for(asyncio.gather(*writes), 5)
        assert not any(node.quiesced for node in graph.nodes.values())
        await first.close()
        await second.close()
        await graph.close_all()

    asyncio.run(scenario())


def test_drain_under_load_returns_while_a_second_user_of_the_child_never_stops() -> None:
    """The child of a drained node has its own users: they go on, and the drain still ends."""

    async def scenario() -> None:
        leaf = ArrayNode()
        leaf.pause = lambda: turns(2)
        top = put_above(leaf)
        user, other = root(top), root(leaf, "other")
        stop = asyncio.Event()

        async def hammer(backend: BlockBackend, offset: int) -> None:
            while not stop.is_set():
                await backend.pwritev(offset, IoVec.of(b"x"))

        tasks = [asyncio.create_task(hammer(user, number)) for number in range(4)]
        # Several, not in step: there is no moment in which none of them is in flight.
        for number in range(3):
            tasks.append(asyncio.create_task(hammer(other, 100 + number)))
            await turns(1)
        await turns(10)
        for _ in range(5):
            async with drained(top):
                assert (top.in_flight, user.in_flight) == (0, 0)
                await turns(2)
                assert (top.in_flight, user.in_flight) == (0, 0)
            await turns(3)
        stop.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 5)

    asyncio.run(scenario())


async def writers_and_drains(drains: tuple[tuple[int, int], ...]) -> None:
    """Four writers, and drains of (node, turns before it)."""
    leaf = ArrayNode()
    leaf.pause = lambda: turns(1)
    middle = put_above(leaf, "middle")
    top = put_above(middle, "top")
    nodes: list[BlockNode] = [leaf, middle, top]
    user = root(top)
    done = 0

    async def writer(number: int) -> None:
        nonlocal done
        for turn in range(3):
            await user.pwritev(number * 8 + turn, IoVec.of(bytes([number + 1])))
            done += 1

    async def drainer(which: int, before: int) -> None:
        await turns(before)
        async with drained(nodes[which]):
            for _ in range(3):
                assert not leaf.in_flight
                assert not user.in_flight
                await turns(1)

    await asyncio.gather(*(writer(n) for n in range(4)), *(drainer(*d) for d in drains))
    assert done == 12
    assert not any(node.quiesced or node.in_flight for node in nodes)
    for number in range(4):
        assert leaf.data[number * 8 : number * 8 + 3] == bytes([number + 1]) * 3


@pytest.mark.parametrize("drains", [((0, 0),), ((2, 1), (0, 2)), ((1, 0), (1, 1), (2, 3))])
def test_no_schedule_of_drains_and_writes_lets_a_request_into_a_drained_section(
    drains: tuple[tuple[int, int], ...],
) -> None:
    """Every driver call yields, so drains begin and end at every await point."""
    assert explore(lambda: writers_and_drains(drains), limit=60) > 1
    sample(lambda: writers_and_drains(drains), count=30)
