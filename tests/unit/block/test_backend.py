"""The root edge: range checks, write cache, extents, drain, close."""

from __future__ import annotations

import asyncio
import errno
from functools import partial
from typing import Any

import pytest

from tests.unit.block.fakes import ArrayNode, PassNode, put_above, run_now, turns
from vhostblk.block import pipeline
from vhostblk.block.backend import BlockBackend
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import BlockLimits
from vhostblk.block.node import ExtentFlag, FlushTarget, HostExtent, PastWrites, Req
from vhostblk.block.options import NodeOptions
from vhostblk.block.permissions import Perm
from vhostblk.errors import BlockError, ConfigError


def backend(node: ArrayNode | PassNode, **options: Any) -> BlockBackend:
    return BlockBackend(node, "export 'x'", **{"writable": True, **options})


class MappedNode(ArrayNode):
    """One extent per 4 KiB, except those in `unmapped`."""

    unmapped: frozenset[int] = frozenset()
    wait = False

    async def host_extent(self, offset: int, length: int) -> HostExtent | None:
        if self.wait:
            await turns(1)
        block = offset // 4096
        if block in self.unmapped:
            return None
        flags = ExtentFlag.READ | ExtentFlag.WRITE
        return HostExtent(block * 4096, 4096, 7, 100_000 + block * 4096, flags)


@pytest.mark.parametrize(
    ("offset", "length"), [(65536, 1), (65535, 2), (-1, 1), (0, 65537), (1 << 63, 1), (0, -1)]
)
def test_what_is_outside_the_disk_is_eio(offset: int, length: int) -> None:
    node = ArrayNode()
    user = backend(node)
    requests = [user.pwrite_zeroes(offset, length), user.pdiscard(offset, length)]
    if length > 0:
        requests.append(user.preadv(offset, IoVec.of(bytearray(length))))
        requests.append(user.pwritev(offset, IoVec.of(bytes(length))))
    for request in requests:
        with pytest.raises(BlockError) as caught:
            run_now(request)
        assert caught.value.errno == errno.EIO
    assert not node.asked.calls
    assert not user.in_flight


def test_backend_that_is_not_writable_refuses_changes_and_may_share_the_node() -> None:
    node = ArrayNode()
    reader = backend(node, writable=False)
    for request in (
        reader.pwritev(0, IoVec.of(b"x")),
        reader.pwrite_zeroes(0, 1),
        reader.pdiscard(0, 1),
    ):
        with pytest.raises(BlockError) as caught:
            run_now(request)
        assert caught.value.errno == errno.EPERM
    assert not node.asked.calls
    backend(node, writable=False)
    with pytest.raises(ConfigError, match="export 'x' cannot have permission 'write"):
        backend(node)


def test_writable_backend_keeps_other_writers_out_until_it_closes() -> None:
    node = ArrayNode()
    first = backend(node)
    with pytest.raises(ConfigError, match="cannot have permission 'write'"):
        BlockBackend(node, "export 'y'", writable=True)
    run_now(first.close())
    run_now(BlockBackend(node, "export 'y'", writable=True).close())


def test_two_writers_that_both_share_are_allowed() -> None:
    node = ArrayNode()
    for name in ("a", "b"):
        BlockBackend(node, name, writable=True, shared=Perm.ALL)
    assert len(node.parents) == 2


def test_without_a_write_cache_every_write_is_durable_when_it_completes() -> None:
    node = ArrayNode()
    user = backend(node, write_cache=False)
    run_now(user.pwritev(0, IoVec.of(b"data")))
    assert node.durable[:4] == b"data"
    run_now(user.pwrite_zeroes(0, 2))
    assert node.durable[:4] == b"\0\0ta"
    user.write_cache = True
    run_now(user.pwritev(0, IoVec.of(b"late")))
    assert node.durable[:4] == b"\0\0ta"
    run_now(user.flush())
    assert node.durable[:4] == b"late"


def test_zero_write_may_unmap_only_when_asked() -> None:
    node = ArrayNode()
    user = backend(node)
    run_now(user.pwrite_zeroes(0, 512))
    run_now(user.pwrite_zeroes(0, 512, True))
    assert [flags for *_, flags in node.asked.calls] == [0, int(Req.MAY_UNMAP)]


def test_discard_is_offered_only_where_it_has_an_effect() -> None:
    assert backend(ArrayNode()).can_discard
    assert backend(put_above(ArrayNode())).can_discard
    assert not backend(ArrayNode(discards=False)).can_discard
    assert not backend(ArrayNode(common=NodeOptions(discard="ignore"))).can_discard
    assert not backend(ArrayNode(), writable=False).can_discard


# ---------------------------------------------------------------- extents


def test_extents_are_the_whole_runs_that_touch_the_range() -> None:
    user = backend(MappedNode())
    found = run_now(user.extents(5000, 8192))
    assert [(extent.offset, extent.length) for extent in found] == [
        (4096, 4096),
        (8192, 4096),
        (12288, 4096),
    ]
    assert found[0].host_offset == 104_096


def test_extents_end_where_nothing_may_be_done_alone() -> None:
    node = MappedNode()
    node.unmapped = frozenset({2})
    user = backend(node)
    assert [extent.offset for extent in run_now(user.extents(0, 65536))] == [0, 4096]
    assert run_now(user.extents(8192, 512)) == []
    assert run_now(user.extents(65536, 512)) == []


def test_extents_give_no_right_to_write_to_who_may_not() -> None:
    reader = backend(MappedNode(), writable=False)
    assert [extent.flags for extent in run_now(reader.extents(0, 1))] == [ExtentFlag.READ]
    read_only = backend(MappedNode(common=NodeOptions(read_only=True)), writable=False)
    assert [extent.flags for extent in run_now(read_only.extents(0, 1))] == [ExtentFlag.READ]


def test_extents_keep_out_of_a_serialising_requests_way() -> None:
    async def scenario() -> None:
        node = MappedNode(limits=BlockLimits(request_alignment=512, min_mem_alignment=1))
        gate = asyncio.Event()

        async def pause() -> None:
            await gate.wait()

        node.pause = pause
        user = backend(node)
        revoked: list[tuple[int, int]] = []

        async def revoke(offset: int, length: int) -> None:
            revoked.append((offset, length))

        user.attach(revoke=revoke)
        write = asyncio.create_task(user.pwritev(1000, IoVec.of(b"x")))
        await turns(2)
        assert revoked == [(512, 512)]
        assert await user.extents(600, 100) == []
        below, above = await user.extents(0, 512), await user.extents(1024, 512)
        assert [(extent.offset, extent.end) for extent in below + above] == [(0, 512), (1024, 4096)]
        assert above[0].host_offset == 101_024
        gate.set()
        await write
        assert [(extent.offset, extent.end) for extent in await user.extents(600, 1)] == [(0, 4096)]

    asyncio.run(scenario())


def test_extents_overtaken_by_a_revocation_are_not_given_out() -> None:
    async def scenario() -> None:
        node = MappedNode()
        node.wait = True
        user = backend(node)
        asked = asyncio.create_task(user.extents(0, 8192))
        await turns(1)
        await node.revoke(0, 512)
        assert await asked == []

    asyncio.run(scenario())


def test_drained_node_gives_no_extents() -> None:
    async def scenario() -> None:
        node = MappedNode()
        user = backend(node)
        await node.drained_begin()
        assert await user.extents(0, 512) == []
        node.drained_end()
        assert len(await user.extents(0, 512)) == 1

    asyncio.run(scenario())


def test_flush_target_of_a_read_only_node_is_nothing() -> None:
    assert backend(ArrayNode()).flush_target() is FlushTarget.ASK
    node = ArrayNode(common=NodeOptions(read_only=True))
    assert backend(node, writable=False).flush_target() is FlushTarget.NOTHING


def test_node_with_two_users_is_flushed_by_the_graph_only() -> None:
    """The kernel tells of a lost write once, to whoever asks first: both have to know."""

    class File(ArrayNode):
        def flush_target(self) -> int | FlushTarget:
            return 7

    node = File()
    user = backend(node, shared=Perm.ALL)
    assert user.flush_target() == 7
    second = backend(node, shared=Perm.ALL)
    assert user.flush_target() is second.flush_target() is FlushTarget.ASK
    run_now(second.close())
    assert user.flush_target() == 7


def test_write_of_less_than_a_block_takes_the_extents_of_all_users() -> None:
    node = ArrayNode(limits=BlockLimits(request_alignment=4096, min_mem_alignment=1))
    users = [backend(node, shared=Perm.ALL) for _ in range(2)]
    revoked: list[tuple[int, int, int]] = []

    async def scenario() -> None:
        for number, user in enumerate(users):

            async def revoke(offset: int, length: int, number: int = number) -> None:
                revoked.append((number, offset, length))

            user.attach(revoke=revoke)
        await users[0].pwritev(4608, IoVec.of(bytes(512)))

    asyncio.run(scenario())
    assert sorted(revoked) == [(0, 4096, 4096), (1, 4096, 4096)]


# ---------------------------------------------------------------- life


def test_requests_wait_while_the_graph_is_drained_and_then_go_on() -> None:
    async def scenario() -> None:
        node = ArrayNode()
        user = backend(node)
        await node.drained_begin()
        requests = [
            asyncio.create_task(user.pwritev(0, IoVec.of(b"x"))),
            asyncio.create_task(user.preadv(0, IoVec.of(bytearray(1)))),
            asyncio.create_task(user.pwrite_zeroes(8, 1)),
            asyncio.create_task(user.pdiscard(8, 1)),
            asyncio.create_task(user.flush()),
        ]
        await turns(5)
        assert not node.asked.calls
        node.drained_end()
        await asyncio.wait_for(asyncio.gather(*requests), 5)
        assert not user.in_flight

    asyncio.run(scenario())


def test_drain_revokes_everything_and_waits_for_what_is_in_flight() -> None:
    async def scenario() -> None:
        node = ArrayNode()
        node.pause = lambda: turns(10)
        user = backend(node)
        revoked: list[tuple[int, int]] = []

        async def revoke(offset: int, length: int) -> None:
            revoked.append((offset, length))

        user.attach(revoke=revoke)
        write = asyncio.create_task(user.pwritev(0, IoVec.of(b"x")))
        await turns(2)
        await user.drain()
        assert write.done()
        assert revoked == [(0, 65536)]

    asyncio.run(scenario())


def test_settling_waits_for_our_own_requests_and_holds_up_nobody_else() -> None:
    """A guest that changes its cache mode all day must not stop the node's other users."""

    async def scenario() -> None:
        node = ArrayNode()
        user, other = backend(node, shared=Perm.ALL), backend(node, shared=Perm.ALL)
        gate = asyncio.Event()

        async def pause() -> None:
            await gate.wait()

        node.pause = pause
        write = asyncio.create_task(user.pwritev(0, IoVec.of(b"x")))
        await turns(2)
        settling = asyncio.create_task(user.settle())
        late = asyncio.create_task(user.pwritev(8, IoVec.of(b"y")))
        await turns(5)
        assert node.asked.of("write") == [(0, 1)]
        node.pause = None
        await other.pwritev(512, IoVec.of(b"z"))
        assert not settling.done()
        gate.set()
        await asyncio.wait_for(settling, 5)
        assert write.done()
        await asyncio.wait_for(late, 5)

    asyncio.run(scenario())


@pytest.mark.warns("export 'x': flush at close failed: .*EIO")
def test_close_flushes_logs_what_fails_and_gives_the_node_up() -> None:
    node = ArrayNode()
    user = backend(node)
    run_now(user.pwritev(0, IoVec.of(b"data")))

    def fail(kind: str, offset: int, length: int) -> None:
        raise BlockError(errno.EIO)

    node.fail = fail
    run_now(user.close())
    run_now(user.close())
    assert node.asked.count("flush-os") == 1
    assert not node.parents


def test_resize_is_reported_through_filters() -> None:
    node = ArrayNode(4096)
    user = backend(put_above(node))
    lengths: list[int] = []
    user.attach(resized=lengths.append)
    run_now(pipeline.truncate(node, 8192))
    assert lengths == [8192]
    assert user.length == 8192


def test_external_writes_make_the_next_flush_real() -> None:
    node = ArrayNode()
    user = backend(put_above(node))
    written = 0

    def take(_ranges: bool) -> PastWrites:
        nonlocal written
        taken, written = PastWrites(written), 0
        return taken

    user.attach(take_writes=take)
    run_now(user.flush())
    run_now(user.flush())
    assert node.asked.count("flush") == 1
    written = 3
    run_now(user.flush())
    assert node.asked.count("flush") == 2
    written = 1
    run_now(user.close())
    assert node.asked.count("flush") == 3


def test_permissions_are_asked_for_when_they_are_needed_and_given_back() -> None:
    node = ArrayNode()
    user = backend(node, writable=False, shared=Perm.ALL)
    exclusive = backend(node, writable=False)

    async def scenario() -> None:
        with pytest.raises(ConfigError, match="does not share it"):
            await user.ask(writable=True)
        assert not user.writable
        await exclusive.close()
        await user.ask(writable=True, resize=True)
        await user.pwritev(0, IoVec.of(b"x"))
        await user.truncate(1024)
        assert user.length == 1024
        await user.ask(writable=False)
        with pytest.raises(BlockError) as caught:
            await user.pwritev(0, IoVec.of(b"x"))
        assert caught.value.errno == errno.EPERM
        reader = backend(node, writable=False)
        await reader.close()

    asyncio.run(scenario())


# ---------------------------------------------------------------- plug (row B28)


def test_plug_reaches_children_first_unplug_last_and_drivers_hear_of_the_outermost() -> None:
    heard: list[str] = []
    node = ArrayNode()
    above = put_above(node)
    for each in (node, above):
        each.driver_plug = partial(heard.append, f"plug {each.node_name}")  # type: ignore[method-assign]
        each.driver_unplug = partial(heard.append, f"unplug {each.node_name}")  # type: ignore[method-assign]
    root, below = backend(above, shared=Perm.ALL), backend(node, shared=Perm.ALL)
    root.plug()
    below.plug()
    root.plug()
    assert heard == ["plug array", "plug above"]
    assert (node.plugged, above.plugged) == (3, 2)
    root.unplug()
    below.unplug()
    root.unplug()
    assert heard == ["plug array", "plug above", "unplug above", "unplug array"]
    with pytest.raises(AssertionError):
        root.unplug()
