"""Many reads and writes at once past the pipeline: the same bytes, and the graph knows as much as it has to."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from vhostblk.block import host_io
from vhostblk.block.backend import BlockBackend
from vhostblk.block.create import create_image
from vhostblk.block.dirty_bitmap import add_bitmap
from vhostblk.block.extent_io import ExtentIO, Piece
from vhostblk.block.graph import BlockGraph
from vhostblk.block.host_io import ThreadHostIO
from vhostblk.block.iov import IoVec
from vhostblk.block.permissions import Perm
from vhostblk.errors import BlockError

MIB = 1 << 20
CLUSTER = 65536
SIZE = 4 * MIB

Scenario = Callable[[BlockGraph, BlockBackend, ExtentIO], Awaitable[None]]


def run(options: dict[str, Any], scenario: Scenario) -> None:
    """A graph with one writable disk."""

    async def everything() -> None:
        graph = BlockGraph()
        io = ThreadHostIO()
        try:
            if options["driver"] == "qcow2":
                await create_image(graph, options["file"]["filename"], "qcow2", size=SIZE)
            node = await graph.add(options)
            user = BlockBackend(node, "the test", writable=True, shared=Perm.ALL)
            past = ExtentIO(user, io)
            try:
                await scenario(graph, user, past)
            finally:
                past.close()
                await user.close()
        finally:
            await graph.close_all()
            await io.close()

    asyncio.run(everything())


def raw(path: Path, size: int = SIZE, *faults: dict[str, Any]) -> dict[str, Any]:
    path.write_bytes(bytes(size))
    file: dict[str, Any] = {"driver": "file", "filename": str(path)}
    if faults:
        file = {"driver": "blkdebug", "image": file, "inject-error": list(faults)}
    return {"driver": "raw", "file": file}


def qcow2(path: Path) -> dict[str, Any]:
    return {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}


def some_pieces() -> list[Piece]:
    """Pages here and there, a whole cluster, and more than one call takes."""
    places = [(3 * 4096, 4096), (CLUSTER, CLUSTER), (3 * CLUSTER + 512, 1024), (MIB, 2 * MIB)]
    return [(offset, memoryview(os.urandom(length))) for offset, length in places]


@pytest.mark.parametrize("make", [raw, qcow2])
def test_what_was_written_is_there_and_is_read(tmp_path: Path, make: Any) -> None:
    pieces = some_pieces()
    expected = bytearray(SIZE)
    for offset, content in pieces:
        expected[offset : offset + len(content)] = content

    async def scenario(graph: BlockGraph, user: BlockBackend, past: ExtentIO) -> None:
        await past.write(pieces)
        whole = bytearray(SIZE)
        await user.preadv(0, IoVec.of(whole))
        assert whole == expected
        again = [(offset, memoryview(bytearray(len(content)))) for offset, content in pieces]
        await past.read(again)
        assert again == pieces

    run(make(tmp_path / "image"), scenario)


def test_what_has_no_extents_goes_through_the_node(tmp_path: Path) -> None:
    pieces = some_pieces()

    async def scenario(graph: BlockGraph, user: BlockBackend, past: ExtentIO) -> None:
        await past.write(pieces[:3])
        again = bytearray(CLUSTER)
        await past.read([(CLUSTER, memoryview(again))])
        assert again == pieces[1][1]
        with pytest.raises(BlockError) as failure:
            await past.write(pieces)
        assert failure.value.errno == errno.EIO

    fault = {"event": "write_aio", "sector": 2 * MIB // 512}
    run(raw(tmp_path / "image", SIZE, fault), scenario)


@pytest.mark.parametrize("make", [raw, qcow2])
def test_graph_knows_of_writes_when_they_have_ended(tmp_path: Path, make: Any) -> None:
    async def scenario(graph: BlockGraph, user: BlockBackend, past: ExtentIO) -> None:
        bitmap = await add_bitmap(graph, user.node, "b", CLUSTER)
        before = user.node.write_log.generation
        await past.write([(CLUSTER + 512, memoryview(bytes(512)))])
        assert user.node.write_log.generation > before
        assert user.node.write_log.highest == CLUSTER + 1024
        assert bitmap.count() == CLUSTER

    run(make(tmp_path / "image"), scenario)


def test_revocation_waits_for_what_is_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, may_end = threading.Event(), threading.Event()
    write = host_io.write_all

    def slow(fd: int, offset: int, iov: IoVec) -> None:
        began.set()
        assert may_end.wait(60)
        write(fd, offset, iov)

    monkeypatch.setattr(host_io, "write_all", slow)

    async def scenario(graph: BlockGraph, user: BlockBackend, past: ExtentIO) -> None:
        writing = asyncio.create_task(past.write([(0, memoryview(b"x" * 512))]))
        await asyncio.to_thread(began.wait, 60)
        drain = asyncio.create_task(user.drain())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not drain.done()
        # Cancelled or not, the memory is in use until it has ended.
        writing.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not writing.done()
        may_end.set()
        await drain
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert user.node.write_log.highest == 512

    run(raw(tmp_path / "image"), scenario)


def test_file_that_was_cut_is_an_error(tmp_path: Path) -> None:
    async def scenario(graph: BlockGraph, user: BlockBackend, past: ExtentIO) -> None:
        os.truncate(tmp_path / "image", MIB)
        with pytest.raises(BlockError) as failure:
            await past.read([(MIB - 512, memoryview(bytearray(1024)))])
        assert failure.value.errno == errno.EIO

    run(raw(tmp_path / "image"), scenario)
