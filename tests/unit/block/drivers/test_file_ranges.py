"""Where files have data and holes, and that what is remembered of it is never wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.block.drivers.disks import with_file
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers import host_file
from vhostblk.block.drivers.file import FileNode
from vhostblk.block.flags import StatusFlag
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import align_down
from vhostblk.block.status import BlockStatus, block_status, block_statuses

BLOCK = 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"i" * 64 * BLOCK)
    return path


async def has_data(node: FileNode, offset: int) -> bool:
    return bool((await block_status(node, offset, BLOCK)).flags & StatusFlag.DATA)


@pytest.mark.parametrize("alignment", [512, 4096])
def test_many_runs_of_a_file_with_holes_are_those_that_are_found_one_by_one(
    tmp_path: Path, alignment: int
) -> None:
    path = tmp_path / "holes.img"
    rnd = random.Random(7)
    with path.open("wb") as file:
        for at in sorted(rnd.sample(range(2000), 700)):
            file.seek(at * 4096)
            file.write(b"x" * 4096)
        file.truncate(2000 * 4096 + 512)

    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        node.limits = dataclasses.replace(node.limits, request_alignment=alignment)
        offset, end = 512 if alignment == 512 else 4096, align_down(node.length, alignment)
        answers = 0
        while offset < end:
            runs, file = await block_statuses(node, offset, end - offset)
            answers += 1
            for flags, length, place in runs:
                found = BlockStatus(flags, length, file, place)
                assert found == await block_status(node, offset, end - offset)
                offset += length
        assert answers < 5

    with_file(path, scenario)


def test_data_are_looked_for_once(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding where they end takes a file system as long as there are pages that have not been written back."""
    asked = []

    def find_run(fd: int, offset: int) -> tuple[bool, int]:
        asked.append(offset)
        return found(fd, offset)

    found = host_file.find_run
    monkeypatch.setattr(host_file, "find_run", find_run)

    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        for offset in (8 * BLOCK, 9 * BLOCK, 63 * BLOCK):
            assert await has_data(node, offset)
        assert asked == [8 * BLOCK]
        runs, _ = await block_statuses(node, 9 * BLOCK, 20 * BLOCK)
        assert [count for _, count, _ in runs] == [20 * BLOCK]
        assert asked == [8 * BLOCK]

    with_file(image, scenario)


CHANGES: dict[str, Callable[[BlockBackend], Awaitable[Any]]] = {
    "discard": lambda disk: disk.pdiscard(16 * BLOCK, BLOCK),
    "zeroes": lambda disk: disk.pwrite_zeroes(16 * BLOCK, BLOCK),
    "unmapped": lambda disk: disk.pwrite_zeroes(16 * BLOCK, BLOCK, may_unmap=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_hole_that_was_made_in_known_data_is_seen(image: Path, change: str) -> None:
    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        assert await has_data(node, 16 * BLOCK)
        os.fsync(node._fd)  # a zero-range of what is only in the page cache stays data
        await CHANGES[change](backend)
        expected, _ = host_file.find_run(node._fd, 16 * BLOCK)
        assert await has_data(node, 16 * BLOCK) is expected
        assert expected is False
        assert await has_data(node, 17 * BLOCK)

    with_file(image, scenario)


def test_a_file_that_shrank_and_grew_again_has_no_data_there(image: Path) -> None:
    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        assert await has_data(node, 0)
        await backend.truncate(16 * BLOCK)
        await backend.truncate(64 * BLOCK)
        assert not await has_data(node, 16 * BLOCK)
        assert await has_data(node, 15 * BLOCK)

    with_file(image, scenario)


def test_a_hole_made_while_the_file_system_was_asked_is_seen(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is from before the hole, and comes after it was made."""

    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        call = node._io.call

        async def late(function: Callable[..., Any], *arguments: Any, file: int) -> Any:
            result = await call(function, *arguments, file=file)
            monkeypatch.setattr(node._io, "call", call)
            await backend.pdiscard(16 * BLOCK, BLOCK)
            return result

        monkeypatch.setattr(node._io, "call", late)
        node._inline = False
        assert await has_data(node, 16 * BLOCK)
        assert not await has_data(node, 16 * BLOCK)

    with_file(image, scenario)


@pytest.mark.parametrize("seed", range(8))
def test_after_any_changes_the_answer_is_the_file_systems(image: Path, seed: int) -> None:
    rnd = random.Random(seed)

    async def change(backend: BlockBackend) -> None:
        blocks = backend.length // BLOCK
        first = rnd.randrange(blocks)
        count = rnd.randint(1, min(8, blocks - first))
        where = first * BLOCK, count * BLOCK
        which = rnd.randrange(5)
        if which == 0:
            await backend.pwritev(where[0], IoVec.of(b"w" * where[1]))
        elif which == 1:
            await backend.pwrite_zeroes(*where, rnd.choice((False, True)))
        elif which == 2:
            await backend.pdiscard(*where)
        elif which == 3:
            await backend.truncate(rnd.randint(8, 64) * BLOCK)
        else:
            await backend.flush()

    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        kinds = set()
        for _ in range(300):
            await asyncio.gather(*(change(backend) for _ in range(rnd.randint(1, 3))))
            for _ in range(3):
                offset = rnd.randrange(backend.length // BLOCK) * BLOCK
                found = await block_status(node, offset, backend.length - offset)
                is_data = bool(found.flags & StatusFlag.DATA)
                runs = host_file.find_runs(node._fd, offset, found.length, BLOCK, most=1)
                assert runs[0][0] is is_data
                assert runs[0][1] >= found.length
                kinds.add(is_data)
        assert kinds == {False, True}

    with_file(image, scenario)
