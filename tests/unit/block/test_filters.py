"""The filters (rows B20, B30, B43), opened as users open them."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.disks import read
from tests.schedule import replay
from tests.unit.block.fakes import ArrayNode, CowNode, NoOptions, turns
from vhostblk.block.activation import activate, inactivate
from vhostblk.block.backend import BlockBackend
from vhostblk.block.create import create_image
from vhostblk.block.driver import OpenContext
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.filters.blkdebug import EVENTS, BlkdebugNode
from vhostblk.block.flags import StatusFlag
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.leaky_bucket import ThrottleLimits
from vhostblk.block.node import BlockNode
from vhostblk.block.options import NodeOptions
from vhostblk.block.permissions import Perm
from vhostblk.block.quiesce import drained
from vhostblk.block.reopen import reopen
from vhostblk.block.roles import Role
from vhostblk.block.throttle_group import ThrottleGroup
from vhostblk.errors import BlockError, ConfigError
from vhostblk.testing.plugin import ExpectedLog

MEMORY = {"driver": "memory", "size": 1 << 20, "node-name": "disk"}


class Layer(CowNode):
    """A COW layer with a base, opened by a graph."""

    driver_name = "layer"
    child_keys = ("backing",)

    def __init__(self, name: str, common: NodeOptions, options: NoOptions) -> None:
        super().__init__(None, 1 << 20, 4096)
        self.node_name, self.common = name, common

    async def open(self, context: OpenContext) -> None:
        await context.open_child(self, "backing", Role.COW)


class Plain(ArrayNode):
    driver_name = "plain"

    def __init__(self, name: str, common: NodeOptions, options: NoOptions) -> None:
        super().__init__(1 << 20, common=common)
        self.node_name = name


def run(scenario: Callable[[BlockGraph], Awaitable[None]]) -> None:
    async def everything() -> None:
        graph = BlockGraph({**DRIVERS, "layer": Layer, "plain": Plain})
        try:
            await asyncio.wait_for(scenario(graph), 20)
        finally:
            await graph.close_all()

    asyncio.run(everything())


async def user_of(graph: BlockGraph, options: dict[str, Any]) -> BlockBackend:
    return BlockBackend(await graph.add(options), "user", writable=True, shared=Perm.ALL)


# ---------------------------------------------------------------- copy on read


def test_copy_on_read_filter_populates_what_is_read() -> None:
    async def scenario(graph: BlockGraph) -> None:
        base = await graph.add({"driver": "plain", "node-name": "base"})
        assert isinstance(base, ArrayNode)
        base.data[:] = b"base" * (1 << 18)
        user = await user_of(
            graph,
            {
                "driver": "copy-on-read",
                "file": {"driver": "layer", "node-name": "top", "backing": "base"},
            },
        )
        assert await user.extents(0, 4096) == []
        assert await read(user, 5000, 4000) == b"base" * 1000
        top = graph.find("top")
        assert isinstance(top, Layer)
        assert top.allocated == {1, 2}
        await user.pwritev(4096, IoVec.of(b"new!"))
        assert await read(user, 4092, 12) == b"basenew!base"
        await user.close()

    run(scenario)


def test_copy_on_read_goes_to_another_owner_and_copies_nothing_until_it_is_back() -> None:
    async def scenario(graph: BlockGraph) -> None:
        base = await graph.add({"driver": "plain", "node-name": "base"})
        assert isinstance(base, ArrayNode)
        base.data[:] = b"base" * (1 << 18)
        copying = {
            "driver": "copy-on-read",
            "file": {"driver": "layer", "node-name": "top", "backing": "base"},
        }
        user = await user_of(graph, copying)
        top = graph.find("top")
        assert isinstance(top, Layer)
        await inactivate(graph)
        assert await read(user, 5000, 4000) == b"base" * 1000
        assert not top.allocated
        await activate(graph)
        assert await read(user, 5000, 4000) == b"base" * 1000
        assert top.allocated == {1, 2}
        await user.close()

    run(scenario)


def test_copy_on_read_with_a_bottom_copies_only_from_there_up() -> None:
    """Layers top, mid (the bottom) and base: what base has is read, and stays there."""

    async def scenario(graph: BlockGraph) -> None:
        base = await graph.add({"driver": "plain", "node-name": "base"})
        assert isinstance(base, ArrayNode)
        base.data[:] = b"base" * (1 << 18)
        mid = await graph.add({"driver": "layer", "node-name": "mid", "backing": "base"})
        user = BlockBackend(mid, "before", writable=True)
        await user.pwritev(4096, IoVec.of(b"mids" * 1024))
        await user.close()
        top = {"driver": "layer", "node-name": "top", "backing": "mid"}
        cor = {"driver": "copy-on-read", "node-name": "cor", "bottom": "mid"}
        above = {"driver": "blkdebug", "image": top}  # filters in between are no layers
        user = await user_of(graph, {**cor, "file": above})
        assert await read(user, 0, 12288) == b"base" * 1024 + b"mids" * 1024 + b"base" * 1024
        node = graph.find("top")
        assert isinstance(node, Layer)
        assert node.allocated == {1}
        # What has been copied is not asked for any more.
        mid.driver_preadv = None  # type: ignore[assignment]
        assert await read(user, 4096, 4096) == b"mids" * 1024
        (edge,) = (edge for edge in mid.parents if edge.name == "backing")
        assert edge.frozen
        await user.close()
        await graph.remove("cor")
        assert list(graph.nodes) == ["base", "mid"]

    run(scenario)


@pytest.mark.parametrize(
    ("bottom", "message"),
    [
        ("nobody", "Cannot find node 'nobody'"),
        ("alone", "Node 'alone' is not in the backing chain"),
        ("debug", "'bottom': node 'debug' is a filter"),
    ],
)
def test_bottom_is_a_layer_below(bottom: str, message: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        await graph.add({"driver": "plain", "node-name": "base"})
        await graph.add({"driver": "plain", "node-name": "alone"})
        await graph.add({"driver": "blkdebug", "node-name": "debug", "image": "base"})
        await graph.add({"driver": "layer", "node-name": "top", "backing": "debug"})
        before = list(graph.nodes)
        with pytest.raises(ConfigError, match=message):
            await graph.add({"driver": "copy-on-read", "file": "top", "bottom": bottom})
        assert list(graph.nodes) == before
        top = graph.find("top")
        assert not top.children["backing"].frozen

    run(scenario)


def test_copy_on_read_of_a_read_only_node_is_refused() -> None:
    async def scenario(graph: BlockGraph) -> None:
        with pytest.raises(ConfigError, match="node 'disk' is read-only"):
            await graph.add({"driver": "copy-on-read", "file": {**MEMORY, "read-only": True}})
        assert not graph.nodes

    run(scenario)


# ---------------------------------------------------------------- throttle


def group(graph: BlockGraph, name: str = "tg", **limits: int) -> ThrottleGroup:
    graph.throttle_groups[name] = ThrottleGroup(name, ThrottleLimits(**limits))
    return graph.throttle_groups[name]


THROTTLED = {"driver": "throttle", "throttle-group": "tg", "file": MEMORY}


def test_throttled_node_needs_a_group_that_exists() -> None:
    async def scenario(graph: BlockGraph) -> None:
        with pytest.raises(ConfigError, match="Throttle group 'tg' does not exist"):
            await graph.add(THROTTLED)
        with pytest.raises(ConfigError, match="'throttle-group' is missing"):
            await graph.add({"driver": "throttle", "file": MEMORY})
        assert not graph.nodes

    run(scenario)


def test_throttled_rate_is_the_one_that_was_set() -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        group(graph, iops_total=400)
        user = await user_of(graph, {**THROTTLED, "file": {"driver": "null-co"}})
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.gather(*(user.pwritev(0, IoVec.of(b"x")) for _ in range(40 + 400)))
        # A tenth of a second's worth at once, the rest at the rate.
        assert loop.time() - began == pytest.approx(1.0, rel=0.03)
        assert not user.in_flight
        await user.close()
        await graph.close_all()

    replay(scenario, {})


def test_throttled_requests_are_released_by_a_drain_and_it_ends() -> None:
    async def scenario(graph: BlockGraph) -> None:
        group(graph, iops_total=1)
        user = await user_of(graph, THROTTLED)
        requests = [asyncio.create_task(user.pwritev(0, IoVec.of(b"x"))) for _ in range(20)]
        await turns(3)
        assert sum(request.done() for request in requests) < 20
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with drained(user.node):
            assert all(request.done() for request in requests)
            assert not user.node.in_flight
        assert loop.time() - began < 1
        # And it holds back again.
        late = asyncio.create_task(user.pwritev(0, IoVec.of(b"x")))
        await turns(5)
        assert not late.done()
        await user.close()
        await late

    run(scenario)


def test_cancelled_throttled_request_takes_nothing_and_nobodys_turn() -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        throttle = group(graph, iops_total=1000)
        user = await user_of(graph, {**THROTTLED, "file": {"driver": "null-co"}})
        requests = [asyncio.create_task(user.pwritev(0, IoVec.of(b"x"))) for _ in range(200)]
        await turns(3)
        for request in requests[150:]:
            request.cancel()
        results = await asyncio.gather(*requests, return_exceptions=True)
        assert sum(isinstance(result, asyncio.CancelledError) for result in results) == 50
        assert not any(queue for member in throttle._members for queue in member.queues)
        await user.close()
        await graph.close_all()

    replay(scenario, {})  # where time does not pass by itself


def test_members_of_a_group_take_turns() -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        group(graph, iops_total=1000)
        users = [
            await user_of(
                graph,
                {**THROTTLED, "file": {"driver": "null-co"}},
            )
            for _ in range(2)
        ]
        order: list[int] = []

        async def one(number: int) -> None:
            await users[number].pwritev(0, IoVec.of(b"x"))
            order.append(number)

        # The first has queued all of its requests before the second comes.
        tasks = [asyncio.create_task(one(0)) for _ in range(150)]
        await turns(2)
        before = len(order)
        tasks += [asyncio.create_task(one(1)) for _ in range(20)]
        await asyncio.gather(*tasks)
        contended = order[before : before + 40]
        assert 15 <= contended.count(1) <= 20
        for user in users:
            await user.close()
        await graph.close_all()

    replay(scenario, {})


def test_throttled_node_goes_over_to_another_group_with_all_who_wait() -> None:
    async def scenario(graph: BlockGraph) -> None:
        slow, fast = group(graph, iops_total=1), group(graph, "fast", bps_total=1 << 30)
        user = await user_of(graph, {**THROTTLED, "node-name": "d"})
        requests = [asyncio.create_task(user.pwritev(0, IoVec.of(b"x"))) for _ in range(20)]
        await turns(3)
        assert not all(request.done() for request in requests)
        with pytest.raises(ConfigError, match="Throttle group 'none' does not exist"):
            await reopen(graph, {graph.find("d"): {"throttle-group": "none"}})
        await reopen(graph, {graph.find("d"): {"throttle-group": "fast"}})
        assert all(request.done() for request in requests)
        assert (len(slow._members), len(fast._members)) == (0, 1)
        for _ in range(20):
            await asyncio.wait_for(user.pwritev(0, IoVec.of(b"x")), 1)
        # Held back again, not only as long as it is drained.
        fast.configure(ThrottleLimits(iops_total=1))
        late = [asyncio.create_task(user.pwritev(0, IoVec.of(b"x"))) for _ in range(2)]
        await turns(5)
        assert [request.done() for request in late] == [True, False]
        await user.close()

    run(scenario)


# ---------------------------------------------------------------- blkdebug


def blkdebug(**options: Any) -> dict[str, Any]:
    return {"driver": "blkdebug", "node-name": "debug", "image": MEMORY, **options}


async def outcome(request: Awaitable[None]) -> int:
    try:
        await request
    except BlockError as error:
        return error.errno or 0
    return 0


def test_blkdebug_injects_errors_by_event_type_sector_and_once(expect_log: ExpectedLog) -> None:
    expect_log.expect("flush at close failed")

    async def scenario(graph: BlockGraph) -> None:
        rules = [
            {"event": "none", "iotype": "read", "sector": 2, "errno": errno.ENODATA},
            {"event": "none", "iotype": "write", "once": True, "errno": errno.ENOSPC},
            {"event": "none", "iotype": "flush", "immediately": True},
        ]
        user = await user_of(graph, blkdebug(**{"inject-error": rules}))
        block = IoVec.of(bytearray(512))
        assert await outcome(user.preadv(0, block)) == 0
        assert await outcome(user.preadv(1024, block)) == errno.ENODATA
        assert await outcome(user.preadv(900, block)) == errno.ENODATA
        assert await outcome(user.pwritev(0, block)) == errno.ENOSPC
        assert await outcome(user.pwritev(0, block)) == 0
        assert await outcome(user.flush()) == errno.EIO
        await user.close()

    run(scenario)


def test_blkdebug_states_decide_which_rules_an_event_activates(expect_log: ExpectedLog) -> None:
    expect_log.expect("flush at close failed")

    async def scenario(graph: BlockGraph) -> None:
        user = await user_of(
            graph,
            blkdebug(
                **{
                    "inject-error": [{"event": "pwritev", "state": 3, "errno": errno.ENOSPC}],
                    "set-state": [
                        {"event": "pwritev", "state": 1, "new_state": 2},
                        {"event": "pwritev", "state": 2, "new_state": 3},
                    ],
                }
            ),
        )
        block = IoVec.of(b"x" * 512)
        assert [await outcome(user.pwritev(0, block)) for _ in range(3)] == [0, 0, errno.ENOSPC]
        await user.close()

    run(scenario)


def test_blkdebug_file_of_rules_is_qemus(tmp_path: Path, expect_log: ExpectedLog) -> None:
    expect_log.expect("flush at close failed")
    config = tmp_path / "rules"
    config.write_text(
        '# a comment\n[set-state]\nstate = "1"\nevent = "pwritev"\nnew_state = "2"\n\n'
        '[inject-error]\nevent = "pwritev"\nstate = "2"\nerrno = "28"\n'
    )

    async def scenario(graph: BlockGraph) -> None:
        user = await user_of(graph, blkdebug(config=str(config)))
        block = IoVec.of(b"x" * 512)
        assert [await outcome(user.pwritev(0, block)) for _ in range(2)] == [0, 28]
        await user.close()
        for wrong in ("event = 1", "[inject-error]\nevent = 5", "[other]", '[set-state]\nx = "1"'):
            config.write_text(wrong)
            with pytest.raises(ConfigError):
                await graph.add({**blkdebug(config=str(config)), "node-name": "second"})

    run(scenario)


def test_blkdebug_takes_and_unshares_permissions_as_it_is_told() -> None:
    async def scenario(graph: BlockGraph) -> None:
        disk = await graph.add(MEMORY)
        other = BlockBackend(disk, "other", writable=True, shared=Perm.ALL)
        options = blkdebug(image="disk", **{"unshare-child-perms": ["write", "resize"]})
        with pytest.raises(
            ConfigError, match="other cannot have permission 'write' on node 'disk'"
        ):
            await graph.add(options)
        await other.close()
        await graph.add(options)
        with pytest.raises(ConfigError, match="node 'debug' as 'image' does not share"):
            BlockBackend(disk, "other", writable=True, shared=Perm.ALL)
        await graph.remove("debug")
        await graph.add(blkdebug(image="disk", **{"take-child-perms.0": "write-unchanged"}))
        assert disk.parents[0].perm == Perm.WRITE_UNCHANGED
        with pytest.raises(ConfigError, match="node 'debug' as 'image'"):
            BlockBackend(disk, "other", writable=False, shared=Perm.CONSISTENT_READ)
        await graph.remove("debug")

    run(scenario)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"take-child-perms.0": "wrote"}, "'take-child-perms.0' does not accept value 'wrote'"),
        ({"unshare-child-perms.1": "write"}, "'unshare-child-perms.1' is unexpected"),
        ({"inject-error.0.event": "pwritev", "inject-error.0.typo": 1}, "inject-error.0.typo"),
        ({"inject-error.0.event": "nothing"}, "'inject-error.0.event' does not accept"),
        ({"inject-error.1.event": "pwritev"}, "inject-error.1.event"),
        ({"set-state.0.event": "pwritev"}, "'set-state.0.new_state' is missing"),
        ({"align": 3}, "Cannot meet constraints with align 3"),
        ({"align": 4096, "max-transfer": 512}, "Cannot meet constraints with max-transfer 512"),
    ],
)
def test_blkdebug_options_that_make_no_sense_are_named(
    options: dict[str, Any], message: str
) -> None:
    async def scenario(graph: BlockGraph) -> None:
        with pytest.raises(ConfigError, match=message):
            await graph.add(blkdebug(**options))
        assert not graph.nodes

    run(scenario)


def test_blkdebug_limits_are_obeyed_and_change_no_byte() -> None:
    async def scenario(graph: BlockGraph) -> None:
        seen: list[tuple[int, int]] = []

        class Spy(BlkdebugNode):
            driver_name = "spy"

            async def driver_pwritev(
                self, offset: int, length: int, iov: IoVec, flags: int
            ) -> None:
                seen.append((offset, length))
                await super().driver_pwritev(offset, length, iov, flags)

        graph.drivers.register(Spy)
        user = await user_of(
            graph, {**blkdebug(align=1024, **{"max-transfer": 2048}), "driver": "spy"}
        )
        await user.pwritev(100, IoVec.of(b"z" * 5000))
        assert seen == [(0, 2048), (2048, 2048), (4096, 1024)]
        assert await read(user, 0, 6000) == bytes(100) + b"z" * 5000 + bytes(900)
        await user.close()

    run(scenario)


def test_write_that_overlaps_a_suspended_read_modify_write_waits_for_it() -> None:
    """Row B43's proof: the read block is in a buffer, so whoever wrote now would be undone."""

    async def scenario(graph: BlockGraph) -> None:
        user = await user_of(graph, blkdebug(align=512))
        debug = graph.find("debug")
        assert isinstance(debug, BlkdebugNode)
        debug.add_breakpoint("pwritev_rmw_after_head", "A")
        first = asyncio.create_task(user.pwritev(10, IoVec.of(b"first")))
        while not debug.is_suspended("A"):
            await turns(1)
        second = asyncio.create_task(user.pwritev(0, IoVec.of(b"s" * 512)))
        other = asyncio.create_task(user.pwritev(512, IoVec.of(b"o" * 512)))
        await turns(20)
        assert not second.done()
        assert other.done()
        debug.resume("A")
        await asyncio.gather(first, second)
        assert await read(user, 0, 512) == b"s" * 512
        await user.close()

    run(scenario)


def test_breakpoints_are_removed_and_unknown_ones_refused() -> None:
    async def scenario(graph: BlockGraph) -> None:
        user = await user_of(graph, blkdebug())
        debug = graph.find("debug")
        assert isinstance(debug, BlkdebugNode)
        debug.add_breakpoint("pwritev", "A")
        debug.remove_breakpoint("A")
        await user.pwritev(0, IoVec.of(b"x"))
        debug.add_breakpoint("pwritev", "B")
        task = asyncio.create_task(user.pwritev(0, IoVec.of(b"x")))
        await turns(3)
        debug.remove_breakpoint("B")
        await task
        wrongs: list[Callable[[], None]] = [
            lambda: debug.resume("B"),
            lambda: debug.remove_breakpoint("B"),
            lambda: debug.add_breakpoint("nothing", "C"),
        ]
        for wrong in wrongs:
            with pytest.raises(BlockError) as caught:
                wrong()
            assert caught.value.errno == errno.ENOENT
        await user.close()

    run(scenario)


def test_raw_reports_its_events_to_the_image_below(expect_log: ExpectedLog) -> None:
    expect_log.expect("flush at close failed")

    async def scenario(graph: BlockGraph) -> None:
        options: dict[str, Any] = {"driver": "raw", "file": blkdebug()}
        options["file"]["inject-error"] = [
            {"event": "read_aio", "iotype": "read", "errno": errno.EPERM},
            {"event": "flush_to_disk", "errno": errno.EACCES, "iotype": "flush"},
        ]
        user = await user_of(graph, options)
        assert await outcome(user.preadv(0, IoVec.of(bytearray(512)))) == errno.EPERM
        assert await outcome(user.flush()) == errno.EACCES
        await user.close()

    run(scenario)


def test_events_are_known_by_qemus_names() -> None:
    assert len(EVENTS) == len(set(EVENTS))
    assert {"pwritev_rmw_after_head", "cor_write", "flush_to_disk", "l2_update"} <= set(EVENTS)


def test_every_filter_passes_through_what_it_does_not_change() -> None:
    async def scenario(graph: BlockGraph) -> None:
        group(graph)
        for options in (THROTTLED, blkdebug(), {"driver": "copy-on-read", "file": MEMORY}):
            node: BlockNode = await graph.add({**options, "discard": "unmap", "node-name": "f"})
            user = BlockBackend(node, "user", writable=True)
            await user.pwritev(1000, IoVec.of(b"abc" * 1000))
            await user.pwrite_zeroes(1500, 700, may_unmap=True)
            await user.pdiscard(8192, 4096)
            await user.flush()
            assert (await read(user, 1000, 3000))[:500] == (b"abc" * 1000)[:500]
            assert await read(user, 1500, 700) == bytes(700)
            assert (user.length, user.node.block_sizes.logical) == (1 << 20, 512)
            await user.close()
            await graph.remove("f")

    run(scenario)


def test_compress_filter_compresses_what_is_written_and_needs_an_image_that_can(
    tmp_path: Path,
) -> None:
    image = tmp_path / "image"

    async def scenario(graph: BlockGraph) -> None:
        await create_image(graph, str(image), "qcow2", size=1 << 20)
        file = {"driver": "file", "filename": str(image)}
        backend = await user_of(
            graph, {"driver": "compress", "file": {"driver": "qcow2", "file": file}}
        )
        await backend.pwritev(70000, IoVec.of(b"x" * 200000))
        status = await backend.node.children["file"].node.driver_block_status(65536, 65536, True)
        assert status.flags & StatusFlag.COMPRESSED
        await backend.close()
        with pytest.raises(ConfigError, match="not supported for underlying format: plain"):
            await graph.add({"driver": "compress", "file": {"driver": "plain"}})

    run(scenario)
