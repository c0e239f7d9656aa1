"""Old bytes are in the target before new ones replace them (row B24.2): the filter, and who reads the snapshot."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.block.fakes import ArrayNode, CowNode, NoOptions, turns
from vhostblk.block import surgery
from vhostblk.block.activation import activate, inactivate
from vhostblk.block.backend import BlockBackend
from vhostblk.block.driver import OpenContext
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.filters.copy_before_write import CopyBeforeWriteNode
from vhostblk.block.flags import Req, StatusFlag
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.length import has_become
from vhostblk.block.node import ExtentFlag, FlushTarget, HostExtent
from vhostblk.block.options import NodeOptions
from vhostblk.block.permissions import Perm
from vhostblk.block.roles import Role
from vhostblk.block.status import BlockStatus, block_status
from vhostblk.errors import BlockError, ConfigError
from vhostblk.testing.plugin import ExpectedLog

CLUSTER = 65536
SIZE = 10 * CLUSTER + 1536


class Plain(ArrayNode):
    """Bytes that a test can look at and spoil."""

    driver_name = "plain"

    def __init__(self, name: str, common: NodeOptions, options: NoOptions) -> None:
        super().__init__(SIZE, common=common)
        self.node_name = name
        self.data[:] = random.Random(name).randbytes(len(self.data))


class Overlay(CowNode):
    """A target that has the source's bytes until it gets its own."""

    driver_name = "overlay"
    child_keys = ("backing",)

    def __init__(self, name: str, common: NodeOptions, options: NoOptions) -> None:
        super().__init__(None, SIZE, 4096, common=common)
        self.node_name = name

    async def open(self, context: OpenContext) -> None:
        await context.open_child(self, "backing", Role.COW)


def difference(a: bytes | bytearray, b: bytes | bytearray) -> int | None:
    """Where they differ first."""
    if a == b:
        return None
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


class Disk:
    """A guest's disk, the filter above it, and the snapshot."""

    def __init__(self, graph: BlockGraph) -> None:
        self.graph = graph
        self.file = self._plain("disk")
        self.target = self._plain("target")
        self.before = bytes(self.file.data)
        filter_ = graph.find("cbw")
        assert isinstance(filter_, CopyBeforeWriteNode)
        self.filter = filter_
        self.guest = BlockBackend(filter_, "guest", writable=True, shared=Perm.ALL)
        self.snapshot = BlockBackend(graph.find("old"), "backup", writable=True, shared=Perm.ALL)

    def _plain(self, name: str) -> ArrayNode:
        node = self.graph.find(name)
        assert isinstance(node, ArrayNode)
        return node

    async def old(self, offset: int = 0, length: int = SIZE) -> bytes:
        buffer = bytearray(b"\xee" * length)
        await self.snapshot.preadv(offset, IoVec.of(buffer))
        return bytes(buffer)

    async def check(self, offset: int = 0, length: int = SIZE) -> None:
        """The snapshot has the old bytes."""
        assert difference(await self.old(offset, length), self.before[offset:][:length]) is None

    async def close(self) -> None:
        await self.guest.close()
        await self.snapshot.close()


UNMAP = {"discard": "unmap"}


def with_disk(
    scenario: Callable[[Disk], Awaitable[None]],
    options: Mapping[str, object] | None = None,
    *,
    target: str = "plain",
) -> None:
    async def run() -> None:
        graph = BlockGraph({**DRIVERS, "plain": Plain, "overlay": Overlay})
        await graph.add({"driver": "plain", "node-name": "disk", **UNMAP})
        below = {"backing": "disk"} if target == "overlay" else {}
        await graph.add({"driver": target, "node-name": "target", **UNMAP, **below})
        cbw = {"driver": "copy-before-write", "node-name": "cbw", "file": "disk"}
        await graph.add({**cbw, **UNMAP, "target": "target", **(options or {})})
        await graph.add({"driver": "snapshot-access", "node-name": "old", "file": "cbw", **UNMAP})
        disk = Disk(graph)
        try:
            await asyncio.wait_for(scenario(disk), 30)
        finally:
            await disk.close()
            await graph.close_all()

    asyncio.run(run())


async def outcome(request: Awaitable[object]) -> int:
    try:
        await request
    except BlockError as error:
        return error.errno or 0
    return 0


def break_target(disk: Disk, error: int) -> None:
    def fail(kind: str, offset: int, length: int) -> None:
        if kind in ("write", "zero"):
            raise BlockError(error)

    disk.target.fail = fail


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("target", ["plain", "overlay"])
@pytest.mark.parametrize("seed", range(12))
def test_snapshot_under_random_writes_is_exact(seed: int, target: str) -> None:
    """Row B24's proof; with errors of the target, and requests that are cancelled."""
    choice = random.Random(seed)

    async def request(disk: Disk) -> None:
        offset = choice.randrange(SIZE)
        length = min(choice.choice([1, 512, 5000, CLUSTER, 3 * CLUSTER]), SIZE - offset)
        kind = choice.choice(["write", "write", "zero", "discard", "read", "status", "flush"])
        if kind == "write":
            await disk.guest.pwritev(offset, IoVec.of(choice.randbytes(length)))
        elif kind == "zero":
            await disk.guest.pwrite_zeroes(offset, length, may_unmap=True)
        elif kind == "discard":
            await disk.guest.pdiscard(offset, length)
        elif kind == "flush":
            await disk.guest.flush()
        elif kind == "read":
            await disk.check(offset, length)
        else:
            status = await block_status(disk.snapshot.node, offset, length)
            assert 0 < status.length <= length

    async def pause() -> None:
        await turns(choice.randrange(4))

    async def scenario(disk: Disk) -> None:
        def fail(kind: str, offset: int, length: int) -> None:
            if kind in ("write", "zero") and choice.random() < 0.1:
                raise BlockError(errno.ENOSPC)

        disk.file.pause = disk.target.pause = pause
        disk.target.fail = fail
        for _ in range(8):
            tasks = [asyncio.create_task(request(disk)) for _ in range(12)]
            await turns(choice.randrange(10))
            tasks[0].cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, BlockError):
                    assert result.errno == errno.ENOSPC
                elif not isinstance(result, asyncio.CancelledError):
                    assert result is None, result
            await disk.check()
        assert difference(disk.file.data, disk.before) is not None

    with_disk(scenario, target=target)


def test_old_bytes_are_in_the_target_before_the_write_goes_on() -> None:
    async def scenario(disk: Disk) -> None:
        seen: list[bytes] = []

        async def pause() -> None:
            if disk.file.asked.calls[-1][0] in ("write", "zero", "discard"):
                seen.append(bytes(disk.target.data[:CLUSTER]))

        disk.file.pause = pause
        await disk.guest.pwritev(5000, IoVec.of(b"new"))
        await disk.guest.pwrite_zeroes(0, 100)
        await disk.guest.pdiscard(0, CLUSTER)
        assert [difference(kept, disk.before[:CLUSTER]) for kept in seen] == [None] * 3
        assert disk.target.asked.of("write") == [(0, CLUSTER)]

    with_disk(scenario)


def test_cluster_is_copied_once_however_many_writes_come_for_it() -> None:
    async def scenario(disk: Disk) -> None:
        disk.file.pause = disk.target.pause = lambda: turns(3)
        await asyncio.gather(
            *(disk.guest.pwritev(number * 512, IoVec.of(b"n" * 512)) for number in range(300))
        )
        written = disk.target.asked.of("write")
        assert sum(length for _, length in written) == 3 * CLUSTER
        assert len({offset for offset, _ in written}) == len(written)
        await disk.check()
        assert disk.file.data[: 300 * 512] == b"n" * 300 * 512

    with_disk(scenario)


def test_zeroes_are_not_copied_as_data_and_clusters_are_as_large_as_asked() -> None:
    async def scenario(disk: Disk) -> None:
        await disk.guest.pwritev(SIZE - 10, IoVec.of(b"at the end"))
        assert disk.target.asked.of("write") == [(8 * CLUSTER, 2 * CLUSTER + 1536)]

        async def zeroes(offset: int, length: int, precise: bool) -> BlockStatus:
            return BlockStatus(StatusFlag.ZERO, length)

        disk.filter._copy.source.node.driver_block_status = zeroes  # type: ignore[method-assign]
        await disk.guest.pwritev(0, IoVec.of(b"x"))
        assert disk.target.asked.of("zero") == [(0, 4 * CLUSTER)]
        assert len(disk.target.asked.of("write")) == 1

    with_disk(scenario, {"min-cluster-size": 4 * CLUSTER})


def test_what_is_cut_off_is_kept_and_what_has_grown_is_not_looked_for() -> None:
    async def scenario(disk: Disk) -> None:
        disk.guest._edge.perm |= Perm.RESIZE
        disk.filter.file.perm |= Perm.RESIZE
        await disk.guest._edge.truncate(CLUSTER)
        await disk.guest._edge.truncate(2 * SIZE)
        assert disk.guest.length == 2 * SIZE
        assert disk.snapshot.length == SIZE
        await disk.guest.pwritev(SIZE + CLUSTER, IoVec.of(b"behind"))
        await disk.guest.pwritev(SIZE - 512, IoVec.of(b"x" * 4096))
        await disk.check()
        assert await outcome(disk.snapshot.preadv(SIZE, IoVec.of(bytearray(1)))) == errno.EIO

    with_disk(scenario)


async def becomes(node: ArrayNode, content: bytes) -> None:
    """Somebody else has made it so."""
    node.data[:] = content
    await has_become(node, len(content))


def test_snapshot_of_a_disk_that_is_cut_behind_our_back_is_lost_and_shows_nothing_else_instead(
    expect_log: ExpectedLog,
) -> None:
    expect_log.expect("the snapshot is lost: 'disk' has become 66048 bytes long")

    async def scenario(disk: Disk) -> None:
        cut = CLUSTER + 512
        await disk.guest.pwritev(8 * CLUSTER, IoVec.of(b"a cluster that was kept"))
        await becomes(disk.file, disk.before[:cut])
        assert disk.guest.length == cut
        assert await outcome(disk.snapshot.preadv(2 * CLUSTER, IoVec.of(bytearray(1)))) != 0
        # Its last cluster could not be copied any more: that is no reason for the guest to fail.
        await disk.guest.pwritev(CLUSTER, IoVec.of(b"x" * 512))
        await becomes(disk.file, bytes(disk.file.data) + bytes(SIZE - cut))
        await disk.guest.pwritev(3 * CLUSTER, IoVec.of(b"y" * 512))
        for offset in (0, 2 * CLUSTER, 3 * CLUSTER, SIZE - 512):
            read = disk.snapshot.preadv(offset, IoVec.of(bytearray(512)))
            assert await outcome(read) == errno.EACCES

    with_disk(scenario)


def test_snapshot_that_has_all_that_is_cut_behind_our_back_is_kept() -> None:
    async def scenario(disk: Disk) -> None:
        await disk.guest.pwrite_zeroes(CLUSTER, SIZE - CLUSTER, True)
        await becomes(disk.file, bytes(disk.file.data[:CLUSTER]))
        await disk.check()
        await disk.guest.pwritev(0, IoVec.of(b"z" * 512))
        await disk.check()

    with_disk(scenario)


def test_copy_that_a_cut_made_fail_is_not_the_guests_affair(expect_log: ExpectedLog) -> None:
    expect_log.expect("the snapshot is lost: 'disk' has become")

    async def scenario(disk: Disk) -> None:
        reads, go_on = asyncio.Event(), asyncio.Event()

        def fails(kind: str, offset: int, length: int) -> None:
            if kind == "read":
                raise BlockError(errno.EIO)

        async def until_cut() -> None:
            reads.set()
            await go_on.wait()

        disk.file.pause, disk.file.fail = until_cut, fails
        write = asyncio.ensure_future(disk.guest.pwritev(0, IoVec.of(b"z" * 512)))
        await reads.wait()
        cut = asyncio.ensure_future(becomes(disk.file, disk.before[:4096]))
        await turns(5)
        go_on.set()
        await asyncio.gather(write, cut)
        assert disk.file.data[:512] == b"z" * 512

    with_disk(scenario)


def test_writes_that_change_nothing_copy_nothing() -> None:
    async def scenario(disk: Disk) -> None:
        same = IoVec.of(disk.before[:512])
        await disk.guest.pwritev(0, same, int(Req.WRITE_UNCHANGED))
        assert not disk.target.asked.calls

    with_disk(scenario)


def test_write_waits_for_a_read_of_the_snapshot_that_is_at_the_same_cluster() -> None:
    async def scenario(disk: Disk) -> None:
        go_on = asyncio.Event()

        async def pause() -> None:
            if disk.file.asked.calls[-1] == ("read", 100, 50, 0):
                await go_on.wait()

        disk.file.pause = pause
        reading = asyncio.create_task(disk.old(100, 50))
        await turns(3)
        same = asyncio.create_task(disk.guest.pwritev(CLUSTER - 1, IoVec.of(b"x")))
        other = asyncio.create_task(disk.guest.pwritev(CLUSTER, IoVec.of(b"x")))
        await turns(20)
        assert (same.done(), other.done()) == (False, True)
        go_on.set()
        assert await reading == disk.before[100:150]
        await same

    with_disk(scenario)


def test_reader_of_an_overlay_of_the_disk_never_sees_a_new_byte() -> None:
    """At every point where the write may overtake it (what a fleecing client does)."""

    for delay in range(16):

        async def scenario(disk: Disk, delay: int = delay) -> None:
            disk.file.pause = disk.target.pause = lambda: turns(2)
            client = BlockBackend(disk.target, "client", writable=False, shared=Perm.ALL)
            buffer = bytearray(CLUSTER)
            reading = asyncio.create_task(client.preadv(0, IoVec.of(buffer)))
            await turns(delay)
            await disk.guest.pwritev(0, IoVec.of(b"n" * CLUSTER))
            await reading
            assert difference(buffer, disk.before[:CLUSTER]) is None
            await client.close()

        with_disk(scenario, target="overlay")


# ---------------------------------------------------------------- errors


def test_write_fails_with_the_error_of_the_target_and_the_snapshot_is_kept() -> None:
    async def scenario(disk: Disk) -> None:
        break_target(disk, errno.ENOSPC)
        for request in (
            disk.guest.pwritev(0, IoVec.of(b"new")),
            disk.guest.pwrite_zeroes(0, 512),
            disk.guest.pdiscard(0, CLUSTER),
        ):
            assert await outcome(request) == errno.ENOSPC
        assert difference(disk.file.data, disk.before) is None
        await disk.check()
        disk.target.fail = None
        await disk.guest.pwritev(0, IoVec.of(b"new"))
        assert disk.file.data[:3] == b"new"
        await disk.check()

    with_disk(scenario)


def test_snapshot_is_lost_for_good_where_the_guest_comes_first(expect_log: ExpectedLog) -> None:
    expect_log.expect("the snapshot is lost")

    async def scenario(disk: Disk) -> None:
        break_target(disk, errno.ENOSPC)
        go_on = asyncio.Event()
        disk.file.pause = go_on.wait
        reading = asyncio.create_task(outcome(disk.old(0, CLUSTER)))
        await turns(3)
        disk.file.pause = None
        await disk.guest.pwritev(0, IoVec.of(b"new"))
        go_on.set()
        # Also for those who were reading already: the bytes may be new ones.
        assert await reading == errno.EACCES
        disk.target.fail = None
        await disk.guest.pwritev(CLUSTER, IoVec.of(b"new"))
        assert disk.target.asked.count("write") == 1
        for request in (
            disk.old(8 * CLUSTER, 512),
            block_status(disk.snapshot.node, 0, 512),
            disk.snapshot.pdiscard(0, CLUSTER),
        ):
            assert await outcome(request) == errno.EACCES

    with_disk(scenario, {"on-cbw-error": "break-snapshot"})


@pytest.mark.parametrize("mode", ["break-guest-write", "break-snapshot"])
def test_copy_that_takes_too_long_counts_as_failed(mode: str, expect_log: ExpectedLog) -> None:
    if mode == "break-snapshot":
        expect_log.expect("the snapshot is lost: cbw: copy takes more than")

    async def scenario(disk: Disk) -> None:
        disk.filter.options = replace(disk.filter.options, cbw_timeout=0.02)  # type: ignore[arg-type]
        go_on = asyncio.Event()
        disk.target.pause = go_on.wait
        result = await outcome(disk.guest.pwritev(0, IoVec.of(b"n" * 3 * CLUSTER)))
        assert result == (errno.ETIMEDOUT if mode == "break-guest-write" else 0)
        # What was begun goes on, and a drain waits for it; nothing more is begun.
        drain = asyncio.create_task(disk.guest.drain())
        await turns(10)
        assert not drain.done()
        go_on.set()
        await drain
        if mode == "break-guest-write":
            await disk.check()
            await disk.guest.pwritev(0, IoVec.of(b"new"))
            await disk.check()

    with_disk(scenario, {"on-cbw-error": mode, "cbw-timeout": 1})


def test_cancelled_copy_leaves_its_clusters_to_the_next_who_wants_them() -> None:
    async def scenario(disk: Disk) -> None:
        disk.target.pause = asyncio.Event().wait
        first = asyncio.create_task(disk.guest.pwritev(0, IoVec.of(b"first")))
        second = asyncio.create_task(disk.guest.pwritev(10, IoVec.of(b"second")))
        await turns(5)
        disk.target.pause = None
        first.cancel()
        await second
        assert first.cancelled()
        assert disk.file.data[:16] == disk.before[:10] + b"second"
        await disk.check()

    with_disk(scenario)


# ---------------------------------------------------------------- who may what


def test_nobody_writes_past_the_filter_while_it_has_users() -> None:
    async def scenario(disk: Disk) -> None:
        with pytest.raises(ConfigError, match="node 'cbw' as 'file' does not share"):
            BlockBackend(disk.file, "other", writable=True, shared=Perm.ALL)
        BlockBackend(disk.file, "reader", writable=False, shared=Perm.ALL)
        with pytest.raises(ConfigError, match="node 'cbw' as 'target' does not share"):
            BlockBackend(disk.target, "other", writable=False, resize=True, shared=Perm.ALL)
        before = disk.filter.parents
        with pytest.raises(ConfigError, match="does not share"):
            await surgery.drop_filter(disk.graph, disk.filter)
        assert disk.filter.parents == before
        assert disk.guest.node is disk.filter
        # What is put above it for the guest is not put between it and the snapshot.
        pass_on = await surgery.insert_filter(disk.graph, disk.filter, {"driver": "blkdebug"})
        assert disk.guest.node is pass_on
        assert disk.snapshot.node.children["file"].node is disk.filter

    with pytest.raises(Exception, match="in use"):
        with_disk(scenario)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"file": "disk"}, "Parameter 'target' is missing"),
        ({"file": "disk", "target": "disk"}, "has the same storage as 'disk'"),
        ({"file": "disk", "target": {"driver": "raw", "file": "disk"}}, "the same storage"),
        ({"file": {"driver": "raw", "file": "disk"}, "target": "disk"}, "the same storage"),
        ({"file": "disk", "target": {"driver": "memory", "size": 4096}}, "has 4096 bytes, 'disk'"),
        ({"file": "disk", "target": "ro"}, "'ro' is read-only"),
        ({"min-cluster-size": 3000}, "'min-cluster-size': 3000 is not a power of two"),
        ({"on-cbw-error": "report"}, "break-guest-write, break-snapshot"),
        ({"bitmap": {"node": "disk", "name": "b"}}, "does not support the option 'bitmap"),
    ],
)
def test_what_makes_no_sense_is_named(options: dict[str, Any], message: str) -> None:
    async def run() -> None:
        graph = BlockGraph({**DRIVERS, "plain": Plain})
        await graph.add("plain,node-name=disk")
        await graph.add("plain,node-name=ro,read-only=on")
        with pytest.raises(ConfigError, match=message):
            await graph.add({"driver": "copy-before-write", **options})
        with pytest.raises(ConfigError, match=r"node 'disk' \(plain\) provides no snapshot"):
            await graph.add("snapshot-access,file=disk")
        assert list(graph.nodes) == ["disk", "ro"]
        assert not any(node.parents for node in graph.nodes.values())
        await graph.close_all()

    asyncio.run(run())


def test_what_a_backup_discards_is_neither_kept_nor_copied_any_more() -> None:
    async def scenario(disk: Disk) -> None:
        await disk.guest.pwritev(0, IoVec.of(b"new"))
        assert disk.snapshot.can_discard
        # Whole clusters only, except at the end.
        await disk.snapshot.pdiscard(100, 2 * CLUSTER)
        await disk.check(0, CLUSTER)
        await disk.snapshot.pdiscard(0, 2 * CLUSTER)
        await disk.snapshot.pdiscard(10 * CLUSTER, 1536)
        assert disk.target.asked.of("discard") == [(0, CLUSTER)]
        for offset in (0, CLUSTER, 10 * CLUSTER):
            assert await outcome(disk.old(offset, 512)) == errno.EACCES
        copied = disk.target.asked.count("write")
        await disk.guest.pwritev(0, IoVec.of(b"x" * 2 * CLUSTER))
        await disk.guest.pwritev(10 * CLUSTER, IoVec.of(b"x"))
        assert disk.target.asked.count("write") == copied
        await disk.check(2 * CLUSTER, 8 * CLUSTER)
        assert await outcome(disk.snapshot.pwritev(0, IoVec.of(b"x"))) == errno.ENOTSUP

    with_disk(scenario)


def test_flush_is_of_the_disk_and_its_size_is_the_disks() -> None:
    async def scenario(disk: Disk) -> None:
        await disk.guest.pwritev(0, IoVec.of(b"new"))
        await disk.guest.flush()
        assert disk.file.asked.count("flush") == 1
        assert not disk.target.asked.count("flush-os")

    with_disk(scenario)


def test_disk_is_not_handed_over_while_its_snapshot_would_be_lost_elsewhere(
    expect_log: ExpectedLog,
) -> None:
    expect_log.expect("the snapshot is lost")

    async def scenario(disk: Disk) -> None:
        with pytest.raises(ConfigError, match="Node 'cbw' keeps a snapshot") as caught:
            await inactivate(disk.graph)
        assert caught.value.errno == errno.EBUSY
        await disk.check()
        await disk.guest.pwritev(0, IoVec.of(b"still ours"))
        break_target(disk, errno.EIO)
        await disk.guest.pwritev(CLUSTER, IoVec.of(b"x"))
        await inactivate(disk.graph)
        other = BlockBackend(disk.file, "reader", writable=False, shared=Perm.ALL)
        assert disk.target.parents[0].perm == Perm.NONE
        await other.close()
        await activate(disk.graph)
        await disk.guest.pwritev(CLUSTER, IoVec.of(b"ours again"))

    with_disk(scenario, {"on-cbw-error": "break-snapshot"})


# ---------------------------------------------------------------- coming and going


def test_what_is_copied_may_be_written_by_extents_and_the_rest_only_read() -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        node = await graph.add("memory,node-name=disk,size=1M")
        guest = BlockBackend(node, "guest", writable=True)
        revoked: list[tuple[int, int]] = []

        async def revoke(offset: int, length: int) -> None:
            revoked.append((offset, length))

        async def rights() -> list[tuple[int, int, bool]]:
            return [
                (
                    extent.offset // CLUSTER,
                    extent.end // CLUSTER,
                    bool(extent.flags & ExtentFlag.WRITE),
                )
                for extent in await guest.extents(0, 1 << 20)
            ]

        guest.attach(revoke=revoke)
        assert await rights() == [(0, 16, True)]
        target = {"driver": "memory", "size": "1M", "discard": "unmap"}
        options = {"driver": "copy-before-write", "node-name": "cbw", "target": target}
        cbw = await surgery.insert_filter(graph, node, options)
        assert revoked
        assert await rights() == [(0, 16, False)]
        await guest.pwritev(3 * CLUSTER, IoVec.of(b"x" * (CLUSTER + 1)))
        assert await rights() == [(0, 3, False), (3, 5, True), (5, 16, False)]
        assert guest.flush_target() is FlushTarget.NOTHING  # a RAM disk's
        revoked.clear()
        await guest.pwritev(6 * CLUSTER, IoVec.of(b"x"))
        assert not revoked
        await surgery.drop_filter(graph, cbw)
        assert revoked
        assert await rights() == [(0, 16, True)]
        assert list(graph.nodes) == ["disk"]
        await guest.close()
        await graph.close_all()

    asyncio.run(scenario())


def test_extents_are_not_for_writing_while_the_snapshot_is_read_from_the_disk() -> None:
    """The cluster has been copied meanwhile, but who reads has been sent to the disk before."""

    async def scenario(disk: Disk) -> None:
        async def whole(offset: int, length: int) -> HostExtent:
            return HostExtent(0, SIZE, 7, 0, ExtentFlag.READ | ExtentFlag.WRITE)

        async def may_write() -> bool:
            return bool((await disk.guest.extents(0, 512))[0].flags & ExtentFlag.WRITE)

        disk.file.host_extent = whole  # type: ignore[method-assign]
        go_on = asyncio.Event()
        disk.file.pause = go_on.wait
        reading = asyncio.create_task(disk.check(0, 512))
        await turns(3)
        disk.file.pause = None
        writing = asyncio.create_task(disk.guest.pwritev(0, IoVec.of(b"new")))
        await turns(10)
        assert disk.filter._copy.is_copied(0, 1)
        assert not await may_write()
        go_on.set()
        await asyncio.gather(reading, writing)
        assert await may_write()

    with_disk(scenario)


def test_snapshots_taken_and_dropped_under_load_are_of_the_moment_they_were_taken() -> None:
    choice = random.Random(24)

    async def scenario() -> None:
        graph = BlockGraph({**DRIVERS, "plain": Plain})
        node = await graph.add("plain,node-name=disk")
        assert isinstance(node, ArrayNode)
        node.pause = lambda: turns(choice.randrange(3))
        guest = BlockBackend(node, "guest", writable=True)
        stopping = False

        async def load() -> None:
            while not stopping:
                offset = choice.randrange(SIZE - 9000)
                await guest.pwritev(offset, IoVec.of(choice.randbytes(choice.randrange(1, 9000))))

        tasks = [asyncio.create_task(load()) for _ in range(6)]
        for _ in range(10):
            await turns(choice.randrange(30))
            options = {"driver": "copy-before-write", "node-name": "cbw"}
            target = {"driver": "memory", "size": SIZE}
            cbw = await surgery.insert_filter(graph, node, {**options, "target": target})
            moment = bytes(node.data)  # nothing has run since
            old = await graph.add("snapshot-access,node-name=old,file=cbw")
            backup = BlockBackend(old, "backup", writable=False)
            buffer = bytearray(SIZE)
            for offset in range(0, SIZE, 3 * 512):
                part = memoryview(buffer)[offset : offset + 3 * 512]
                await backup.preadv(offset, IoVec.of(part))
            assert difference(buffer, moment) is None
            assert difference(node.data, moment) is not None
            await backup.close()
            await graph.remove("old")
            await surgery.drop_filter(graph, cbw)
            assert list(graph.nodes) == ["disk"]
        stopping = True
        await asyncio.gather(*tasks)
        await guest.close()
        await graph.close_all()

    asyncio.run(scenario())
