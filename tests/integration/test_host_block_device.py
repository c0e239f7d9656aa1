"""The file driver on a real block device: a loop device, which needs root."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.requirements import require
from vhostblk.block import pipeline
from vhostblk.block.backend import BlockBackend
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.node import ExtentFlag, Req
from vhostblk.errors import BlockError

SIZE = 4 << 20


@pytest.fixture(params=[512, 4096])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, int, Path]]:
    """(path, logical block size, the file behind it)."""
    losetup = require("losetup")
    if os.geteuid() != 0:
        pytest.skip("a loop device needs root")
    path = tmp_path / "disk.img"
    path.write_bytes(b"\xff" * SIZE)
    done = subprocess.run(
        [losetup, "--find", "--show", "--sector-size", str(request.param), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    name = done.stdout.strip()
    yield name, request.param, path
    subprocess.run([losetup, "--detach", name], check=True)


Scenario = Callable[[BlockBackend], Awaitable[None]]


def with_device(name: str, scenario: Scenario, **options: Any) -> None:
    async def everything() -> None:
        graph = BlockGraph()
        node = await graph.add(
            {"driver": "host_device", "filename": name, "discard": "unmap"} | options
        )
        backend = BlockBackend(node, "the test", writable=not node.read_only)
        await scenario(backend)
        await backend.close()
        await graph.close_all()

    asyncio.run(everything())


@pytest.mark.parametrize("direct", [False, True])
def test_device_reports_its_sizes_and_serves_any_request(
    device: tuple[str, int, Path], direct: bool
) -> None:
    name, logical, _ = device

    async def scenario(backend: BlockBackend) -> None:
        assert backend.length == SIZE
        sizes = backend.block_sizes
        assert sizes.logical == logical
        assert sizes.physical >= logical
        assert sizes.min_io >= logical
        if direct:
            assert backend.limits.request_alignment == logical
        model = bytearray(b"\xff" * SIZE)
        for offset, length in [(0, 4096), (1, 1), (511, 5000), (SIZE - 3, 3)]:
            await backend.pwritev(offset, IoVec.of(b"w" * length), Req.FUA)
            model[offset : offset + length] = b"w" * length
        for offset, length, may_unmap in [
            (8192, 8192, True),
            (40960, 8192, False),
            (65536 + 100, 10_000, True),
            (131072 + 512, 512, False),
        ]:
            await backend.pwrite_zeroes(offset, length, may_unmap)
            model[offset : offset + length] = bytes(length)
        buffer = bytearray(SIZE)
        await backend.preadv(0, IoVec.of(buffer))
        assert buffer == model
        await backend.pdiscard(1 << 20, 1 << 20)
        await backend.pdiscard((2 << 20) + 100, 5000)
        await backend.preadv(0, IoVec.of(buffer))
        assert buffer[: 1 << 20] == model[: 1 << 20]
        assert buffer[3 << 20 :] == model[3 << 20 :]
        (extent,) = await backend.extents(0, 512)
        assert (extent.offset, extent.length) == (0, SIZE)
        assert bool(extent.flags & ExtentFlag.FIXED) is direct
        with pytest.raises(BlockError):
            await pipeline.truncate(backend.node, SIZE // 2)

    with_device(name, scenario, **{"cache.direct": direct})


def test_discard_reaches_the_device(device: tuple[str, int, Path]) -> None:
    name, _, path = device
    subprocess.run(["sync", str(path)], check=True)

    async def scenario(backend: BlockBackend) -> None:
        if not backend.can_discard:
            pytest.skip("this loop device has no discard")
        before = path.stat().st_blocks
        await backend.pdiscard(0, SIZE)
        assert path.stat().st_blocks < before

    with_device(name, scenario)


def test_read_only_device(device: tuple[str, int, Path]) -> None:
    name, _, _ = device

    async def scenario(backend: BlockBackend) -> None:
        assert not backend.can_discard
        buffer = bytearray(512)
        await backend.preadv(0, IoVec.of(buffer))
        assert buffer == b"\xff" * 512

    with_device(name, scenario, **{"read-only": True})
