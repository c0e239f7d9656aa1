"""Copy-range (row B22): the storage copies by itself, or the bytes are read and written; they are the same."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from tests.unit.block.fakes import ArrayNode, put_above, run_now
from vhostblk.block.backend import BlockBackend
from vhostblk.block.copy_range import Copier, copy_range, copy_range_from
from vhostblk.block.drivers.file import FileNode
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.node import Req
from vhostblk.block.permissions import Perm
from vhostblk.block.tracking import TrackedRequest
from vhostblk.errors import BlockError

SIZE = 1 << 20


def test_copy_between_raw_files_uses_the_syscall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(SIZE)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(bytes(SIZE))
    asked: list[tuple[int, int, int]] = []
    real = os.copy_file_range

    def copy(source: int, target: int, count: int, at: int, to: int) -> int:
        asked.append((at, to, count))
        return real(source, target, count, at, to)

    monkeypatch.setattr(os, "copy_file_range", copy)

    async def scenario() -> None:
        graph = BlockGraph()
        users = []
        for name in "ab":
            options = {"driver": "raw", "offset": 4096}
            options["file"] = {"driver": "file", "filename": str(tmp_path / name)}
            node = await graph.add(options)
            users.append(BlockBackend(node, name, writable=True, shared=Perm.ALL))
        seen: list[TrackedRequest] = []

        async def hook(request: TrackedRequest) -> None:
            seen.append(request)

        source, target = (user.node for user in users)
        await target.add_before_write(hook)
        before = target.write_generation()
        copier = Copier(users[0]._edge, users[1]._edge)
        await copier.copy(512, 100_000 // 512 * 512)
        assert copier.offloads
        assert asked[0] == (4608, 4608, 99_840)
        assert [(request.offset, request.length) for request in seen] == [(512, 99_840)]
        assert target.write_generation() > before
        assert target.write_log.highest == 100_352
        assert not source.in_flight
        assert not target.in_flight
        for user in users:
            await user.close()
        await graph.close_all()

    asyncio.run(scenario())
    copied = (tmp_path / "b").read_bytes()
    assert copied[4608:104_448] == content[4608:104_448]
    assert not any(copied[:4608])
    assert not any(copied[104_448:])


def test_durable_copy_is_flushed_also_if_everything_before_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(SIZE))
    flushed: list[int] = []
    real = FileNode.driver_flush_to_disk

    async def flush_to_disk(node: FileNode) -> None:
        flushed.append(node.write_generation())
        await real(node)

    monkeypatch.setattr(FileNode, "driver_flush_to_disk", flush_to_disk)

    async def scenario() -> None:
        graph = BlockGraph()
        users = []
        for name in "ab":
            file = {"driver": "file", "filename": str(tmp_path / name)}
            node = await graph.add({"driver": "raw", "file": file})
            users.append(BlockBackend(node, name, writable=True, shared=Perm.ALL))
        source, target = users
        await target.flush()
        flushed.clear()
        await copy_range(source.root, 0, target.root, 0, 4096)
        assert not flushed
        await target.flush()
        assert len(flushed) == 1
        await copy_range(source.root, 0, target.root, 4096, 4096, int(Req.FUA))
        assert len(flushed) == 2
        for user in users:
            await user.close()
        await graph.close_all()

    asyncio.run(scenario())


def test_copy_between_drivers_falls_back_once_with_the_same_bytes() -> None:
    source, target = ArrayNode(SIZE), ArrayNode(SIZE)
    source.data[:] = os.urandom(SIZE)
    users = [
        BlockBackend(node, "user", writable=True, shared=Perm.ALL) for node in (source, target)
    ]
    copier = Copier(users[0]._edge, users[1]._edge)
    run_now(copier.copy(100, 700_000))
    assert not copier.offloads
    assert target.data[100:700_100] == source.data[100:700_100]
    assert not any(target.data[:100])
    assert not any(target.data[700_100:])


def test_filter_that_does_not_pass_copies_on_makes_them_unsupported() -> None:
    """Otherwise the bytes would go past it."""
    for source, target in (
        (put_above(ArrayNode()), ArrayNode()),
        (ArrayNode(), put_above(ArrayNode())),
    ):
        with pytest.raises(BlockError) as caught:
            run_now(copy_range_from(source, 0, target, 0, 512, 0))
        assert caught.value.errno == errno.ENOTSUP
        assert not source.in_flight
        assert not target.in_flight


def test_copy_within_one_node_is_left_to_the_caller(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 256)

    async def scenario() -> None:
        graph = BlockGraph()
        node = await graph.add({"driver": "file", "filename": str(tmp_path / "a")})
        user = BlockBackend(node, "user", writable=True)
        with pytest.raises(BlockError) as caught:
            await asyncio.wait_for(copy_range(user._edge, 0, user._edge, 512, 1024), 5)
        assert caught.value.errno == errno.ENOTSUP
        buffer = bytearray(1024)
        await user.preadv(0, IoVec.of(buffer))
        assert buffer == bytes(range(256)) * 4
        await user.close()
        await graph.close_all()

    asyncio.run(scenario())
