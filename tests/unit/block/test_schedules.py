"""Small scenarios in every order of events that departs little from first come, first served (rows B14, B30, B34, B40).

Each is so small that two departures reach what can go wrong in it; `make hunt` tries more of them.
"""

from __future__ import annotations

import asyncio

from tests.schedule import explore, turns
from tests.unit.block.fakes import ArrayNode, PassNode, put_above
from vhostblk.block import pipeline
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.extent import ExtentFlag, HostExtent
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.leaky_bucket import ThrottleLimits
from vhostblk.block.limits import BlockLimits
from vhostblk.block.permissions import Perm
from vhostblk.block.reopen import reopen
from vhostblk.block.throttle_group import READ, WRITE, Member, ThrottleGroup
from vhostblk.errors import ConfigError

SIZE = 4096


class SlowlyMapped(ArrayNode):
    """A file, which takes a while to say so."""

    async def host_extent(self, offset: int, length: int) -> HostExtent | None:
        await turns(1)
        return HostExtent(0, self.length, 7, 0, ExtentFlag.READ | ExtentFlag.WRITE)


# ---------------------------------------------------------------------- tracking and serialising


async def unaligned_writers_and_one_with_extents() -> None:
    """Three read-modify-writes of one block, and somebody who writes past them when allowed to."""
    node = SlowlyMapped(SIZE, BlockLimits(request_alignment=512, min_mem_alignment=1))
    node.pause = lambda: turns(1)
    user = BlockBackend(node, "user", writable=True, shared=Perm.ALL)
    busy = asyncio.Lock()  # held while an extent is used
    allowed = False

    async def revoke(offset: int, length: int) -> None:
        nonlocal allowed
        if offset < 1024:
            allowed = False
            async with busy:
                pass

    user.attach(revoke=revoke)

    async def by_extent() -> None:
        nonlocal allowed
        for value in (7, 8):
            found = await user.extents(512, 16)
            if found:
                allowed = True
            await turns(1)
            if allowed:
                async with busy:
                    old = bytes(node.data[512:528])
                    await turns(1)
                    assert node.data[512:528] == old, "somebody wrote where an extent was in use"
                    node.data[512:528] = bytes([value]) * 16

    async def write(number: int) -> None:
        await pipeline.pwritev(node.lane, 600 + number, IoVec.of(bytes([number + 1])))

    await asyncio.gather(by_extent(), *(write(number) for number in range(3)))
    assert node.data[600:603] == b"\x01\x02\x03"
    assert not node.tracker.requests
    assert not node.tracker.serialising
    assert len(set(node.data[512:528])) == 1


def test_read_modify_writes_and_who_writes_through_extents_undo_nothing() -> None:
    assert explore(unaligned_writers_and_one_with_extents, limit=150) > 20


# ---------------------------------------------------------------------- reopen


async def reopens_beside_users() -> None:
    graph = BlockGraph({**DRIVERS, "slow": Slow})
    node = await graph.add("slow,node-name=n,file.driver=null-co,file.size=64k,read-only=on")
    failures: list[str] = []

    async def change() -> None:
        for read_only in (False, True):
            try:
                await reopen(graph, {node: {"read-only": read_only}})
            except ConfigError as error:
                failures.append(str(error))

    async def use() -> None:
        try:
            user = BlockBackend(node, "user", writable=True, shared=Perm.ALL)
        except ConfigError as error:
            assert "read-only" in str(error)  # noqa: PT017
            return
        # Whoever was given the right to write keeps it until it leaves.
        for _ in range(2):
            await user.pwritev(0, IoVec.of(b"x"))
            assert node.children["file"].perm & Perm.WRITE
            await turns(1)
        await user.close()

    await asyncio.gather(change(), use(), use_later(use))
    assert all("read-only" in failure for failure in failures)
    assert not node.quiesced
    await graph.close_all()


async def use_later(use: object) -> None:
    await turns(3)
    assert callable(use)
    await use()


class Slow(PassNode):
    """Takes its time for every step of a reopen."""

    driver_name = "slow"

    async def reopen_prepare(self, entry: object) -> None:
        await turns(1)

    async def reopen_done(self, entry: object) -> None:
        await turns(2)

    async def reopen_abort(self, entry: object) -> None:
        await turns(1)


def test_users_that_come_while_a_node_is_reopened_keep_what_they_were_given() -> None:
    assert explore(reopens_beside_users, limit=150) > 20


# ---------------------------------------------------------------------- throttling


async def throttled_members() -> None:
    """Two members share a budget; one is drained meanwhile, one request is cancelled: everybody else goes on."""
    limits = ThrottleLimits(iops_total=10)
    group = ThrottleGroup("g", limits)
    first, second = group.join(), group.join()
    done: list[str] = []

    async def ask(member: Member, way: int, name: str) -> None:
        await group.admit(member, way, 512)
        done.append(name)

    tasks = [
        asyncio.create_task(ask(member, way, f"{number}"))
        for number, (member, way) in enumerate(
            [(first, WRITE), (second, WRITE), (first, WRITE), (second, READ), (first, READ)]
        )
    ]

    async def drain() -> None:
        group.release(first)
        await turns(1)
        group.limit(first)

    async def cancel() -> None:
        tasks[1].cancel()

    await asyncio.gather(drain(), cancel(), *tasks, return_exceptions=True)
    assert set(done) >= {"0", "2", "3", "4"}
    assert not any(first.queues) and not any(second.queues)  # noqa: PT018
    group.leave(first)
    group.leave(second)


def test_no_order_of_drains_and_cancellations_leaves_a_throttled_request_behind() -> None:
    assert explore(throttled_members, limit=150) > 20


# ---------------------------------------------------------------------- users that come and go


async def users_come_and_go_beside_drains() -> None:
    leaf = ArrayNode(SIZE)
    leaf.pause = lambda: turns(1)
    node = put_above(leaf)
    orphaned: list[str] = []

    async def left_alone(left: object) -> None:
        await turns(1)
        orphaned.append("once")

    node.left_alone = left_alone

    async def use(number: int) -> None:
        user = BlockBackend(node, f"user {number}", writable=True, shared=Perm.ALL)
        await user.pwritev(number, IoVec.of(bytes([number + 1])))
        await asyncio.gather(user.close(), user.close())
        assert user.root not in node.parents

    async def drain() -> None:
        await node.drained_begin()
        assert not node.in_flight
        assert not leaf.in_flight
        await turns(1)
        node.drained_end()

    await asyncio.gather(use(0), use(1), drain())
    assert len(orphaned) == 2
    assert not node.parents
    assert not node.quiesced
    assert leaf.data[:2] == b"\x01\x02"


def test_users_that_come_and_go_beside_drains_lose_no_request() -> None:
    assert explore(users_come_and_go_beside_drains, limit=150) > 20
