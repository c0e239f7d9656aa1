"""The raw driver: a window, its offsets, its extents, its size."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from vhostblk.block import pipeline
from vhostblk.block.backend import BlockBackend
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode
from vhostblk.errors import BlockError

Scenario = Callable[[BlockGraph, BlockBackend, BlockNode], Awaitable[None]]


def with_window(window: str, scenario: Scenario) -> None:
    """A raw node `r` over a RAM disk `m` of 64 KiB that is all 0xff."""

    async def everything() -> None:
        graph = BlockGraph()
        child = await graph.add("memory,node-name=m,size=64k,discard=unmap")
        await pipeline.pwritev(child.lane, 0, IoVec.of(b"\xff" * 65536))
        node = await graph.add(f"raw,node-name=r,file=m,discard=unmap{window}")
        backend = BlockBackend(node, "the test", writable=True, resize=True)
        await scenario(graph, backend, child)
        await backend.close()
        await graph.close_all()

    asyncio.run(everything())


async def content(node: BlockNode) -> bytes:
    buffer = bytearray(65536)
    await pipeline.preadv(node.lane, 0, IoVec.of(buffer))
    return bytes(buffer)


def test_every_request_is_shifted_and_stays_inside() -> None:
    async def scenario(graph: BlockGraph, backend: BlockBackend, child: BlockNode) -> None:
        assert backend.length == 8192
        await backend.pwritev(0, IoVec.of(b"a" * 100))
        await backend.pwrite_zeroes(100, 4000)
        await backend.pwritev(8191, IoVec.of(b"z"))
        expected = b"\xff" * 1000 + b"a" * 100 + bytes(4000) + b"\xff" * 4091 + b"z"
        assert await content(child) == expected.ljust(65536, b"\xff")
        await backend.pdiscard(0, 8192)
        inside = await content(child)
        assert inside[:1000] == b"\xff" * 1000
        assert inside[9192:] == b"\xff" * (65536 - 9192)

    with_window(",offset=1000,size=8k", scenario)


@pytest.mark.parametrize("layers", [1, 2])
def test_growth_of_the_file_is_noticed_through_every_layer(tmp_path: Path, layers: int) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(8192))
    options: dict[str, object] = {"driver": "file", "filename": str(image)}
    for _ in range(layers):
        options = {"driver": "raw", "file": options}

    async def scenario() -> None:
        graph = BlockGraph()
        node = await graph.add(options)
        os.truncate(image, 20480)
        await node.refresh_length()
        assert node.length == 20480
        await graph.close_all()

    asyncio.run(scenario())


def test_extents_are_the_childs_cut_to_the_window_and_shifted() -> None:
    async def scenario(graph: BlockGraph, backend: BlockBackend, child: BlockNode) -> None:
        (extent,) = await backend.extents(4096, 512)
        assert (extent.offset, extent.length, extent.host_offset) == (0, 8192, 1024)

    with_window(",offset=1024,size=8k", scenario)


def test_revocation_below_arrives_above_in_the_windows_offsets() -> None:
    async def scenario(graph: BlockGraph, backend: BlockBackend, child: BlockNode) -> None:
        seen: list[tuple[int, int]] = []

        async def revoke(offset: int, length: int) -> None:
            seen.append((offset, length))

        backend.attach(revoke=revoke)
        await child.revoke(0, 1024)
        await child.revoke(9216, 4096)
        assert not seen
        await child.revoke(0, 2048)
        await child.revoke(4096, 1024)
        await child.revoke(9000, 9999)
        await child.revoke(0, 65536)
        assert seen == [(0, 1024), (3072, 1024), (7976, 216), (0, 8192)]
        backend.attach()

    with_window(",offset=1024,size=8k", scenario)


def test_window_without_a_size_follows_its_child() -> None:
    async def scenario(graph: BlockGraph, backend: BlockBackend, child: BlockNode) -> None:
        lengths: list[int] = []
        backend.attach(resized=lengths.append)
        await pipeline.truncate(child, 131_072)
        await pipeline.truncate(backend.node, 4096)
        assert lengths == [130_048, 4096]
        assert child.length == 5120

    with_window(",offset=1k", scenario)


def test_window_of_fixed_size_stays_as_it_is() -> None:
    async def scenario(graph: BlockGraph, backend: BlockBackend, child: BlockNode) -> None:
        with pytest.raises(BlockError) as caught:
            await pipeline.truncate(backend.node, 4096)
        assert caught.value.errno == errno.ENOTSUP
        await pipeline.truncate(child, 131_072)
        assert backend.length == 8192
        for request in (
            pipeline.pwritev(backend.node.lane, 8000, IoVec.of(bytes(200))),
            backend.node.driver_pwrite_zeroes(8192, 1, 0),
            backend.node.driver_pdiscard(8192, 1),
        ):
            with pytest.raises(BlockError) as caught:
                await request
            assert caught.value.errno == errno.ENOSPC

    with_window(",size=8k", scenario)


def test_discard_reaches_the_child_only_if_both_say_unmap() -> None:
    async def everything() -> None:
        graph = BlockGraph()
        await graph.add("memory,node-name=off,size=64k")
        await graph.add("memory,node-name=on,size=64k,discard=unmap")
        for name, file, discard, expected in (
            ("a", "on", "unmap", True),
            ("b", "on", "ignore", False),
            ("c", "off", "unmap", False),
        ):
            node = await graph.add(f"raw,node-name={name},file={file},discard={discard}")
            backend = BlockBackend(node, "the test", writable=True)
            assert backend.can_discard is expected
            await backend.close()
        await graph.close_all()

    asyncio.run(everything())


def test_read_only_child_can_be_read_but_not_written() -> None:
    async def everything() -> None:
        graph = BlockGraph()
        await graph.add("null-co,node-name=n,read-only=on,size=64k,read-zeroes=on")
        node = await graph.add("raw,node-name=r,file=n,auto-read-only=on")
        assert node.read_only
        backend = BlockBackend(node, "the test", writable=False)
        buffer = bytearray(b"x" * 10)
        await backend.preadv(0, IoVec.of(buffer))
        assert buffer == bytes(10)
        await backend.close()
        await graph.close_all()

    asyncio.run(everything())
