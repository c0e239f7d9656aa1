"""Nodes that are files: their ends, files that shrink, what a file system lacks, flushes that fail."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.block.drivers.disks import read, with_file
from vhostblk.block import clear, pipeline
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers import file_ranges, host_file
from vhostblk.block.drivers.file import FileNode
from vhostblk.block.host_io import HostIO
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import align_up
from vhostblk.block.node import ExtentFlag, FlushTarget, Req
from vhostblk.errors import BlockError


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"i" * 65536)
    return path


@pytest.fixture
def memory_image() -> Iterator[Path]:
    path = Path("/dev/shm") / f"vhostblk-test-{os.getpid()}"
    path.write_bytes(b"i" * 65536)
    yield path
    path.unlink()


# ---------------------------------------------------------------- the end of the file


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1000, 4096 + 512])
@pytest.mark.parametrize("direct", [False, True])
def test_last_sector_that_the_file_does_not_fill_reads_as_zeroes(
    tmp_path: Path, size: int, direct: bool
) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(b"x" * size)

    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        assert backend.length == -(-size // 512) * 512
        assert await read(backend, 0, backend.length) == (b"x" * size).ljust(backend.length, b"\0")

    with_file(path, scenario, **{"cache.direct": direct})
    assert path.stat().st_size == size


def test_writing_the_last_sector_makes_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(b"x" * 1000)

    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        assert [extent.length for extent in await backend.extents(0, 1024)] == [512]
        assert await backend.extents(512, 512) == []
        await backend.pwritev(512, IoVec.of(b"y" * 512))
        assert await read(backend, 0, 1024) == b"x" * 512 + b"y" * 512
        assert [extent.length for extent in await backend.extents(0, 1024)] == [1024]

    with_file(path, scenario)
    assert path.stat().st_size == 1024


def test_zeroing_the_last_sector_makes_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(b"x" * 1000)

    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        await backend.pwrite_zeroes(512, 512)
        assert await read(backend, 0, 1024) == b"x" * 512 + bytes(512)

    with_file(path, scenario)
    assert path.read_bytes() == b"x" * 512 + bytes(512)


def test_what_makes_a_file_longer_never_makes_it_shorter_for_somebody_else(image: Path) -> None:
    """Formats write behind the end; a zero-write and a write further on may overtake each other."""

    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        for turn in range(50):
            end = node.length
            data = bytes([turn + 1]) * 4096
            await asyncio.gather(
                clear.pwrite_zeroes(node, end, 4096),
                pipeline.pwritev(node.lane, end + 65536, IoVec.of(data)),
            )
            assert path.stat().st_size == node.length == end + 65536 + 4096
            assert await read(backend, end + 65536, 4096) == data

    path = image
    with_file(path, scenario)


def test_padding_is_not_cut_off_while_others_write_behind_it(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_file, "_direct_alignment", lambda fd, logical: (4096, 4096))

    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        for turn in range(50):
            end = align_up(node.length, 4096)
            data = bytes([turn + 1]) * 4096
            await asyncio.gather(
                pipeline.pwritev(node.lane, end, IoVec.of(b"y" * 512)),
                pipeline.pwritev(node.lane, end + 8192, IoVec.of(data)),
            )
            assert await read(backend, end + 8192, 4096) == data

    with_file(image, scenario, **{"cache.direct": True})


def test_padding_of_a_direct_write_does_not_make_the_file_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(b"x" * (4096 + 512))
    monkeypatch.setattr(host_file, "_direct_alignment", lambda fd, logical: (4096, 4096))

    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        assert node.limits.request_alignment == 4096
        await backend.pwritev(4096, IoVec.of(b"y" * 512), Req.FUA)
        assert backend.length == 4096 + 512
        assert path.stat().st_size == 4096 + 512
        assert await read(backend, 4000, 608) == b"x" * 96 + b"y" * 512
        assert [extent.length for extent in await backend.extents(0, 4608)] == [4096]

    with_file(path, scenario, **{"cache.direct": True})


@pytest.mark.parametrize("direct", [False, True])
def test_file_that_shrinks_fails_reads_behind_its_new_end(image: Path, direct: bool) -> None:
    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        os.truncate(image, 8192)
        assert await read(backend, 0, 8192) == b"i" * 8192
        for offset, length in ((8192, 512), (4096, 8192), (60_000, 512)):
            with pytest.raises(BlockError) as caught:
                await read(backend, offset, length)
            assert caught.value.errno == errno.EIO
            assert "the file ends at" in str(caught.value)

    with_file(image, scenario, **{"cache.direct": direct})


def test_short_read_on_tmpfs_fails_too(memory_image: Path) -> None:
    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        os.truncate(memory_image, 8192)
        with pytest.raises(BlockError) as caught:
            await read(backend, 4096, 8192)
        assert caught.value.errno == errno.EIO

    with_file(memory_image, scenario)


def test_resize_changes_the_file_and_is_reported(image: Path) -> None:
    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        lengths: list[int] = []
        backend.attach(resized=lengths.append)
        await pipeline.truncate(node, 131_072)
        assert await read(backend, 65_536, 65_536) == bytes(65_536)
        os.truncate(image, 262_144)
        await node.refresh_length()
        assert lengths == [131_072, 262_144]
        assert await read(backend, 262_000, 144) == bytes(144)

    with_file(image, scenario)
    assert image.stat().st_size == 262_144


# ---------------------------------------------------------------- extents


def test_extent_is_the_file_with_the_hints_that_fit(image: Path, memory_image: Path) -> None:
    both = ExtentFlag.READ | ExtentFlag.WRITE
    for path, options, flags in (
        (image, {}, both | ExtentFlag.CACHED),
        (image, {"aio": "threads"}, both | ExtentFlag.CACHED | ExtentFlag.POOL),
        (image, {"cache.direct": True}, both | ExtentFlag.FIXED),
        (image, {"read-only": True}, ExtentFlag.READ | ExtentFlag.CACHED),
        (memory_image, {}, both | ExtentFlag.INLINE),
    ):

        async def scenario(
            backend: BlockBackend, node: FileNode, flags: ExtentFlag = flags
        ) -> None:
            (extent,) = await backend.extents(10_000, 1)
            assert (extent.offset, extent.length, extent.host_offset) == (0, 65_536, 0)
            assert extent.flags == flags
            if flags & ExtentFlag.FIXED:
                assert extent.request_alignment >= 512
                assert extent.memory_alignment >= 512
            else:
                assert extent.request_alignment == extent.memory_alignment == 1

        with_file(path, scenario, **options)


# ---------------------------------------------------------------- flush and FUA


class Watched:
    """What reaches the file I/O below a node; may fail."""

    def __init__(self, node: FileNode, monkeypatch: pytest.MonkeyPatch) -> None:
        self.syncs = 0
        self.durable_writes: list[bool] = []
        self.error = 0
        io = node._io
        real_pwritev = io.pwritev

        async def fdatasync(fd: int) -> None:
            self.syncs += 1
            if self.error:
                raise BlockError(self.error)

        async def pwritev(fd: int, offset: int, iov: IoVec, dsync: bool = False) -> None:
            self.durable_writes.append(dsync)
            await real_pwritev(fd, offset, iov, dsync)

        monkeypatch.setattr(io, "fdatasync", fdatasync)
        monkeypatch.setattr(io, "pwritev", pwritev)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[FileNode], Watched]:
    return lambda node: Watched(node, monkeypatch)


def test_flush_is_fdatasync_and_fua_is_a_write_and_one_more(
    image: Path, watch: Callable[[FileNode], Watched]
) -> None:
    """RWF_DSYNC would take the error of a write that the page cache has lost, and a flush would know nothing of it."""

    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        watched = watch(node)
        await backend.pwritev(0, IoVec.of(b"x"))
        await backend.flush()
        await backend.pwritev(0, IoVec.of(b"x"), Req.FUA)
        assert watched.syncs == 2
        assert watched.durable_writes == [False, False]
        assert backend.flush_target() == node._fd

    with_file(image, scenario)


def test_fua_is_a_durable_write_with_o_direct(
    image: Path, watch: Callable[[FileNode], Watched]
) -> None:
    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        watched = watch(node)
        await backend.flush()
        await backend.pwritev(0, IoVec.of(bytes(4096)), Req.FUA)
        assert watched.syncs == 1
        assert watched.durable_writes == [True]

    with_file(image, scenario, **{"cache.direct": "on"})


def test_flush_takes_back_the_right_to_flush_before_and_gives_it_again_after(image: Path) -> None:
    """Of two fdatasyncs at a time one may succeed although the other is told of a lost write."""

    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        told: list[object] = []
        real = node._io.fdatasync

        async def revoke_flush() -> None:
            told.append(backend.flush_target())
            await asyncio.sleep(0)
            told.append("the engine has ended")

        async def fdatasync(fd: int) -> None:
            told.append(backend.flush_target())
            await real(fd)

        node._io.fdatasync = fdatasync  # type: ignore[method-assign]
        backend.attach(revoke_flush=revoke_flush)
        await backend.pwritev(0, IoVec.of(b"x"))
        assert backend.flush_target() == node._fd
        await backend.flush()
        assert told == [FlushTarget.ASK, "the engine has ended", FlushTarget.ASK]
        assert backend.flush_target() == node._fd
        node._io.fdatasync = real  # type: ignore[method-assign]

    with_file(image, scenario)


@pytest.mark.warns("the test: flush at close failed", "node 'd': flush at close failed")
def test_flush_of_the_engine_that_fails_while_ours_waits_for_it_is_a_failure_of_ours(
    image: Path, watch: Callable[[FileNode], Watched]
) -> None:
    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        watched = watch(node)

        async def revoke_flush() -> None:
            backend.flush_failed(errno.EIO)

        backend.attach(revoke_flush=revoke_flush)
        await backend.pwritev(0, IoVec.of(b"x"))
        with pytest.raises(BlockError, match="earlier flush"):
            await backend.flush()
        assert watched.syncs == 0

    with_file(image, scenario)


def test_fua_zero_write_is_followed_by_a_flush(
    image: Path, watch: Callable[[FileNode], Watched]
) -> None:
    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        watched = watch(node)
        await backend.flush()
        for count in (2, 3):
            await backend.pwrite_zeroes(0, 4096, False, Req.FUA)
            assert watched.syncs == count

    with_file(image, scenario)


def test_no_flush_syncs_nothing_ever(image: Path, watch: Callable[[FileNode], Watched]) -> None:
    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        watched = watch(node)
        await backend.pwritev(0, IoVec.of(b"x"), Req.FUA)
        await backend.flush()
        assert watched.syncs == 0
        assert watched.durable_writes == [False]
        assert backend.flush_target() is FlushTarget.NOTHING

    with_file(image, scenario, **{"cache.no-flush": "on"})


def test_flush_with_aio_threads_never_goes_through_the_engines_io_uring(image: Path) -> None:
    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        assert backend.flush_target() is FlushTarget.ASK

    with_file(image, scenario, aio="threads")


@pytest.mark.warns("the test: flush at close failed", "node 'd': flush at close failed")
def test_flush_that_failed_once_through_the_page_cache_fails_for_ever(
    image: Path, watch: Callable[[FileNode], Watched]
) -> None:
    """The kernel reports lost pages once; the next fdatasync succeeds although they are lost."""

    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        watched = watch(node)
        await backend.pwritev(0, IoVec.of(b"x"))
        watched.error = errno.EIO
        with pytest.raises(BlockError):
            await backend.flush()
        watched.error = 0
        with pytest.raises(BlockError, match="earlier flush"):
            await backend.flush()
        assert backend.flush_target() is FlushTarget.ASK

    with_file(image, scenario)


@pytest.mark.warns("the test: flush at close failed", "node 'd': flush at close failed")
def test_flush_that_failed_in_the_engine_counts_too(image: Path) -> None:
    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        backend.flush_failed(errno.EIO)
        await backend.pwritev(0, IoVec.of(b"x"))
        with pytest.raises(BlockError):
            await backend.flush()

    with_file(image, scenario)


def test_flush_that_failed_with_o_direct_may_succeed_later(
    image: Path, watch: Callable[[FileNode], Watched]
) -> None:
    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        watched = watch(node)
        watched.error = errno.EIO
        with pytest.raises(BlockError):
            await backend.flush()
        watched.error = 0
        await backend.flush()
        assert watched.syncs == 2

    with_file(image, scenario, **{"cache.direct": True})


# ---------------------------------------------------------------- what file systems lack


class Fallocate:
    """Stands in for fallocate: some modes do not exist here."""

    def __init__(self, missing: set[int], error: int = errno.EOPNOTSUPP) -> None:
        self.missing = missing
        self.error = error
        self.asked: list[int] = []

    async def __call__(self, fd: int, mode: int, offset: int, length: int) -> None:
        self.asked.append(mode)
        if mode in self.missing:
            raise BlockError(self.error)


def lacking(node: FileNode, monkeypatch: pytest.MonkeyPatch, missing: set[int]) -> Fallocate:
    fallocate = Fallocate(missing)
    io: HostIO = node._io
    monkeypatch.setattr(io, "fallocate", fallocate)
    return fallocate


PUNCH, ZERO, ALLOCATE = file_ranges._PUNCH, file_ranges._ZERO, file_ranges._ALLOCATE


@pytest.mark.parametrize(
    ("missing", "may_unmap", "first", "second"),
    [
        (set(), True, [PUNCH], [PUNCH]),
        (set(), False, [ZERO], [ZERO]),
        ({PUNCH}, True, [PUNCH, ZERO], [ZERO]),
        ({ZERO}, False, [ZERO, PUNCH, ALLOCATE], [PUNCH, ALLOCATE]),
        ({ZERO, ALLOCATE}, False, [ZERO, PUNCH, ALLOCATE], []),
        ({ZERO, PUNCH}, False, [ZERO, PUNCH], []),
        ({ZERO, PUNCH, ALLOCATE}, True, [PUNCH, ZERO], []),
    ],
)
def test_zero_write_finds_what_works_and_remembers_what_does_not(
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: set[int],
    may_unmap: bool,
    first: list[int],
    second: list[int],
) -> None:
    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        fallocate = lacking(node, monkeypatch, missing)
        await backend.pwrite_zeroes(0, 4096, may_unmap)
        assert fallocate.asked == first
        if not second:
            # Zeroes were written as data instead.
            assert await read(backend, 0, 4096) == bytes(4096)
        fallocate.asked.clear()
        await backend.pwrite_zeroes(4096, 4096, may_unmap)
        assert fallocate.asked == second

    with_file(image, scenario)


def test_discard_without_holes_succeeds_and_is_not_tried_again(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        assert backend.can_discard
        fallocate = lacking(node, monkeypatch, {PUNCH})
        await backend.pdiscard(0, 4096)
        await backend.pdiscard(0, 4096)
        assert fallocate.asked == [PUNCH]

    with_file(image, scenario)


def test_real_errors_of_fallocate_are_not_taken_for_a_missing_feature(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        fallocate = Fallocate({PUNCH, ZERO}, errno.ENOSPC)
        monkeypatch.setattr(node._io, "fallocate", fallocate)
        for request in (backend.pwrite_zeroes(0, 4096), backend.pdiscard(0, 4096)):
            with pytest.raises(BlockError) as caught:
                await request
            assert caught.value.errno == errno.ENOSPC

    with_file(image, scenario)


def test_discard_frees_space_and_discard_ignore_does_not(image: Path) -> None:
    for discard, kept in (("ignore", True), ("unmap", False)):
        image.write_bytes(b"i" * 65536)
        os.sync()

        async def scenario(backend: BlockBackend, node: FileNode) -> None:
            await backend.pdiscard(0, 65536)

        with_file(image, scenario, discard=discard)
        assert bool(image.stat().st_blocks) is kept
    assert stat.S_ISREG(image.stat().st_mode)


def test_kernel_without_nowait_reads_in_the_background(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    asked: list[int] = []

    def preadv(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        asked.append(flags)
        if flags & os.RWF_NOWAIT:
            raise OSError(errno.EOPNOTSUPP, "no")
        return real(fd, buffers, offset, flags)

    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        monkeypatch.setattr(os, "preadv", preadv)
        for _ in range(2):
            assert await read(backend, 0, 4) == b"iiii"
        assert asked.count(os.RWF_NOWAIT) == 1

    with_file(image, scenario)


def test_partly_cached_read_is_completed_in_the_background(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def preadv(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            return real(fd, [buffers[0][:100]], offset)
        return real(fd, buffers, offset, flags)

    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        monkeypatch.setattr(os, "preadv", preadv)
        assert await read(backend, 0, 4096) == b"i" * 4096

    with_file(image, scenario)
