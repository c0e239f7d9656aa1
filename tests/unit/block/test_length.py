"""Length, resize with preallocation, allocated size (row B31)."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.schedule import explore, replay, turns
from tests.unit.block.crash_disk import CrashDisk
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.flags import Preallocation
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.length import Measurement, allocated_size, measure_raw, resize
from vhostblk.block.op_blockers import OpType, Reason
from vhostblk.block.permissions import Perm
from vhostblk.errors import BlockError, ConfigError

KIB = 1024
MIB = 1 << 20


def with_graph(scenario: Callable[[BlockGraph], Awaitable[Any]]) -> None:
    async def run() -> None:
        graph = BlockGraph()
        await scenario(graph)
        await graph.close_all()

    asyncio.run(run())


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "disk.img"
    path.write_bytes(b"d" * 64 * KIB)
    return str(path)


def user(node: Any) -> BlockBackend:
    """Somebody to resize for."""
    return BlockBackend(node, "resizer", writable=False, shared=Perm.ALL)


@pytest.mark.parametrize(
    ("preallocation", "least"),
    [(Preallocation.OFF, 0), (Preallocation.FALLOC, MIB), (Preallocation.FULL, MIB)],
)
@pytest.mark.parametrize("direct", [False, True])
def test_file_grows_with_zeroes_and_takes_as_much_room_as_it_was_told_to(
    image: str, preallocation: Preallocation, least: int, direct: bool
) -> None:
    async def scenario(graph: BlockGraph) -> None:
        file = {"driver": "file", "filename": image, "cache.direct": direct}
        try:
            node = await graph.add({"driver": "raw", "file": file})
        except ConfigError as error:
            pytest.skip(f"no O_DIRECT here: {error}")
        backend = user(node)
        await resize(graph, backend, node, 64 * KIB + MIB, preallocation)
        assert node.length == 64 * KIB + MIB == os.stat(image).st_size
        assert await allocated_size(node) >= least + 64 * KIB
        if not least:
            assert await allocated_size(node) < MIB
        data = bytearray(MIB)
        await backend.preadv(64 * KIB, IoVec([memoryview(data)]))
        assert not any(data)
        await resize(graph, backend, node, 4 * KIB)
        assert os.stat(image).st_size == 4 * KIB
        await backend.close()

    with_graph(scenario)


@pytest.mark.parametrize(
    ("length", "preallocation", "code"),
    [
        (4 * KIB, Preallocation.FALLOC, errno.ENOTSUP),
        (MIB, Preallocation.METADATA, errno.ENOTSUP),
        ((1 << 63) - 512, Preallocation.OFF, errno.EFBIG),
        (-512, Preallocation.OFF, errno.EINVAL),
    ],
)
def test_impossible_lengths_and_preallocations_are_refused_and_the_length_is_what_it_was(
    image: str, length: int, preallocation: Preallocation, code: int
) -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add({"driver": "file", "filename": image})
        backend = user(node)
        with pytest.raises(BlockError) as caught:
            await resize(graph, backend, node, length, preallocation)
        assert caught.value.errno == code
        assert node.length == os.stat(image).st_size == 64 * KIB
        await backend.close()

    with_graph(scenario)


def test_file_that_cannot_get_the_room_has_its_old_size_again(
    image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, start: int, end: int, direct: bool) -> None:
        os.ftruncate(fd, start + 4096)
        raise BlockError(errno.ENOSPC)

    monkeypatch.setattr("vhostblk.block.drivers.host_file.write_zeroes", full)

    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add({"driver": "file", "filename": image})
        backend = user(node)
        with pytest.raises(BlockError) as caught:
            await resize(graph, backend, node, MIB, Preallocation.FULL)
        assert caught.value.errno == errno.ENOSPC
        assert node.length == os.stat(image).st_size == 64 * KIB
        await backend.close()

    with_graph(scenario)


def test_resize_needs_the_permission_a_writable_node_and_nobody_who_blocks_it(image: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add({"driver": "file", "node-name": "f", "filename": image})
        backend = user(node)
        job = BlockBackend(node, "job", writable=False, shared=Perm.ALL & ~Perm.RESIZE)
        with pytest.raises(ConfigError, match=r"cannot have permission 'resize'.*job does not"):
            await resize(graph, backend, node, 0)
        await job.close()
        reason = Reason("a mirror runs")
        node.op_blockers.block(reason, (OpType.RESIZE,))
        with pytest.raises(ConfigError, match="Node 'f' is busy: a mirror runs"):
            await resize(graph, backend, node, 0)
        node.op_blockers.unblock(reason)
        await backend.close()
        frozen = await graph.add("null-co,node-name=n,read-only=on")
        backend = user(frozen)
        with pytest.raises(ConfigError, match="Block node 'n' is read-only") as caught:
            await resize(graph, backend, frozen, 0)
        assert caught.value.errno == errno.EACCES
        await backend.close()
        assert os.stat(image).st_size == 64 * KIB

    with_graph(scenario)


def test_growing_and_shrinking_under_load_keeps_what_is_left_and_zeroes_what_is_new(
    image: str,
) -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add({"driver": "raw", "file": {"driver": "file", "filename": image}})
        guest = BlockBackend(node, "guest", writable=True, shared=Perm.ALL)
        backend = user(node)
        sizes: list[int] = []
        guest.attach(resized=sizes.append)
        ended = False

        async def load() -> None:
            choice = random.Random(1)
            while not ended:
                data = choice.randbytes(512)
                offset = choice.randrange(0, 32 * KIB, 512)
                await guest.pwritev(offset, IoVec([memoryview(data)]))
                found = bytearray(512)
                await guest.preadv(offset, IoVec([memoryview(found)]))
                assert found == data
                await asyncio.sleep(0)

        task = asyncio.create_task(load())
        for _ in range(20):
            await resize(graph, backend, node, 32 * KIB)
            await resize(graph, backend, node, 96 * KIB)
            tail = bytearray(64 * KIB)
            await guest.preadv(32 * KIB, IoVec([memoryview(tail)]))
            assert not any(tail)
            await guest.pwritev(32 * KIB, IoVec([memoryview(b"x" * 64 * KIB)]))
        ended = True
        await task
        assert sizes == [32 * KIB, 96 * KIB] * 20
        await guest.close()
        await backend.close()

    with_graph(scenario)


def test_node_gets_shorter_when_requests_that_began_before_are_over() -> None:
    """Those are cut to what each layer takes; the last piece would be behind the end, and make it longer again."""

    async def scenario() -> None:
        graph = BlockGraph({**DRIVERS, "crash-disk": CrashDisk})
        await graph.add("crash-disk,node-name=d,size=8k")
        node = await graph.add("blkdebug,image=d,max-transfer=512")
        guest = BlockBackend(node, "guest", writable=True, shared=Perm.ALL)
        backend = user(node)
        content = IoVec.of(b"x" * 4 * KIB)
        write = asyncio.create_task(guest.pwritev(4 * KIB, content))
        await turns(5)
        await resize(graph, backend, graph.find("d"), 4 * KIB)
        await write
        assert (node.length, guest.length) == (4 * KIB, 4 * KIB)
        with pytest.raises(BlockError) as caught:
            await guest.pwritev(4 * KIB, content)
        assert caught.value.errno == errno.EIO
        await guest.close()
        await backend.close()
        await graph.close_all()

    explore(scenario, departures=1)


def test_write_that_is_behind_the_end_by_now_is_an_error_of_the_disk() -> None:
    """A file that somebody else has cut short is no bug of ours."""

    async def scenario() -> None:
        graph = BlockGraph({**DRIVERS, "crash-disk": CrashDisk})
        leaf = await graph.add("crash-disk,node-name=d,size=8k")
        guest = BlockBackend(
            await graph.add("blkdebug,image=d,max-transfer=512"), "guest", writable=True
        )
        write = asyncio.create_task(guest.pwritev(0, IoVec.of(b"x" * 8 * KIB)))
        await turns(5)
        leaf.set_length(4 * KIB)
        with pytest.raises(BlockError, match="behind the end") as caught:
            await write
        assert caught.value.errno == errno.EIO
        await guest.close()
        await graph.close_all()

    replay(scenario, {})


def test_allocated_size_is_that_of_the_files_below() -> None:
    async def scenario(graph: BlockGraph) -> None:
        assert await allocated_size(await graph.add("null-co")) == 0
        node = await graph.add("raw,file.driver=memory,file.size=1G")
        assert await allocated_size(node) == 0

    with_graph(scenario)


def test_raw_image_takes_its_length_in_whole_sectors() -> None:
    assert measure_raw(1000) == Measurement(1024, 1024)


def test_truncated_length_is_told_in_whole_sectors(image: str) -> None:
    async def scenario(graph: BlockGraph) -> None:
        node = await graph.add({"driver": "file", "filename": image})
        backend = user(node)
        await resize(graph, backend, node, 1000)
        assert node.length == 1024
        assert (node.block_sizes.logical, node.block_sizes.physical) >= (512, 512)
        await backend.close()

    with_graph(scenario)
