"""Copying disks into another one: the same bytes, whatever the options; failures are told and end it."""

from __future__ import annotations

import asyncio
import errno
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.disks import read
from vhostblk.block.backend import BlockBackend
from vhostblk.block.convert import Conversion, ConvertOptions, What
from vhostblk.block.create import create_image
from vhostblk.block.graph import BlockGraph
from vhostblk.block.permissions import Perm
from vhostblk.block.tracking import TrackedRequest
from vhostblk.errors import BlockError

SECTOR = 512
MIB = 1 << 20


class Listener:
    """Remembers."""

    def __init__(self) -> None:
        self.done: list[float] = []
        self.failures: list[tuple[What, int, int | None]] = []
        self.losses: list[tuple[What, int]] = []

    def progress(self, done: float) -> None:
        self.done.append(done)

    def failed(self, what: What, offset: int, error: BlockError) -> None:
        self.failures.append((what, offset, error.errno))

    def lost(self, what: What, offset: int, error: BlockError) -> None:
        self.losses.append((what, offset))


def raw(path: Path, faults: Sequence[dict[str, Any]] = (), **more: Any) -> dict[str, Any]:
    """Options of a raw image in a file, with faults below."""
    file: dict[str, Any] = {"driver": "file", "filename": str(path)}
    if faults:
        file = {"driver": "blkdebug", "image": file, "inject-error": list(faults)}
    return {"driver": "raw", "file": file, **more}


async def use(graph: BlockGraph, options: dict[str, Any], *, writable: bool) -> BlockBackend:
    node = await graph.add({"read-only": not writable, **options})
    return BlockBackend(node, "the test", writable=writable, shared=Perm.ALL)


def convert(
    sources: Sequence[dict[str, Any]],
    target: dict[str, Any],
    options: ConvertOptions,
    hook: Any = None,
) -> tuple[Listener, BlockError | None]:
    """Open all, copy, close all."""
    listener = Listener()

    async def everything() -> BlockError | None:
        graph = BlockGraph()
        try:
            users = [await use(graph, one, writable=False) for one in sources]
            to = await use(graph, {"discard": "unmap", **target}, writable=True)
            if hook is not None:
                await to.node.add_before_write(hook)
            try:
                await Conversion(users, to, options, listener).run()
            except BlockError as error:
                return error
            finally:
                for user in (*users, to):
                    await user.close()
            return None
        finally:
            await graph.close_all()

    return listener, asyncio.run(everything())


def content(options: dict[str, Any]) -> bytes:
    async def everything() -> bytes:
        graph = BlockGraph()
        try:
            user = await use(graph, options, writable=False)
            try:
                return await read(user, 0, user.length)
            finally:
                await user.close()
        finally:
            await graph.close_all()

    return asyncio.run(everything())


def write_sparsely(path: Path, runs: Sequence[tuple[int, int]]) -> bytes:
    """A file of runs of sectors: holes (0), zeroes that are written (1), data (2)."""
    data = b""
    with path.open("wb") as file:
        for kind, length in runs:
            part = b"x" * (length * SECTOR) if kind == 2 else bytes(length * SECTOR)
            if kind:
                file.seek(len(data))
                file.write(part)
            data += part
        file.truncate(len(data))
    return data


RUNS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), max_size=8)


@settings(deadline=None, max_examples=25)
@given(
    sources=st.lists(RUNS, min_size=1, max_size=3),
    old=st.none() | st.just(b"\xee"),
    format_=st.sampled_from(("raw", "qcow2")),
    min_sparse=st.sampled_from((0, 512, 4096, 6144, 65536)),
    compressed=st.booleans(),
    offload=st.booleans(),
    in_order=st.booleans(),
    workers=st.sampled_from((1, 2, 16)),
)
def test_target_has_the_bytes_of_all_sources(
    sources: list[list[tuple[int, int]]],
    old: bytes | None,
    format_: str,
    min_sparse: int,
    compressed: bool,
    offload: bool,
    in_order: bool,
    workers: int,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = b""
        for number, runs in enumerate(sources):
            expected += write_sparsely(folder / f"{number}", runs)
        if not expected:
            return
        target = folder / "target"
        asyncio.run(_make(target, format_, len(expected), old))
        options = ConvertOptions(
            min_sparse=min_sparse,
            compressed=compressed and format_ == "qcow2",
            offload=offload,
            in_order=in_order,
            workers=workers,
            is_new=old is None,
        )
        to = {"driver": format_, "file": {"driver": "file", "filename": str(target)}}
        listener, error = convert(
            [raw(folder / f"{number}") for number in range(len(sources))], to, options
        )
        assert error is None
        assert listener.failures == []
        assert listener.done == sorted(listener.done)
        assert listener.done[-1:] in ([1.0], [])
        assert content(to) == expected


async def _make(path: Path, format_: str, size: int, old: bytes | None) -> None:
    graph = BlockGraph()
    try:
        await create_image(graph, str(path), format_, size=size)
        if old is not None:
            from vhostblk.block.iov import IoVec

            file = {"driver": "file", "filename": str(path)}
            user = await use(graph, {"driver": format_, "file": file}, writable=True)
            await user.pwritev(0, IoVec.of(old * size))
            await user.close()
    finally:
        await graph.close_all()


def _big(folder: Path, size: int = 24 * MIB) -> bytes:
    data = bytearray()
    for number in range(size // MIB):
        data += bytes([number + 1]) * MIB
    (folder / "source").write_bytes(data)
    (folder / "target").write_bytes(bytes(size))
    return bytes(data)


def test_writes_come_in_order_one_at_a_time(tmp_path: Path) -> None:
    expected = _big(tmp_path)
    began: list[tuple[int, int]] = []

    async def hook(request: TrackedRequest) -> None:
        began.append((request.offset, request.length))
        await asyncio.sleep(0)

    options = ConvertOptions(min_sparse=0)
    _, error = convert([raw(tmp_path / "source")], raw(tmp_path / "target"), options, hook)
    assert error is None
    assert began == sorted(began)
    assert sum(length for _, length in began) == len(expected)
    assert (tmp_path / "target").read_bytes() == expected


@pytest.mark.parametrize("workers", [1, 8, 16])
def test_all_workers_together_hold_no_more_than_64_mib(tmp_path: Path, workers: int) -> None:
    size = 64 * MIB
    largest = 0

    async def hook(request: TrackedRequest) -> None:
        nonlocal largest
        largest = max(largest, request.length)

    null = {"driver": "null-co", "size": size, "read-zeroes": True}
    options = ConvertOptions(min_sparse=0, workers=workers)
    _, error = convert([null], null, options, hook)
    assert error is None
    # Of chunks so large four are copied at a time.
    assert largest * min(workers, 4) <= 64 * MIB


def test_unreadable_sector_ends_it_and_the_step_it_is_in_is_named(tmp_path: Path) -> None:
    expected = _big(tmp_path)
    fault = {"event": "read_aio", "sector": 17 * MIB // SECTOR, "errno": errno.EIO}
    listener, error = convert(
        [raw(tmp_path / "source", [fault])],
        raw(tmp_path / "target"),
        ConvertOptions(workers=1, is_new=True),
    )
    assert error is not None
    assert error.errno == errno.EIO
    assert listener.failures == [(What.READ, 16 * MIB, errno.EIO)]
    before = expected[: 16 * MIB]
    assert (tmp_path / "target").read_bytes() == before + bytes(len(expected) - len(before))


def test_failure_that_does_not_come_again_is_a_failure(tmp_path: Path) -> None:
    _big(tmp_path)
    fault = {"event": "read_aio", "once": True}
    listener, error = convert(
        [raw(tmp_path / "source", [fault])], raw(tmp_path / "target"), ConvertOptions(workers=1)
    )
    assert error is not None
    assert listener.failures == [(What.READ, 0, errno.EIO)]


def test_full_target_ends_it_and_what_was_written_before_is_right(tmp_path: Path) -> None:
    expected = _big(tmp_path)
    fault = {"event": "write_aio", "sector": 13 * MIB // SECTOR, "errno": errno.ENOSPC}
    listener, error = convert(
        [raw(tmp_path / "source")], raw(tmp_path / "target", [fault]), ConvertOptions(is_new=True)
    )
    assert error is not None
    assert error.errno == errno.ENOSPC
    assert listener.failures == [(What.WRITE, 12 * MIB, errno.ENOSPC)]
    assert (tmp_path / "target").read_bytes()[: 12 * MIB] == expected[: 12 * MIB]


@settings(deadline=None, max_examples=20)
@given(bad=st.sets(st.integers(0, 99), max_size=4), in_order=st.booleans())
def test_salvaging_loses_the_sectors_that_cannot_be_read_and_no_others(
    bad: set[int], in_order: bool
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = b"".join(bytes([number + 1]) * SECTOR for number in range(100))
        (folder / "source").write_bytes(data)
        (folder / "target").write_bytes(b"\xee" * len(data))
        faults = [{"event": "read_aio", "sector": sector} for sector in sorted(bad)]
        listener, error = convert(
            [raw(folder / "source", faults)],
            raw(folder / "target"),
            ConvertOptions(salvage=True, in_order=in_order),
        )
        assert error is None
        assert listener.losses == [(What.READ, sector * SECTOR) for sector in sorted(bad)]
        for sector in range(100):
            place = slice(sector * SECTOR, (sector + 1) * SECTOR)
            expected = bytes(SECTOR) if sector in bad else data[place]
            assert (folder / "target").read_bytes()[place] == expected


def test_rate_is_kept(tmp_path: Path) -> None:
    """By the sum of what the budget was asked for: how long that takes is for the tests of the budget."""
    asked: list[int] = []
    _big(tmp_path, 4 * MIB)

    async def admit(_self: Any, _member: Any, way: int, length: int) -> None:
        assert way == 1
        asked.append(length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vhostblk.block.throttle_group.ThrottleGroup.admit", admit)
        _, error = convert(
            [raw(tmp_path / "source")], raw(tmp_path / "target"), ConvertOptions(rate=1000)
        )
    assert error is None
    assert sum(asked) == 4 * MIB


def test_overlay_gets_what_the_source_has_itself_and_the_rest_stays_below(tmp_path: Path) -> None:
    async def make() -> None:
        from vhostblk.block.iov import IoVec

        graph = BlockGraph()
        try:
            base, top = str(tmp_path / "base"), str(tmp_path / "top")
            await create_image(graph, base, "raw", size=MIB)
            (tmp_path / "base").write_bytes(b"b" * MIB)
            for name in (top, str(tmp_path / "target")):
                await create_image(
                    graph, name, "qcow2", size=MIB, backing_file=base, backing_format="raw"
                )
            user = await use(graph, qcow2(tmp_path / "top"), writable=True)
            await user.pwritev(128 << 10, IoVec.of(b"t" * (64 << 10)))
            await user.pwrite_zeroes(256 << 10, 64 << 10)
            await user.close()
        finally:
            await graph.close_all()

    def qcow2(path: Path) -> dict[str, Any]:
        return {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}

    asyncio.run(make())
    written: list[tuple[int, int]] = []

    async def hook(request: TrackedRequest) -> None:
        written.append((request.offset, request.length))

    options = ConvertOptions(is_new=True, has_backing=True)
    listener, error = convert([qcow2(tmp_path / "top")], qcow2(tmp_path / "target"), options, hook)
    assert error is None
    assert listener.failures == []
    assert sorted(written) == [(128 << 10, 64 << 10), (256 << 10, 64 << 10)]
    assert content(qcow2(tmp_path / "target")) == content(qcow2(tmp_path / "top"))
