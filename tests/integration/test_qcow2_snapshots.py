"""Internal snapshots (row B36): ours QEMU shows, QEMU's we show, and the disk is right at any time."""

from __future__ import annotations

import asyncio
import errno
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_qcow2_writing import Guest
from tests.qcow2_images import MIB, check, contents, create, qemu_img, qemu_io, read, scribble
from tests.requirements import require
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.drivers.qcow2.header import Header
from vhostblk.block.filters.filter import FilterNode
from vhostblk.block.graph import BlockGraph
from vhostblk.block.image_info import query_image_info
from vhostblk.block.internal_snapshot import (
    SnapshotInfo,
    create_snapshot,
    delete_snapshot,
    go_to_snapshot,
    list_snapshots,
    load_snapshot,
)
from vhostblk.block.iov import IoVec
from vhostblk.block.keyval import parse_options
from vhostblk.block.length import resize
from vhostblk.block.node import BlockNode
from vhostblk.block.op_blockers import OpType, Reason
from vhostblk.block.opening import open_image
from vhostblk.block.permissions import Perm
from vhostblk.daemon import Daemon, DaemonConfig
from vhostblk.errors import BlockError, ConfigError
from vhostblk.export.options import parse_export
from vhostblk.testing.daemon_process import VHOSTBLK
from vhostblk.testing.plugin import ExpectedLog

SIZE = 3 * MIB
SHAPES = {
    "usual": "",
    "tiny clusters": "cluster_size=512",
    "subclusters": "extended_l2=on,cluster_size=16k",
    "64 bit counts, tiny clusters": "refcount_bits=64,cluster_size=512",
    "8 bit counts": "refcount_bits=8,cluster_size=4k",
    "version 2": "compat=0.10,cluster_size=4k",
}


@pytest.fixture(autouse=True)
def _tools() -> None:
    require("qemu-img")
    require("qemu-io")


@asynccontextmanager
async def opened(image: Path, **options: Any) -> AsyncIterator[tuple[BlockGraph, BlockNode]]:
    graph = BlockGraph(DRIVERS)
    try:
        yield graph, await open_image(graph, str(image), options)
    finally:
        await graph.close_all()


def run(
    image: Path, scenario: Callable[[BlockGraph, BlockNode], Awaitable[None]], **options: Any
) -> None:
    async def everything() -> None:
        async with opened(image, **options) as (graph, node):
            try:
                await scenario(graph, node)
            finally:
                for edge in tuple(node.parents):
                    if isinstance(edge.parent, BlockBackend):
                        await edge.parent.close()

    asyncio.run(everything())


def shown_by_qemu(image: Path, id_: str, folder: Path) -> bytes:
    qemu_img("convert", "-l", f"snapshot.id={id_}", "-O", "raw", image, folder / "shown")
    return (folder / "shown").read_bytes()


async def shown_by_us(image: Path, id_: str) -> bytes:
    async with opened(image, **{"read-only": True}) as (graph, node):
        info = await load_snapshot(graph, node, id_)
        backend = BlockBackend(node, "the test", writable=False)
        try:
            return await read(backend, 0, info.disk_size)
        finally:
            await backend.close()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["alone", "overlay", "compressed"])
def test_create_revert_and_delete_keep_every_byte_of_disk_and_snapshots(
    tmp_path: Path, shape: str, how: str
) -> None:
    if how == "compressed" and ("tiny" in shape or "8 bit" in shape):
        pytest.skip("slow; or more clusters in a cluster than a count can say")
    image = tmp_path / "i.qcow2"
    words: list[object] = ["-o", SHAPES[shape]] if SHAPES[shape] else []
    if how == "overlay":
        (tmp_path / "base").write_bytes(random.Random(1).randbytes(2 * MIB))
        words += ["-b", "base", "-F", "raw"]
    if how == "compressed":
        raw = tmp_path / "raw0"
        raw.write_bytes(b"".join(bytes([n % 251]) * 700 for n in range(SIZE // 700 + 1))[:SIZE])
        qemu_img("convert", "-c", "-O", "qcow2", *words, raw, image)
    else:
        create(image, SIZE, *words)
        scribble(image, SIZE, 5, times=15)
    model: dict[str, bytes] = {}
    rnd = random.Random(len(shape) * 7 + len(how))
    last: list[bytes] = []

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        backend = BlockBackend(node, "the guest", writable=True, resize=True)
        guest = Guest(backend, contents_before, len(shape))
        for step in range(16):
            kind = rnd.choice("wwccdg")
            if kind == "w":
                await guest.run(10, depth=3)
            elif kind == "c" or not model:
                made = await create_snapshot(graph, node, f"step {step}")
                model[made.id] = bytes(guest.model)
            elif kind == "d":
                id_ = rnd.choice(list(model))
                await delete_snapshot(graph, node, id_)
                del model[id_]
            else:
                id_ = rnd.choice(list(model))
                await go_to_snapshot(graph, node, id_)
                guest.model[:] = model[id_]
                assert await read(backend, 0, SIZE) == guest.model
        last.append(bytes(guest.model))
        assert [one.id for one in await list_snapshots(node)] == list(model)
        await backend.close()

    contents_before = contents(image, tmp_path)
    run(image, scenario, discard="unmap")
    assert check(image) == ""
    assert contents(image, tmp_path) == last[0]
    for id_, content in model.items():
        assert shown_by_qemu(image, id_, tmp_path) == content
        assert asyncio.run(shown_by_us(image, id_)) == content


def test_snapshots_of_qemu_are_listed_applied_and_deleted_and_ours_by_qemu(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", SIZE)
    qemu_io(image, "write -P 1 0 1M")
    qemu_img("snapshot", "-c", "one", image)
    qemu_io(image, "write -P 2 512k 1M")
    qemu_img("snapshot", "-c", "two", image)
    qemu_io(image, "write -P 3 0 3M")
    told = json.loads(qemu_img("info", "--output=json", image))["snapshots"]

    async def ours(graph: BlockGraph, node: BlockNode) -> None:
        found = await list_snapshots(node)
        assert [
            (one.id, one.name, one.seconds, one.nanoseconds, one.vm_state_size) for one in found
        ] == [
            (one["id"], one["name"], one["date-sec"], one["date-nsec"], one["vm-state-size"])
            for one in told
        ]
        assert {one.disk_size for one in found} == {SIZE}
        assert (await query_image_info(node)).to_qmp()["snapshots"] == told
        await go_to_snapshot(graph, node, "one")
        made = await create_snapshot(graph, node, "three", date=1234567890_000000005)
        assert made == SnapshotInfo("3", "three", 1234567890, 5, disk_size=SIZE)
        deleted = await delete_snapshot(graph, node, name="one")
        assert deleted.id == "1"

    run(image, ours)
    assert check(image) == ""
    told = json.loads(qemu_img("info", "--output=json", image))["snapshots"]
    assert [(one["id"], one["name"]) for one in told] == [("2", "two"), ("3", "three")]
    assert (told[1]["date-sec"], told[1]["date-nsec"]) == (1234567890, 5)
    qemu_io(image, "read -P 1 0 1M", "read -P 0 1M 2M", "write -P 9 0 3M")
    qemu_img("snapshot", "-a", "two", image)
    qemu_io(image, "read -P 1 0 512k", "read -P 2 512k 1M")
    qemu_img("snapshot", "-d", "two", image)
    qemu_img("snapshot", "-a", "3", image)
    qemu_io(image, "read -P 1 0 1M", "read -P 0 1M 2M")
    qemu_img("snapshot", "-d", "three", image)
    assert check(image) == ""


def test_disk_is_as_long_as_it_was_when_the_snapshot_was_made(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", SIZE, "-o", "cluster_size=512")
    qemu_io(image, "write -P 1 0 3M")

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        backend = BlockBackend(node, "the guest", writable=True, shared=Perm.ALL)
        await create_snapshot(graph, node, "short")
        await resize(graph, backend, node, 5 * MIB)
        await backend.pwritev(4 * MIB, IoVec.of(b"\x02" * MIB))
        await create_snapshot(graph, node, "long")
        await go_to_snapshot(graph, node, "short")
        assert node.length == backend.node.length == SIZE
        assert [one.disk_size for one in await list_snapshots(node)] == [SIZE, 5 * MIB]
        await go_to_snapshot(graph, node, "long")
        assert node.length == 5 * MIB
        assert await read(backend, 4 * MIB, MIB) == b"\x02" * MIB
        await go_to_snapshot(graph, node, "short")
        await backend.close()

    run(image, scenario)
    assert check(image) == ""
    assert contents(image, tmp_path) == b"\x01" * SIZE
    assert asyncio.run(shown_by_us(image, "2")) == b"\x01" * SIZE + bytes(MIB) + b"\x02" * MIB


def refused(work: Awaitable[Any]) -> Awaitable[int]:
    async def caught() -> int:
        with pytest.raises(ConfigError) as error:
            await work
        return error.value.errno

    return caught()


def test_what_cannot_be_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", MIB)
    qemu_img("snapshot", "-c", "there", image)
    before = image.read_bytes()

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        assert await refused(create_snapshot(graph, node, "again", "1")) == errno.EEXIST
        assert await refused(create_snapshot(graph, node, "n" * 256)) == errno.EINVAL
        assert await refused(create_snapshot(graph, node, "n", "i" * 128)) == errno.EINVAL
        assert await refused(delete_snapshot(graph, node, "2")) == errno.ENOENT
        assert await refused(delete_snapshot(graph, node, "1", "other")) == errno.ENOENT
        assert await refused(delete_snapshot(graph, node)) == errno.EINVAL
        assert await refused(go_to_snapshot(graph, node, "other")) == errno.ENOENT
        assert await refused(load_snapshot(graph, node, "1")) == errno.EINVAL  # not read-only
        reason = Reason("a job is at it")
        node.op_blockers.block(reason, [OpType.INTERNAL_SNAPSHOT_DELETE])
        assert await refused(delete_snapshot(graph, node, "1")) == errno.EBUSY
        node.op_blockers.unblock(reason, [OpType.INTERNAL_SNAPSHOT_DELETE])
        null = await graph.add("null-co,node-name=n,size=1M")
        assert await refused(create_snapshot(graph, null, "x")) == errno.ENOTSUP

    run(image, scenario)

    async def read_only(graph: BlockGraph, node: BlockNode) -> None:
        assert await refused(create_snapshot(graph, node, "x")) == errno.EPERM
        assert await refused(load_snapshot(graph, node, name="x")) == errno.ENOENT
        assert (await load_snapshot(graph, node, name="there")).id == "1"

    run(image, read_only, **{"read-only": True})
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    ("shape", "number"),
    [("refcount_bits=1", errno.EINVAL), ("data_file=data,data_file_raw=off", errno.ENOTSUP)],
)
def test_images_that_cannot_have_snapshots_say_so(
    tmp_path: Path, shape: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image = create(tmp_path / "i.qcow2", MIB, "-o", shape)
    qemu_io(image, "write -P 1 0 1M")

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        assert await refused(create_snapshot(graph, node, "x")) == number

    run(image, scenario)
    assert check(image) == ""
    assert contents(image, tmp_path) == b"\x01" * MIB


def test_filters_and_raw_nodes_pass_snapshots_on(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", MIB)

    async def scenario() -> None:
        graph = BlockGraph(DRIVERS)
        image_ = (
            f"file.image.driver=qcow2,file.image.file.driver=file,file.image.file.filename={image}"
        )
        node = await graph.add(f"raw,file.driver=blkdebug,{image_}")
        backend = BlockBackend(node, "the guest", writable=True)
        await backend.pwritev(0, IoVec.of(b"\x01" * MIB))
        await create_snapshot(graph, node, "one")
        await backend.pwritev(0, IoVec.of(b"\x02" * MIB))
        await go_to_snapshot(graph, node, "one")
        assert await read(backend, 0, MIB) == b"\x01" * MIB
        assert [one.name for one in await list_snapshots(node)] == ["one"]
        await backend.close()
        await graph.close_all()

    asyncio.run(scenario())
    assert check(image) == ""


def test_saved_state_of_a_guest_stays_with_its_snapshot(tmp_path: Path) -> None:
    """QEMU has saved 1 MiB behind the end of the disk; nothing that we do with other snapshots loses it."""
    image = create(tmp_path / "i.qcow2", SIZE)
    qemu_io(image, "write -P 1 0 1M")
    qemu_img("snapshot", "-c", "with state", image)
    # As `savevm` leaves it: the size in the entry, the data behind the disk.
    data = bytearray(image.read_bytes())
    header = Header.parse(bytes(data[:65536]))
    place = header.snapshots_offset
    data[place + 32 : place + 36] = (MIB).to_bytes(4)
    data[place + 40 : place + 48] = (MIB).to_bytes(8)
    image.write_bytes(data)

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        await create_snapshot(graph, node, "other")
        assert [one.vm_state_size for one in await list_snapshots(node)] == [MIB, 0]
        await delete_snapshot(graph, node, name="other")

    run(image, scenario)
    (told,) = json.loads(qemu_img("info", "--output=json", image))["snapshots"]
    assert told["vm-state-size"] == MIB
    assert check(image) == ""


# ---------------------------------------------------------------------- failures


class FailingNode(FilterNode):
    """After so many requests, one fails (or all do)."""

    driver_name = "failing"
    left = 1 << 30
    forever = False

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0 or (self.forever and self.left < 0):
            raise BlockError(errno.EIO, "no")

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        self._count()
        await self.file.preadv(offset, iov)

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        self._count()
        await self.file.pwritev(offset, iov, flags)

    async def driver_flush_to_disk(self) -> None:
        self._count()


@pytest.mark.parametrize("what", ["create", "delete", "go to"])
def test_any_request_that_fails_leaves_the_image_as_it_was_or_as_it_is_going_to_be(
    tmp_path: Path, what: str, expect_log: ExpectedLog
) -> None:
    expect_log.allow("open the image anew")
    base = create(tmp_path / "base.qcow2", MIB, "-o", "cluster_size=4k")
    qemu_io(base, "write -P 1 0 300k")
    qemu_img("snapshot", "-c", "old", base)
    qemu_io(base, "write -P 2 100k 300k")
    contents_of = {"old": shown_by_qemu(base, "1", tmp_path), "now": contents(base, tmp_path)}
    image = tmp_path / "i.qcow2"
    outcomes = set()

    async def attempt(number: int) -> bool:
        graph = BlockGraph({**DRIVERS, "failing": FailingNode})
        file = f"file.driver=failing,file.file.driver=file,file.file.filename={image}"
        node = await graph.add(f"qcow2,{file}")
        failing = node.children["file"].node
        assert isinstance(failing, FailingNode)
        failing.left, failing.forever = number, False
        try:
            if what == "create":
                await create_snapshot(graph, node, "new")
            elif what == "delete":
                await delete_snapshot(graph, node, "1")
            else:
                await go_to_snapshot(graph, node, "1")
        except ConfigError:
            return False
        else:
            return failing.left > 0
        finally:
            failing.left = 1 << 30
            await graph.close_all()

    for number in range(1, 200):
        image.write_bytes(base.read_bytes())
        done = asyncio.run(attempt(number))
        assert check(image) == ""
        names = [
            one["name"]
            for one in json.loads(qemu_img("info", "--output=json", image)).get("snapshots", [])
        ]
        now = contents(image, tmp_path)
        changed = {
            "create": "new" in names,
            "delete": "old" not in names,
            "go to": now == contents_of["old"],
        }
        assert now == contents_of["old" if what == "go to" and changed[what] else "now"]
        for id_, name in enumerate(names, 1):
            expected = contents_of["old" if name == "old" else "now"]
            assert shown_by_qemu(image, str(id_), tmp_path) == expected
        outcomes.add(changed[what])
        if done:
            break
    assert done
    assert outcomes == {False, True}


# ---------------------------------------------------------------------- under load


def test_every_byte_is_right_while_snapshots_come_and_go_under_the_engine(
    socket_directory: Path, tmp_path: Path
) -> None:
    image = create(tmp_path / "i.qcow2", 32 * MIB)
    done = asyncio.run(_under_load(image, socket_directory / "s"))
    assert done >= 10
    assert check(image) == ""


async def _under_load(image: Path, socket: Path) -> int:
    ready = asyncio.Event()
    node = f"qcow2,node-name=d,discard=unmap,file.driver=file,file.filename={image}"
    export = f"vhost-user-blk,id=e,node-name=d,writable=on,num-queues=2,addr.type=unix,addr.path={socket}"
    config = DaemonConfig(
        blockdevs=[parse_options(node, "driver")],
        exports=[parse_export(parse_options(export, "type"))],
        data_path="native",
    )
    daemon = Daemon(config, ready.set)
    running = asyncio.create_task(daemon.run())
    await asyncio.wait([running, asyncio.create_task(ready.wait())], return_when="FIRST_COMPLETED")
    rnd, changes = random.Random(2), 0
    try:
        disk = daemon.graph.find("d")
        bench = await asyncio.create_subprocess_exec(
            *(*VHOSTBLK, "bench", str(socket), "--verify", "--queues", "2", "--depth", "8"),
            *("--size", str(4 * MIB), "--requests", "1500", "--block-size", "512-64k"),
            *("--pattern", "read=45,write=45,flush=1,discard=4,write-zeroes=5"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output = asyncio.create_task(bench.communicate())
        while not output.done():
            there = await list_snapshots(disk)
            if len(there) > 3 or (there and rnd.random() < 0.4):
                await delete_snapshot(daemon.graph, disk, rnd.choice(there).id)
            else:
                await create_snapshot(daemon.graph, disk, "s")
            changes += 1
            wanted = daemon.exports["e"].statistics().requests + 30
            for _ in range(50):
                await asyncio.sleep(0.001)
                if daemon.exports["e"].statistics().requests >= wanted:
                    break
        _, error = await output
        assert bench.returncode == 0, error.decode()
        assert daemon.exports["e"].statistics().hits > 0
    finally:
        daemon.stop()
        await running
    return changes
