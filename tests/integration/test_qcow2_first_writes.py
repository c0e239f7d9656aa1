"""Clusters that get their place before the engine writes to them: what they show, what is given out, what is left."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import pytest

from tests.qcow2_images import (
    MIB,
    check,
    contents,
    create,
    export,
    qemu_img,
    qemu_io,
    read,
    with_image,
)
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.extent import ExtentFlag, FlushTarget, HostExtent, PastWrites, Writer
from vhostblk.block.filters.filter import FilterNode
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.tracking import RequestType
from vhostblk.client.bench.options import BenchOptions, parse_pattern
from vhostblk.client.bench.run import bench
from vhostblk.errors import BlockError
from vhostblk.native import load
from vhostblk.testing.plugin import DaemonStarter

CLUSTER = 65536
PAGE = 4096
RW = ExtentFlag.READ | ExtentFlag.WRITE


def page(cluster: int, number: int = 3) -> tuple[int, int]:
    """A page in a cluster."""
    start = cluster * CLUSTER + number * PAGE
    return start, start + PAGE


def where(extents: list[HostExtent]) -> list[tuple[int, int]]:
    assert all(extent.flags & RW == RW for extent in extents)
    return [(extent.offset // CLUSTER, extent.length // CLUSTER) for extent in extents]


def write_alone(extents: list[HostExtent], offset: int, data: bytes) -> None:
    """As the engine does."""
    (extent,) = [e for e in extents if e.offset <= offset and offset + len(data) <= e.end]
    assert extent.fd is not None
    os.pwrite(extent.fd, data, extent.host_offset + offset - extent.offset)


def test_clusters_get_places_next_to_each_other_and_show_zeroes_until_they_are_written(
    tmp_path: Path,
) -> None:
    image = create(tmp_path / "i", 4 * MIB)

    async def scenario(backend: BlockBackend) -> None:
        found = await backend.prepare_writes([page(9), page(2), page(3), page(2, 7)])
        assert where(found) == [(2, 2), (9, 1)]
        assert found[1].host_offset == found[0].host_offset + 2 * CLUSTER
        assert await read(backend, 0, 4 * MIB) == bytes(4 * MIB)
        write_alone(found, page(3)[0], b"x" * PAGE)
        # Those that are there already bring what is near.
        assert await backend.prepare_writes([page(2)]) == found

    with_image(image, scenario)
    assert check(image) == ""
    expected = bytearray(4 * MIB)
    expected[slice(*page(3))] = b"x" * PAGE
    assert contents(image, tmp_path) == expected


@pytest.mark.parametrize("options", ["cluster_size=64k", "extended_l2=on", "refcount_bits=1"])
def test_what_was_below_is_copied_and_what_is_zero_takes_no_room(
    tmp_path: Path, options: str
) -> None:
    base = create(tmp_path / "base", 2 * MIB)
    noise = random.Random(1).randbytes(MIB)
    (tmp_path / "noise").write_bytes(noise)
    qemu_io(base, f"write -s {tmp_path / 'noise'} 0 1M")
    image = create(tmp_path / "i", 4 * MIB, "-o", options, "-b", base, "-F", "qcow2")
    qemu_io(image, f"write -z {CLUSTER} {CLUSTER}")

    async def scenario(backend: BlockBackend) -> None:
        before = await read(backend, 0, 4 * MIB)
        # Copied, zeroed here, zero there, behind its end.
        found = await backend.prepare_writes([page(0), page(1), page(20), page(40)])
        assert {extent.offset // CLUSTER for extent in found} <= {0, 1, 20, 40}
        assert await read(backend, 0, 4 * MIB) == before
        for extent in found:
            write_alone(found, extent.offset + PAGE, b"x" * PAGE)

    with_image(image, scenario)
    assert check(image) == ""
    found = contents(image, tmp_path)
    assert found[PAGE : 2 * PAGE] == b"x" * PAGE
    assert found[2 * PAGE : CLUSTER] == noise[2 * PAGE : CLUSTER]
    assert found[2 * CLUSTER : MIB] == noise[2 * CLUSTER :]
    assert (image.stat().st_blocks * 512) < 12 * CLUSTER


@pytest.mark.parametrize("options", ["", ",extended_l2=on"])
def test_maker_of_an_image_is_given_what_has_something_below_where_he_writes_all_of_it(
    tmp_path: Path, options: str
) -> None:
    base = create(tmp_path / "base", 8 * CLUSTER)
    qemu_io(base, f"write -P 1 0 {8 * CLUSTER}")
    options = f"cluster_size=64k{options}"
    image = create(tmp_path / "i", 16 * CLUSTER, "-o", options, "-b", base, "-F", "qcow2")
    whole, part = (CLUSTER, 3 * CLUSTER), (4 * CLUSTER, 5 * CLUSTER - PAGE)

    async def scenario(backend: BlockBackend) -> None:
        assert await backend.prepare_writes([whole], Writer.ONCE) == []
        found = await backend.prepare_writes([whole, part], Writer.MAKER)
        assert where(found)[0] == (1, 2)
        write_alone(found, whole[0], b"x" * (whole[1] - whole[0]))
        await backend.pwritev(part[0], IoVec.of(b"y" * (part[1] - part[0])))

    with_image(image, scenario)
    expected = bytearray(b"\1" * 8 * CLUSTER + bytes(8 * CLUSTER))
    expected[slice(*whole)] = b"x" * (whole[1] - whole[0])
    expected[slice(*part)] = b"y" * (part[1] - part[0])
    assert contents(image, tmp_path) == bytes(expected)
    assert check(image) == ""


def test_whoever_writes_once_is_given_the_subclusters_that_he_writes_to(tmp_path: Path) -> None:
    base = create(tmp_path / "base", 8 * CLUSTER)
    noise = random.Random(2).randbytes(4 * CLUSTER)
    (tmp_path / "noise").write_bytes(noise)
    qemu_io(base, f"write -s {tmp_path / 'noise'} 0 {4 * CLUSTER}")
    options = "extended_l2=on,cluster_size=64k"
    image = create(tmp_path / "i", 16 * CLUSTER, "-o", options, "-b", base, "-F", "qcow2")
    sub = CLUSTER // 32
    # Inside of subclusters, two pieces of one cluster, its end and the next one's beginning.
    alone = [(9, 100, 200), (9, 4 * sub, 6 * sub + 1), (10, CLUSTER - sub, CLUSTER), (11, 0, sub)]
    ranges = [(number * CLUSTER + start, number * CLUSTER + end) for number, start, end in alone]
    below = (2 * CLUSTER + sub, 2 * CLUSTER + 2 * sub)

    async def scenario(backend: BlockBackend) -> None:
        found = await backend.prepare_writes([*ranges, below], Writer.ONCE)
        first = 9 * CLUSTER
        assert [(extent.offset - first, extent.length) for extent in found] == [
            (0, sub),
            (4 * sub, 3 * sub),
            (2 * CLUSTER - sub, 2 * sub),
        ]
        for start, end in ranges:
            write_alone(found, start, b"x" * (end - start))
        # What has something below is copied by the write itself.
        await backend.pwritev(below[0], IoVec.of(b"y" * sub))

    with_image(image, scenario)
    assert check(image) == ""
    expected = bytearray(16 * CLUSTER)
    expected[: len(noise)] = noise
    for start, end in ranges:
        expected[start:end] = b"x" * (end - start)
    expected[slice(*below)] = b"y" * sub
    assert contents(image, tmp_path) == expected
    own = [
        entry for entry in json.loads(qemu_img("map", "--output=json", image)) if not entry["depth"]
    ]
    present = [(entry["start"], entry["length"]) for entry in own if entry["present"]]
    assert sum(length for _, length in present) == 7 * sub


async def _nothing_below_is_lost(backend: BlockBackend) -> None:
    assert await backend.prepare_writes([(0, CLUSTER)]) == []
    (extent,) = await backend.prepare_writes([(0, CLUSTER - PAGE)])
    assert extent.flags & RW == RW


async def _in_use(backend: BlockBackend) -> None:
    clusters = backend.node._clusters  # type: ignore[attr-defined]
    async with clusters.locks.held(0, PAGE, alone=False):
        assert await backend.prepare_writes([page(0)]) == []
    assert await backend.prepare_writes([page(0)])


async def _serialising(backend: BlockBackend) -> None:
    tracker = backend.node.tracker
    request = tracker.begin(RequestType.WRITE, 0, PAGE)
    tracker.mark_serialising(request, PAGE)
    found = await backend.prepare_writes([(0, PAGE), page(5)])
    assert where(found) == [(5, 1)]
    tracker.end(request)
    assert await backend.prepare_writes([(0, PAGE)])


async def _hooked(backend: BlockBackend) -> None:
    async def hook(request: object) -> None:
        raise BlockError(errno.EPERM)

    await backend.node.add_before_write(hook)
    found = await backend.prepare_writes([page(0)])
    assert not any(extent.flags & ExtentFlag.WRITE for extent in found)
    backend.node.remove_before_write(hook)
    assert where(await backend.prepare_writes([page(0)])) == [(0, 1)]


@pytest.mark.parametrize("case", [_nothing_below_is_lost, _in_use, _serialising, _hooked])
def test_whoever_is_in_the_way_is_left_alone(
    tmp_path: Path, case: Callable[[BlockBackend], Awaitable[None]]
) -> None:
    base = create(tmp_path / "base", MIB)
    qemu_io(base, "write -P 7 0 1M")
    image = create(tmp_path / "i", MIB, "-b", base, "-F", "qcow2")
    with_image(image, case)
    assert check(image) == ""
    assert contents(image, tmp_path) == b"\7" * MIB


def test_shared_and_compressed_clusters_are_copied_by_their_writes(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(b"\5" * MIB)
    image = tmp_path / "i"
    qemu_img("convert", "-c", "-O", "qcow2", raw, image)
    qemu_io(image, "write -P 9 0 64k")
    qemu_img("snapshot", "-c", "s", image)

    async def scenario(backend: BlockBackend) -> None:
        found = await backend.prepare_writes([page(0), page(1)])
        assert not any(extent.flags & ExtentFlag.WRITE for extent in found)
        await backend.pwritev(0, IoVec.of(b"x" * PAGE))
        await backend.pwritev(CLUSTER, IoVec.of(b"x" * PAGE))
        assert where(await backend.prepare_writes([page(0), page(1)])) == [(0, 2)]

    with_image(image, scenario)
    assert check(image) == ""


class _NoRoom(FilterNode):
    """A file that takes no zeroes any more."""

    driver_name = "full"

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        raise BlockError(errno.ENOSPC)


def test_clusters_that_cannot_be_filled_are_free_again(tmp_path: Path) -> None:
    image = create(tmp_path / "i", MIB)

    async def scenario() -> None:
        graph = BlockGraph({**DRIVERS, "full": _NoRoom})
        file = f"file.driver=full,file.file.driver=file,file.file.filename={image}"
        node = await graph.add(f"qcow2,node-name=d,{file}")
        backend = BlockBackend(node, "the test", writable=True)
        with pytest.raises(BlockError) as caught:
            await backend.prepare_writes([page(0), page(1)])
        assert caught.value.errno == errno.ENOSPC
        assert await read(backend, 0, MIB) == bytes(MIB)
        await backend.close()
        await graph.close_all()

    asyncio.run(scenario())
    assert check(image) == ""


class _Engine:
    """Has extents, and is told when they are not good any more."""

    def __init__(self, backend: BlockBackend) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.flushes = 0
        backend.attach(
            revoke=self._revoke, revoke_flush=self._revoke_flush, take_writes=lambda _: PastWrites()
        )

    async def _revoke(self, offset: int, length: int) -> None:
        self.ranges.append((offset, offset + length))

    async def _revoke_flush(self) -> None:
        self.flushes += 1


def test_zeroes_that_were_given_out_are_taken_back_and_so_is_the_flush(tmp_path: Path) -> None:
    image = create(tmp_path / "i", MIB)

    async def scenario(backend: BlockBackend) -> None:
        engine = _Engine(backend)
        assert backend.flush_target() is not FlushTarget.ASK
        await backend.prepare_writes([page(0)])
        assert engine.ranges == []  # nobody could have had it
        assert engine.flushes == 1
        assert backend.flush_target() is FlushTarget.ASK
        (zeroes,) = [e for e in await backend.extents(2 * CLUSTER, PAGE) if e.fd is None]
        assert zeroes.flags & ExtentFlag.ZERO
        await backend.prepare_writes([page(5), page(9)])
        assert engine.ranges == [
            (5 * CLUSTER, 6 * CLUSTER),
            (9 * CLUSTER, 10 * CLUSTER),
        ]
        await backend.flush()
        assert backend.flush_target() is not FlushTarget.ASK

    with_image(image, scenario)


def test_extents_of_one_that_was_overtaken_while_it_looked_are_not_given_out(
    tmp_path: Path,
) -> None:
    base = create(tmp_path / "base", 64 * MIB)
    image = create(tmp_path / "i", 64 * MIB, "-b", base, "-F", "qcow2")
    qemu_io(base, "write -P 7 0 64k")

    async def scenario(backend: BlockBackend) -> None:
        # It has found that the cluster is the backing file's, and reads that one's tables now.
        reader = asyncio.create_task(backend.extents(0, PAGE))
        writer = asyncio.create_task(backend.prepare_writes([page(0)]))
        found, prepared = await reader, await writer
        assert where(prepared) == [(0, 1)]
        assert found == [] or found[0].host_offset == prepared[0].host_offset

    with_image(image, scenario)


def test_one_fault_brings_the_short_runs_that_are_near(tmp_path: Path) -> None:
    image = create(tmp_path / "i", 64 * MIB)
    order = list(range(400))
    random.Random(3).shuffle(order)
    qemu_io(image, *(f"write -q {at * CLUSTER} {PAGE}" for at in order))

    async def scenario(backend: BlockBackend) -> None:
        found = await backend.extents(100 * CLUSTER, PAGE)
        covered = sum(extent.length for extent in found)
        assert (found[0].offset, covered) == (0, 256 * CLUSTER)
        assert all(a.end == b.offset for a, b in pairwise(found))
        for extent in found:
            (alone,) = await backend.node.host_extents([(extent.offset, extent.end)])
            assert alone == extent

    with_image(image, scenario)


@pytest.mark.skipif(not load.available(), reason="the generator is not built")
@pytest.mark.parametrize("how", ["empty", "overlay"])
def test_many_guests_requests_at_a_time_find_what_they_wrote(
    daemon: DaemonStarter, socket_directory: Path, tmp_path: Path, how: str
) -> None:
    words: list[object] = []
    if how == "overlay":
        base = create(tmp_path / "base", 64 * MIB)
        qemu_io(base, "write -P 0 0 32M")
        words = ["-b", base, "-F", "qcow2"]
    image = create(tmp_path / "i", 64 * MIB, *words)
    sock = socket_directory / "s"
    process = export(daemon, image, sock)
    pattern = parse_pattern("read=3,write=6,flush=1")
    options = BenchOptions(
        pattern=pattern, block_max=32768, requests=3000, ramp=0, verify=True, sleep=True, timeout=60
    )
    assert bench(str(sock), options).requests == 3000
    assert process.stop() == 0
    assert check(image) == ""
