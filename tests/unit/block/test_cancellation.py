"""Whatever is cancelled, wherever it waits, leaves everybody else as if it had ended there (rows B25 and B26).

Each scenario is run once for each await of the task in question, which is cancelled there, in several orders of events.
Requests that run beside it have to end well; then nothing may be in flight, drained, or locked, and no byte wrong.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.schedule import cancel_everywhere, turns
from tests.unit.block.crash_disk import INJECTED, CrashDisk
from tests.unit.block.modelled_disk import Disk
from vhostblk.block import surgery
from vhostblk.block.activation import activate, inactivate
from vhostblk.block.backend import BlockBackend
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.node import Req
from vhostblk.block.permissions import cumulative_permissions
from vhostblk.block.quiesce import all_drained, drained, subtree_drained
from vhostblk.block.reopen import reopen
from vhostblk.block.roles import check_children

Start = Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]]
Victim = Callable[[Disk], Coroutine[Any, Any, Any]]

CRASH = {"driver": "crash-disk", "align": 512, "max-transfer": 2, "memory": 4, "discard": "unmap"}
RAW = {"driver": "raw", "discard": "unmap"}
THROTTLE = {"driver": "throttle", "throttle-group": "tg", "discard": "unmap"}
FUA = int(Req.FUA)


def memory(length: int) -> IoVec:
    return IoVec.of(bytearray(length))


def check_legal(disk: Disk) -> None:
    """What `test_graph_state_machine.py` has in more detail."""
    for node in disk.graph.nodes.values():
        check_children(node, complete=True)
        perm, shared = cumulative_permissions(node)
        for name, edge in node.children.items():
            assert (edge.parent, edge.name) == (node, name)
            assert edge in edge.node.parents
            assert (edge.perm, edge.shared) == node.child_perm(edge, perm, shared)
        assert all(edge.node is node for edge in node.parents)
        assert not disk.graph._change.locked()
        assert node.parents or node.references
    assert not disk.graph._opening


def cancelled(
    victim: Victim,
    leaf: dict[str, Any] = CRASH,
    *layers: dict[str, Any],
    file: Path | None = None,
    after: Callable[[Disk], Awaitable[None]] | None = None,
) -> int:
    """Cancel `victim` everywhere, beside requests; returns how many awaits it has."""

    async def scenario(start: Start) -> None:
        disk = Disk(file)
        await disk.open(leaf, *layers)
        user, other = disk.use(disk.top), disk.use(disk.leaf)
        beside = [
            disk.write(user, 100, memory(700)),
            disk.write(other, 600, memory(1500)),
            disk.write_zeroes(user, 2000, 900, True),
            disk.read(other, 0, memory(4096)),
            disk.flush(user),
        ]
        tasks = [asyncio.create_task(request) for request in beside]
        await turns(1)
        task = start(victim(disk))
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()
        await asyncio.gather(*tasks)
        if after is not None:
            await after(disk)
        check_legal(disk)
        await disk.check()
        # It all works as before.
        await asyncio.gather(disk.write(user, 100, memory(700)), disk.discard(user, 0, 1024))
        assert await disk.flush(user)
        await disk.check()
        await disk.close()

    return cancel_everywhere(scenario)


# ---------------------------------------------------------------------- requests

REQUESTS: dict[str, Victim] = {
    "unaligned write": lambda disk: disk.write(disk.users[0], 50, memory(1100)),
    "durable write": lambda disk: disk.write(disk.users[0], 512, memory(2048), FUA),
    "serialising write": lambda disk: disk.write(
        disk.users[0], 512, memory(1024), int(Req.SERIALISING)
    ),
    "zero-write": lambda disk: disk.write_zeroes(disk.users[0], 50, 3000, True, FUA),
    "discard": lambda disk: disk.discard(disk.users[0], 0, 4096),
    "unaligned read": lambda disk: disk.read(disk.users[0], 50, memory(1100)),
    "flush": lambda disk: disk.flush(disk.users[0]),
}


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize(
    "layers",
    [[], [RAW], [{**RAW, "offset": 100}], [THROTTLE]],
    ids=["-", "raw", "window", "throttle"],
)
def test_cancelled_request_hurts_nobody_else(name: str, layers: list[dict[str, Any]]) -> None:
    assert cancelled(REQUESTS[name], CRASH, *layers) > 0


@pytest.mark.parametrize("name", REQUESTS)
def test_cancelled_request_of_a_file_hurts_nobody_else(name: str, tmp_path: Path) -> None:
    file = {"driver": "file", "discard": "unmap", "detect-zeroes": "unmap"}
    assert cancelled(REQUESTS[name], file, file=tmp_path / "disk") > 0


@pytest.mark.parametrize("name", ["unaligned write", "unaligned read", "zero-write", "flush"])
def test_cancelled_request_of_a_layer_that_copies_on_read_hurts_nobody_else(name: str) -> None:
    leaf = {"driver": "overlay", "discard": "unmap"}
    assert cancelled(REQUESTS[name], leaf, {"driver": "copy-on-read"}) > 1


# ---------------------------------------------------------------------- drains


async def drain(disk: Disk) -> None:
    async with drained(disk.leaf):
        await turns(2)


async def drain_subtree(disk: Disk) -> None:
    async with subtree_drained(disk.top):
        await turns(2)


async def drain_all(disk: Disk) -> None:
    async with all_drained(disk.graph):
        await turns(2)


async def drain_by_hand(disk: Disk) -> None:
    await disk.leaf.drained_begin()
    disk.leaf.drained_end()


DRAINS: dict[str, Victim] = {
    "node": drain,
    "subtree": drain_subtree,
    "all": drain_all,
    "by hand": drain_by_hand,
    "user's": lambda disk: disk.users[0].drain(),
    "user's own requests": lambda disk: disk.users[0].settle(),
}


@pytest.mark.parametrize("name", DRAINS)
def test_cancelled_drain_lets_everybody_go_on(name: str) -> None:
    assert cancelled(DRAINS[name], CRASH, RAW) > 0


# ---------------------------------------------------------------------- changes of the graph


async def insert_and_drop(disk: Disk) -> None:
    options = {"driver": "pass", "node-name": "inserted"}
    node = await surgery.insert_filter(disk.graph, disk.leaf, options)
    await surgery.drop_filter(disk.graph, node)


async def swap(disk: Disk) -> None:
    options = {"driver": "raw", "node-name": "other", "file": "leaf"}
    other = await disk.graph.add(options)
    await surgery.replace_node(disk.graph, disk.top, other)
    await surgery.replace_node(disk.graph, other, disk.top)
    await disk.graph.remove("other")


async def reopen_twice(disk: Disk) -> None:
    for detect in ("on", "off"):
        changes = {disk.leaf: {"detect-zeroes": detect}, disk.top: {"detect-zeroes": detect}}
        await reopen(disk.graph, changes)


async def cut(disk: Disk) -> None:
    await disk.resize(6144)
    await disk.resize(8192)


async def visit(disk: Disk) -> None:
    """Somebody comes, and goes; a second close makes up for one that was cancelled."""
    user = disk.use(disk.top)
    try:
        await disk.flush(user)
    finally:
        try:
            await user.close()
        finally:
            disk.users.remove(user)
            await user.close()


CHANGES: dict[str, Victim] = {
    "insert and drop": insert_and_drop,
    "swap": swap,
    "reopen": reopen_twice,
    "resize": cut,
    "visit": visit,
}


def test_cancelled_close_of_the_last_user_is_made_up_for_by_another_one() -> None:
    async def scenario(start: Start) -> None:
        graph = BlockGraph()
        node = await graph.add("null-co,node-name=borrowed,size=64k")
        user = BlockBackend(node, "borrower", writable=True)
        async with graph.changing():
            await graph.give_up(node)
        busy, task = asyncio.create_task(change(graph)), start(user.close())
        await asyncio.wait([task])
        await user.close()
        await busy
        assert not graph.nodes
        assert await user.close()
        await graph.close_all()

    async def change(graph: BlockGraph) -> None:
        async with graph.changing():
            await turns(3)

    assert cancel_everywhere(scenario) >= 1


def test_cancelled_removal_is_made_or_not() -> None:
    """Not something between the two: a node that nobody owns would go with the next user who comes and leaves."""

    async def scenario(start: Start) -> None:
        disk = Disk()
        await disk.open(CRASH)
        user = disk.use(disk.top)
        await disk.write(user, 0, memory(512))
        disk.users.remove(user)
        user.root.detach()  # without a flush: that is left to the end of the node
        task = start(disk.graph.remove("leaf"))
        await asyncio.wait([task])
        assert "leaf" not in disk.graph.nodes or disk.graph.is_owned(disk.leaf)
        await disk.graph.close_all()

    assert cancel_everywhere(scenario) >= 1


async def clean_up(disk: Disk) -> None:
    for name in ("inserted", "other"):
        node = disk.graph.nodes.get(name)
        if node is not None and node.parents:
            if name == "other":
                await surgery.replace_node(disk.graph, node, disk.top)
            else:
                await surgery.drop_filter(disk.graph, node)
        if name in disk.graph.nodes:
            await disk.graph.remove(name)
    assert set(disk.graph.nodes) == {"leaf", "layer0"}


@pytest.mark.parametrize("name", CHANGES)
def test_cancelled_change_of_the_graph_is_made_or_not(name: str) -> None:
    assert cancelled(CHANGES[name], CRASH, RAW, after=clean_up) > 1


async def give_away_and_take_back(disk: Disk) -> None:
    """Requests of guests wait meanwhile, as an export lets them."""
    for user in disk.users:
        user.child_drained_begin(user._edge)
    try:
        for user in disk.users:
            await user.idle()
        try:
            await inactivate(disk.graph)
        finally:
            task = asyncio.ensure_future(activate(disk.graph))
            await asyncio.wait([task])
            task.result()
    finally:
        for user in disk.users:
            user.child_drained_end(user._edge)


def test_cancelled_inactivation_is_made_or_not() -> None:
    assert cancelled(give_away_and_take_back, CRASH, RAW) > 1


# ---------------------------------------------------------------------- files


def test_cancelled_open_and_reopen_leave_no_descriptor(tmp_path: Path) -> None:
    """The file is open when the task learns that it was cancelled."""
    image = tmp_path / "other"
    image.write_bytes(bytes(8192))

    async def open_and_reopen(disk: Disk) -> None:
        options = {"driver": "file", "filename": str(image), "node-name": "f", "locking": "on"}
        node = await disk.graph.add(options)
        for read_only in (True, False):
            await reopen(disk.graph, {node: {"read-only": read_only}})
        await disk.graph.remove("f")

    async def close(disk: Disk) -> None:
        if "f" in disk.graph.nodes:
            await disk.graph.remove("f")

    before = len(os.listdir("/proc/self/fd"))
    assert cancelled(open_and_reopen, CRASH, after=close) > 1
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.warns(r"flush at close failed: leaf: an earlier flush has lost data already")
def test_failed_flush_that_was_cancelled_fails_for_the_next_one_too(tmp_path: Path) -> None:
    """The kernel tells of lost writes once; the one it has told must not keep that to itself (row B19)."""

    async def scenario(start: Start) -> None:
        disk = Disk(tmp_path / "disk")
        await disk.open({"driver": "file"})
        user = disk.use(disk.top)
        disk.may_fail.add(INJECTED)
        await disk.write(user, 0, memory(512))
        disk.io.failures.planned.append("flush")
        task = start(disk.flush(user))
        await asyncio.wait([task])
        if "flush" not in disk.io.failures.planned:
            assert not await disk.flush(user)
        disk.io.failures.planned.clear()
        disk.power_cut()
        await disk.close()

    assert cancel_everywhere(scenario) > 0


def test_crash_disk_cannot_be_cancelled_while_it_works() -> None:
    """So that these tests are about what they say."""
    seen: list[bool] = []

    async def scenario(start: Start) -> None:
        disk = Disk()
        await disk.open(CRASH)
        user = disk.use(disk.top)
        task = start(disk.write(user, 0, memory(512)))
        await asyncio.wait([task])
        assert isinstance(disk.leaf, CrashDisk)
        seen.append(any(disk.leaf.data) and task.cancelled())
        await disk.close()

    cancel_everywhere(scenario)
    assert any(seen)
