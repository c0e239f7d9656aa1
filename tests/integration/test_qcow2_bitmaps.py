"""Dirty bitmaps that an image keeps (row B29.15): ours QEMU reads, QEMU's we read; none is believed that is wrong."""

from __future__ import annotations

import asyncio
import errno
import json
import random
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import eventually
from tests.integration.test_qcow2_snapshots import FailingNode, opened, refused
from tests.qcow2_images import MIB, check, contents, create, qemu_img, qemu_io, read
from tests.requirements import require
from vhostblk.block.activation import activate, inactivate
from vhostblk.block.backend import BlockBackend
from vhostblk.block.dirty_bitmap import (
    add_bitmap,
    find_bitmap,
    merge_bitmaps,
    query_bitmaps,
    remove_bitmap,
)
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.drivers.qcow2.header import AutoClear, Header
from vhostblk.block.graph import BlockGraph
from vhostblk.block.internal_snapshot import create_snapshot, delete_snapshot, go_to_snapshot
from vhostblk.block.iov import IoVec
from vhostblk.block.keyval import parse_options
from vhostblk.block.node import BlockNode
from vhostblk.block.node_info import block_device_info
from vhostblk.block.reopen import reopen
from vhostblk.client.client import Client
from vhostblk.daemon import Daemon, DaemonConfig
from vhostblk.errors import BlockError, ConfigError
from vhostblk.export.options import parse_export
from vhostblk.testing.daemon_process import is_listening
from vhostblk.testing.plugin import ExpectedLog

SIZE = 8 * MIB
SHAPES = {
    "usual": "",
    "tiny clusters": "cluster_size=512",
    "small clusters": "cluster_size=4k",
    "external data file": "data_file=data,data_file_raw=off",
}
Scenario = Callable[[BlockGraph, BlockNode], Awaitable[None]]


@pytest.fixture(autouse=True)
def _tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require("qemu-img")
    require("qemu-io")
    monkeypatch.chdir(tmp_path)


def run(image: Path, scenario: Scenario, **options: Any) -> None:
    async def everything() -> None:
        async with opened(image, **options) as (graph, node):
            await scenario(graph, node)

    asyncio.run(everything())


def with_disk(
    image: Path, scenario: Callable[[BlockGraph, BlockNode, BlockBackend], Awaitable[None]]
) -> None:
    async def inner(graph: BlockGraph, node: BlockNode) -> None:
        backend = BlockBackend(node, "the guest", writable=True, resize=True)
        try:
            await scenario(graph, node, backend)
        finally:
            await backend.close()

    run(image, inner)


def told(image: Path) -> dict[str, tuple[int, set[str]]]:
    """What QEMU says of the bitmaps: granularity and flags."""
    info = json.loads(qemu_img("info", "--output=json", image))
    bitmaps = info["format-specific"]["data"].get("bitmaps", [])
    return {one["name"]: (one["granularity"], set(one["flags"])) for one in bitmaps}


def dirty_for_qemu(image: Path, name: str, folder: Path) -> list[tuple[int, int]]:
    """What qemu-nbd shows of a bitmap."""
    require("qemu-nbd")
    sock = folder / "nbd"
    server = subprocess.Popen(
        ["qemu-nbd", "-r", "-f", "qcow2", "-B", name, "-k", str(sock), str(image)]
    )
    try:
        eventually(lambda: is_listening(sock) or server.poll() is not None, "qemu-nbd")
        opts = f"driver=nbd,server.type=unix,server.path={sock},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
        extents = json.loads(qemu_img("map", "--output=json", "--image-opts", opts))
    finally:
        server.terminate()
        server.wait()
        sock.unlink(missing_ok=True)
    found: list[tuple[int, int]] = []
    for one in extents:
        if one["data"]:
            continue  # "data": clean
        if found and found[-1][0] + found[-1][1] == one["start"]:
            found[-1] = (found[-1][0], found[-1][1] + one["length"])
        else:
            found.append((one["start"], one["length"]))
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_bitmaps_have_what_was_written_here_and_by_qemu(tmp_path: Path, shape: str) -> None:
    image = create(tmp_path / "i.qcow2", SIZE, *(["-o", SHAPES[shape]] if SHAPES[shape] else []))
    qemu_img("bitmap", "--add", "-g", "4k", image, "theirs")
    qemu_img("bitmap", "--add", "--disable", "-g", "64k", image, "off")
    qemu_io(image, "write 1M 10k")
    model = {"theirs": set(range(256, 259)), "off": set(), "ours": set()}
    rnd = random.Random(len(shape))

    async def scenario(graph: BlockGraph, node: BlockNode, disk: BlockBackend) -> None:
        assert [
            (one.name, one.count, one.granularity, one.recording) for one in query_bitmaps(node)
        ] == [
            ("off", 0, 65536, False),
            ("theirs", 3 * 4096, 4096, True),
        ]
        await add_bitmap(graph, node, "ours", 512, persistent=True)
        for _ in range(60):
            length = rnd.choice([512, 4096, 10240])
            offset = rnd.randrange(0, SIZE - length) // 512 * 512
            kind = rnd.choice("wwzd")
            if kind == "w":
                await disk.pwritev(offset, IoVec.of(bytes([rnd.randrange(256)]) * length))
            elif kind == "z":
                await disk.pwrite_zeroes(offset, length)
            else:
                await disk.pdiscard(offset, length)
            if (
                kind != "d"
            ):  # of a discard, what is smaller than a cluster is no business of the image
                model["theirs"].update(range(offset // 4096, (offset + length - 1) // 4096 + 1))
                model["ours"].update(range(offset // 512, (offset + length) // 512))
        for name, grain in (("theirs", 4096), ("ours", 512)):
            bitmap = find_bitmap(node, name)
            found = {
                at // grain
                for start, size in bitmap.ranges()
                for at in range(start, start + size, grain)
            }
            assert found >= model[name]
            model[name] = found
            assert bitmap.count() == len(found) * grain

    with_disk(image, scenario)
    assert check(image) == ""
    assert told(image) == {
        "theirs": (4096, {"auto"}),
        "off": (65536, set()),
        "ours": (512, {"auto"}),
    }
    for name, grain in (("theirs", 4096), ("ours", 512), ("off", 65536)):
        ranges = dirty_for_qemu(image, name, tmp_path)
        assert {
            at // grain for start, size in ranges for at in range(start, start + size, grain)
        } == model[name]
    qemu_io(image, "write 0 512")
    qemu_img("bitmap", "--merge", "theirs", image, "off")
    model["off"] = {at * 4096 // 65536 for at in model["theirs"] | {0}}

    async def again(graph: BlockGraph, node: BlockNode, disk: BlockBackend) -> None:
        assert find_bitmap(node, "ours").is_dirty(0)
        assert find_bitmap(node, "off").count() == 65536 * len(model["off"])
        for name in ("theirs", "off", "ours"):
            await remove_bitmap(graph, find_bitmap(node, name))

    with_disk(image, again)
    assert told(image) == {}
    assert check(image) == ""
    header = Header.parse(image.read_bytes()[:65536])
    assert not header.autoclear & AutoClear.BITMAPS


def test_bitmaps_that_are_full_take_no_room_and_large_ones_are_stored_in_pieces(
    tmp_path: Path,
) -> None:
    image = create(tmp_path / "i.qcow2", 64 * MIB, "-o", "cluster_size=512")

    async def scenario(graph: BlockGraph, node: BlockNode, disk: BlockBackend) -> None:
        full = await add_bitmap(graph, node, "full", 512, persistent=True)
        full.mark(0, node.length)
        part = await add_bitmap(graph, node, "part", 512, persistent=True, enabled=False)
        part.mark(MIB, 5 * MIB)
        part.mark(40 * MIB + 512, 512)

    before = image.stat().st_size
    with_disk(image, scenario)
    assert check(image) == ""
    assert image.stat().st_size < before + 10_000
    assert dirty_for_qemu(image, "full", tmp_path) == [(0, 64 * MIB)]
    assert dirty_for_qemu(image, "part", tmp_path) == [(MIB, 5 * MIB), (40 * MIB + 512, 512)]

    async def again(graph: BlockGraph, node: BlockNode, disk: BlockBackend) -> None:
        assert list(find_bitmap(node, "full").ranges()) == [(0, 64 * MIB)]
        assert list(find_bitmap(node, "part").ranges()) == [(MIB, 5 * MIB), (40 * MIB + 512, 512)]

    with_disk(image, again)


def test_bitmap_is_in_use_on_the_disk_before_anything_is_written_and_nobody_believes_it_after_a_crash(
    tmp_path: Path,
) -> None:
    image = create(tmp_path / "i.qcow2", SIZE)
    qemu_img("bitmap", "--add", image, "b")
    qemu_img("bitmap", "--add", "--disable", image, "other")

    async def scenario(graph: BlockGraph, node: BlockNode, disk: BlockBackend) -> None:
        (tmp_path / "crashed").write_bytes(image.read_bytes())

    with_disk(image, scenario)
    crashed = tmp_path / "crashed"
    assert {name: flags for name, (_, flags) in told(crashed).items()} == {
        "b": {"in-use", "auto"},
        "other": {"in-use"},
    }
    assert told(image)["b"][1] == {"auto"}

    async def inconsistent(graph: BlockGraph, node: BlockNode, disk: BlockBackend) -> None:
        bitmap, other = (
            find_bitmap(node, "b"),
            await add_bitmap(graph, node, "good", persistent=True),
        )
        assert [(one.inconsistent, one.recording) for one in query_bitmaps(node)] == [
            (False, True),
            *[(True, False)] * 2,
        ]
        for use in (bitmap.clear, bitmap.create_successor, lambda: merge_bitmaps(other, [bitmap])):
            with pytest.raises(ConfigError, match="inconsistent and cannot be used"):
                use()
        assert await refused(bitmap.enable()) == errno.EINVAL
        with pytest.raises(BlockError, match="inconsistent"):
            await disk.truncate(SIZE + MIB)
        assert await refused(add_bitmap(graph, node, "b")) == errno.EEXIST
        told_here = (await block_device_info(node))["dirty-bitmaps"]
        assert [(one["name"], one.get("inconsistent", False)) for one in told_here] == [
            *(("good", False), ("other", True), ("b", True)),
        ]
        await remove_bitmap(graph, bitmap)

    with_disk(crashed, inconsistent)
    assert {name: flags for name, (_, flags) in told(crashed).items()} == {
        "other": {"in-use"},
        "good": {"auto"},
    }
    assert check(crashed) == ""


def test_disk_that_grows_or_shrinks_takes_its_bitmaps_along(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", SIZE)
    qemu_img("bitmap", "--add", "-g", "512", image, "b")

    async def scenario(graph: BlockGraph, node: BlockNode, disk: BlockBackend) -> None:
        bitmap = find_bitmap(node, "b")
        await disk.pwritev(SIZE - 512, IoVec.of(b"1" * 512))
        successor = bitmap.create_successor()
        with pytest.raises(BlockError) as caught:
            await disk.truncate(4 * SIZE)
        assert caught.value.errno == errno.EBUSY
        bitmap.reclaim()
        assert successor not in node.bitmaps
        await disk.truncate(4 * SIZE)
        await disk.pwritev(3 * SIZE, IoVec.of(b"2" * 1024))
        await disk.pwritev(4 * SIZE - 512, IoVec.of(b"2" * 512))
        await disk.truncate(3 * SIZE + 512)

    with_disk(image, scenario)
    assert check(image) == ""
    assert dirty_for_qemu(image, "b", tmp_path) == [(SIZE - 512, 512), (3 * SIZE, 512)]


def test_bitmaps_stay_when_the_image_changes_hands_or_is_only_read_for_a_while(
    tmp_path: Path,
) -> None:
    image = create(tmp_path / "i.qcow2", SIZE)
    qemu_img("bitmap", "--add", image, "b")

    async def scenario() -> None:
        graph = BlockGraph(DRIVERS)
        node = await graph.add(f"qcow2,node-name=d,file.driver=file,file.filename={image}")
        disk = BlockBackend(node, "the guest", writable=True)
        await disk.pwritev(0, IoVec.of(b"1" * 65536))
        await inactivate(graph)
        assert node.bitmaps == []
        assert told(image)["b"][1] == {"auto"}
        qemu_io(image, "write 1M 64k")
        await activate(graph)
        assert list(find_bitmap(node, "b").ranges()) == [(0, 65536), (MIB, 65536)]
        await disk.pwritev(2 * MIB, IoVec.of(b"1" * 65536))
        await disk.ask(writable=False)
        await reopen(graph, {node: {"read-only": True}})
        bitmap = find_bitmap(node, "b")
        with pytest.raises(ConfigError, match="readonly"):
            bitmap.clear()
        assert await refused(remove_bitmap(graph, bitmap)) == errno.EPERM
        assert told(image)["b"][1] == {"auto"}
        await reopen(graph, {node: {"read-only": False}})
        assert json.loads(qemu_img("info", "-U", "--output=json", image))["format-specific"][
            "data"
        ]["bitmaps"][0]["flags"] == ["in-use", "auto"]
        await disk.ask(writable=True)
        await disk.pwritev(3 * MIB, IoVec.of(b"1" * 65536))
        await disk.close()
        await graph.close_all()

    asyncio.run(scenario())
    assert check(image) == ""
    assert dirty_for_qemu(image, "b", tmp_path) == [(n * MIB, 65536) for n in range(4)]


def test_snapshots_leave_bitmaps_alone_and_going_back_is_refused(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", SIZE, "-o", "cluster_size=4k")
    qemu_img("bitmap", "--add", image, "b")

    async def scenario(graph: BlockGraph, node: BlockNode, disk: BlockBackend) -> None:
        await disk.pwritev(0, IoVec.of(b"1" * MIB))
        await create_snapshot(graph, node, "s")
        await create_snapshot(graph, node, "t")
        await disk.pwritev(MIB, IoVec.of(b"1" * MIB))
        assert await refused(go_to_snapshot(graph, node, "s")) == errno.EBUSY
        await delete_snapshot(graph, node, name="s")

    with_disk(image, scenario)
    assert check(image) == ""
    assert dirty_for_qemu(image, "b", tmp_path) == [(0, 2 * MIB)]


def test_what_an_image_cannot_keep_is_refused(tmp_path: Path) -> None:
    old = create(tmp_path / "old.qcow2", SIZE, "-o", "compat=0.10")
    image = create(tmp_path / "i.qcow2", 1 << 50, "-o", "cluster_size=2M")

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        async def why(*words: Any, **options: Any) -> str:
            with pytest.raises(ConfigError) as error:
                await add_bitmap(graph, node, *words, **options)
            return str(error.value)

        assert "Use larger granularity" in await why("b", 65536, persistent=True)
        assert "Granularity exceeds maximum" in await why("b", 1 << 32, persistent=True)
        assert "power of 2" in await why("b", 768)
        assert "power of 2" in await why("b", 256)
        assert "empty" in await why("")
        assert "too long" in await why("n" * 1024)
        null = await graph.add("null-co,node-name=n,size=1M")
        assert await refused(add_bitmap(graph, null, "b", persistent=True)) == errno.ENOTSUP

    run(image, scenario)

    async def version_2(graph: BlockGraph, node: BlockNode) -> None:
        assert await refused(add_bitmap(graph, node, "b", persistent=True)) == errno.ENOTSUP

    run(old, version_2)


def test_names_and_backing_file_survive_bitmaps_that_come_and_go(tmp_path: Path) -> None:
    """The header changes behind its first sector."""
    (tmp_path / "base").write_bytes(b"\x05" * SIZE)
    image = create(tmp_path / "i.qcow2", SIZE, "-b", tmp_path / "base", "-F", "raw")
    for turn in range(3):

        async def add(
            graph: BlockGraph, node: BlockNode, disk: BlockBackend, name: str = f"b{turn}"
        ) -> None:
            await add_bitmap(graph, node, name, persistent=True)

        async def drop(
            graph: BlockGraph, node: BlockNode, disk: BlockBackend, name: str = f"b{turn}"
        ) -> None:
            await remove_bitmap(graph, find_bitmap(node, name))

        with_disk(image, add)
        assert set(told(image)) == {f"b{turn}"}
        qemu_img("bitmap", "--add", image, "theirs")
        qemu_img("bitmap", "--remove", image, "theirs")
        assert contents(image, tmp_path) == b"\x05" * SIZE
        with_disk(image, drop)
        assert told(image) == {}
        assert check(image) == ""
        assert contents(image, tmp_path) == b"\x05" * SIZE


def test_any_request_that_fails_leaves_bitmaps_right_or_in_use(
    tmp_path: Path, expect_log: ExpectedLog
) -> None:
    expect_log.allow("lost persistent bitmaps", "flush at close failed")
    base = create(tmp_path / "base.qcow2", MIB, "-o", "cluster_size=4k")
    qemu_img("bitmap", "--add", "-g", "4k", base, "b")
    image = tmp_path / "i.qcow2"

    async def attempt(number: int) -> bool:
        graph = BlockGraph({**DRIVERS, "failing": FailingNode})
        file = f"file.driver=failing,file.file.driver=file,file.file.filename={image}"
        node = await graph.add(f"qcow2,{file}")
        disk = BlockBackend(node, "the guest", writable=True)
        await disk.pwritev(8192, IoVec.of(b"1" * 4096))
        await add_bitmap(graph, node, "new", 512, persistent=True)
        await disk.close()
        failing = node.children["file"].node
        assert isinstance(failing, FailingNode)
        failing.left = number
        await graph.close_all()
        return failing.left > 0

    outcomes = set()
    for number in range(1, 100):
        image.write_bytes(base.read_bytes())
        done = asyncio.run(attempt(number))
        found = told(image)
        outcomes.add("in-use" in found["b"][1])
        if "in-use" not in found["b"][1]:
            assert set(found) == {"b", "new"}
            assert dirty_for_qemu(image, "b", tmp_path) == [(8192, 4096)]
        if done:
            break
    assert done
    assert outcomes == {False, True}


def test_damaged_bitmaps_keep_nobody_from_reading(tmp_path: Path, expect_log: ExpectedLog) -> None:
    expect_log.expect("bitmaps are not usable")
    image = create(tmp_path / "i.qcow2", SIZE)
    qemu_io(image, "write -P 7 0 1M")
    qemu_img("bitmap", "--add", image, "b")
    header = Header.parse(image.read_bytes()[:65536])
    place = int.from_bytes(next(e for e in header.extensions if e.type == 0x23852875).data[16:])
    with image.open("r+b") as file:
        file.seek(place + 16)
        file.write(b"\x09")  # a type that nobody knows
    before = image.read_bytes()

    async def scenario(graph: BlockGraph, node: BlockNode) -> None:
        disk = BlockBackend(node, "the guest", writable=False)
        assert await read(disk, 0, MIB) == b"\x07" * MIB
        assert node.bitmaps == []
        await disk.close()

    with pytest.raises(ConfigError, match="doesn't satisfy the constraints"):
        run(image, scenario)
    run(image, scenario, **{"read-only": True})
    assert image.read_bytes() == before


def test_bitmap_has_exactly_what_the_engine_and_python_have_written(
    socket_directory: Path, tmp_path: Path
) -> None:
    require("engine")
    image = create(tmp_path / "i.qcow2", SIZE)
    qemu_img("bitmap", "--add", "-g", "4k", image, "b")
    model = asyncio.run(_by_a_guest(image, socket_directory / "s"))
    assert check(image) == ""
    ranges = dirty_for_qemu(image, "b", tmp_path)
    assert {at for start, size in ranges for at in range(start, start + size, 4096)} == model


async def _by_a_guest(image: Path, socket: Path) -> set[int]:
    ready = asyncio.Event()
    node = f"qcow2,node-name=d,file.driver=file,file.filename={image}"
    export = f"vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={socket}"
    config = DaemonConfig(
        blockdevs=[parse_options(node, "driver")],
        exports=[parse_export(parse_options(export, "type"))],
        data_path="native",
    )
    daemon = Daemon(config, ready.set)
    running = asyncio.create_task(daemon.run())
    await asyncio.wait([running, asyncio.create_task(ready.wait())], return_when="FIRST_COMPLETED")
    model: set[int] = set()
    rnd = random.Random(6)

    def guest(disk: Client, turns: int) -> None:
        for _ in range(turns):
            # Small enough that most clusters are allocated soon, and the engine writes by itself.
            offset = rnd.randrange(0, 2 * MIB, 512)
            length = rnd.choice([512, 4096, 9 * 512])
            disk.write(offset, rnd.randbytes(length))
            model.update(at // 4096 * 4096 for at in range(offset, offset + length, 512))

    try:
        bitmap = find_bitmap(daemon.graph.find("d"), "b")
        disk = await asyncio.to_thread(Client.connect, socket)
        try:
            for _ in range(4):
                await asyncio.to_thread(guest, disk, 60)
                found = {
                    at for start, size in bitmap.ranges() for at in range(start, start + size, 4096)
                }
                assert found == model
                assert bitmap.count() == 4096 * len(model)
                if rnd.random() < 0.5:
                    bitmap.create_successor()
                    await asyncio.to_thread(guest, disk, 20)
                    bitmap.reclaim()
        finally:
            await asyncio.to_thread(disk.close)
        assert daemon.exports["e"].statistics().hits > 50
    finally:
        daemon.stop()
        await running
    return model
