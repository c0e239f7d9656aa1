"""What every driver promises, whatever is behind it: the same suite for all of them, on every kind of file I/O."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.disks import read
from tests.nbd_server import Server
from tests.schedule import HUNT
from vhostblk import native
from vhostblk.block import host_io
from vhostblk.block.backend import BlockBackend
from vhostblk.block.graph import BlockGraph
from vhostblk.block.host_io import HostIO, ThreadHostIO
from vhostblk.block.iov import IoVec
from vhostblk.block.node import ExtentFlag, FlushTarget, Req
from vhostblk.errors import BlockError, ConfigError

SIZE = 256 * 1024
FUA = int(Req.FUA)


@dataclass(frozen=True)
class Case:
    """One way to have a disk of SIZE bytes; `{file}` is a path where a file of SIZE + 8192 bytes is."""

    name: str
    options: dict[str, Any]
    keeps_data: bool = True
    folder: str = "disk"  # or "memory": a tmpfs

    def __str__(self) -> str:
        return self.name


FILE = {"driver": "file", "filename": "{file}", "discard": "unmap"}
DIRECT = {**FILE, "cache": {"direct": True}}
# An NBD server in the test's own loop: `run` starts it.
NBD = {"driver": "nbd", "path": "{file}.nbd", "discard": "unmap"}
CASES: tuple[Case, ...] = (
    Case("file", {**FILE}),
    Case("file-tmpfs", {**FILE}, folder="memory"),
    Case("file-direct", {**DIRECT}),
    Case("file-no-flush", {**FILE, "cache.no-flush": "on"}),
    Case("memory", {"driver": "memory", "size": SIZE, "discard": "unmap"}),
    Case("null", {"driver": "null-co", "size": SIZE}, keeps_data=False),
    Case("null-zeroes", {"driver": "null-co", "size": SIZE, "read-zeroes": True}, keeps_data=False),
    Case("null-latency", {"driver": "null-co", "size": SIZE, "latency-ns": 1}, keeps_data=False),
    Case("raw-whole", {"driver": "raw", "discard": "unmap", "file": FILE}),
    Case("raw-window", {"driver": "raw", "offset": 4096, "size": SIZE, "file": FILE}),
    Case("raw-odd-window", {"driver": "raw", "offset": 777, "size": SIZE, "file": FILE}),
    Case("raw-window-direct", {"driver": "raw", "offset": 512, "size": SIZE, "file": DIRECT}),
    Case(
        "raw-raw-memory",
        {
            "driver": "raw",
            "offset": 512,
            "file": {
                "driver": "raw",
                "offset": 1024,
                "file": {"driver": "memory", "size": SIZE + 1536},
            },
        },
    ),
)
CASES += (
    Case(
        "copy-before-write",
        {
            "driver": "copy-before-write",
            "discard": "unmap",
            "file": FILE,
            "target": {"driver": "memory", "size": SIZE + 8192},
        },
    ),
)
# Names of sockets are short, and those of folders on the disk are not.
CASES += (
    Case("nbd", {**NBD}, folder="memory"),
    Case("nbd-raw", {"driver": "raw", "discard": "unmap", "file": NBD}, folder="memory"),
)
KEEPING = tuple(case for case in CASES if case.keeps_data)
ASKED_EACH_TIME = ("nbd", "nbd-raw", "null-latency")  # they have no extents
KINDS = ("python", "threads", "io_uring")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which file I/O the drivers get."""
    kind: str = request.param
    if kind == "python":
        monkeypatch.setattr("vhostblk.block.graph.create_host_io", lambda aio: ThreadHostIO())
    elif not native.available:
        pytest.skip("the engine is not built")
    else:
        if kind == "io_uring" and native.io_uring_error():
            pytest.skip(f"io_uring: {os.strerror(native.io_uring_error())}")

        def create(aio: str | None) -> HostIO:
            return host_io.NativeHostIO(kind)

        monkeypatch.setattr("vhostblk.block.graph.create_host_io", create)
    return kind


@pytest.fixture
def folders(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A folder on a disk, where there is one, and one in memory."""
    memory = Path("/dev/shm") / f"vhostblk-test-{os.getpid()}"
    memory.mkdir()
    yield {"disk": tmp_path, "memory": memory}
    for path in memory.iterdir():
        path.unlink()
    memory.rmdir()


def place(options: Any, file: str) -> Any:
    """The options with every `{file}` filled in."""
    if isinstance(options, dict):
        return {key: place(value, file) for key, value in options.items()}
    return options.replace("{file}", file) if isinstance(options, str) else options


def run(
    case: Case,
    folders: dict[str, Path],
    scenario: Callable[[BlockBackend], Awaitable[None]],
    *,
    whole: bool = False,
    **options: Any,
) -> None:
    """Open the case's disk, run, close, and see that nothing is left open."""
    path = folders[case.folder] / "disk.img"
    path.unlink(missing_ok=True)
    path.write_bytes(bytes(SIZE if whole else SIZE + 8192))

    async def everything() -> None:
        before = set(os.listdir("/proc/self/fd"))
        if case.name.startswith("nbd"):
            async with Server(size=path.stat().st_size).serving(Path(f"{path}.nbd")):
                await use()
        else:
            await use()
        assert set(os.listdir("/proc/self/fd")) == before

    async def use() -> None:
        graph = BlockGraph()
        try:
            node = await graph.add(place(case.options, str(path)) | options)
        except ConfigError as error:
            await graph.close_all()
            if "O_DIRECT" in str(error):
                pytest.skip(str(error))
            raise
        backend = BlockBackend(node, "the test", writable=not node.read_only)
        try:
            await scenario(backend)
        finally:
            await backend.close()
            await graph.close_all()

    asyncio.run(everything())


def pattern(length: int, seed: int = 1) -> bytes:
    return bytes((seed + position * 7) % 251 + 1 for position in range(251)) * (length // 251 + 1)


@pytest.mark.parametrize("case", KEEPING, ids=str)
def test_what_was_written_is_read_at_any_alignment(
    case: Case, kind: str, folders: dict[str, Path]
) -> None:
    async def scenario(backend: BlockBackend) -> None:
        model = bytearray(backend.length)
        for number, (offset, length) in enumerate(
            [(0, 512), (1, 1), (511, 2), (1000, 5000), (4095, 4097), (65536, 70000), (100, 0)]
        ):
            content = pattern(length, number)[:length]
            await backend.pwritev(offset, IoVec.of(content[: length // 3], content[length // 3 :]))
            model[offset : offset + length] = content
        for offset, length in [(0, 200_000), (1, 511), (511, 4099), (4096, 8192), (7, 0)]:
            assert await read(backend, offset, length) == model[offset : offset + length]
        end = backend.length
        await backend.pwritev(end - 5, IoVec.of(b"tail!"))
        assert await read(backend, end - 6, 6) == b"\0tail!"

    run(case, folders, scenario)


@pytest.mark.parametrize("case", KEEPING, ids=str)
def test_zero_writes_read_as_zeroes_and_touch_nothing_else(
    case: Case, kind: str, folders: dict[str, Path]
) -> None:
    async def scenario(backend: BlockBackend) -> None:
        model = bytearray(pattern(200_000)[:200_000])
        await backend.pwritev(0, IoVec.of(bytes(model)))
        for offset, length, may_unmap, flags in [
            (4096, 8192, True, 0),
            (20_480, 8192, False, 0),
            (40_001, 9_999, True, FUA),
            (60_001, 3, False, FUA),
            (70_000, 0, True, 0),
            (80_000, 100_000, False, 0),
        ]:
            await backend.pwrite_zeroes(offset, length, may_unmap, flags)
            model[offset : offset + length] = bytes(length)
            assert await read(backend, 0, 200_000) == model

    run(case, folders, scenario)


@pytest.mark.parametrize("case", KEEPING, ids=str)
def test_discard_keeps_to_its_range(case: Case, kind: str, folders: dict[str, Path]) -> None:
    async def scenario(backend: BlockBackend) -> None:
        content = pattern(100_000)[:100_000]
        await backend.pwritev(0, IoVec.of(content))
        await backend.pdiscard(5_001, 60_000)
        assert await read(backend, 0, 5_001) == content[:5_001]
        assert await read(backend, 65_001, 34_999) == content[65_001:]
        await backend.pwritev(5_001, IoVec.of(content[5_001:65_001]))
        assert await read(backend, 0, 100_000) == content

    run(case, folders, scenario)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_operation_succeeds_durably_and_twice(
    case: Case, kind: str, folders: dict[str, Path]
) -> None:
    async def scenario(backend: BlockBackend) -> None:
        for _ in range(2):
            await backend.pwritev(512, IoVec.of(bytes(1024)), FUA)
            await backend.pwrite_zeroes(512, 1024, False, FUA)
            await backend.pdiscard(512, 1024)
            await backend.flush()
            await read(backend, 512, 1024)
        backend.write_cache = False
        await backend.pwritev(3, IoVec.of(b"x"))
        assert not backend.in_flight

    run(case, folders, scenario)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_length_and_sizes_make_sense(case: Case, kind: str, folders: dict[str, Path]) -> None:
    async def scenario(backend: BlockBackend) -> None:
        assert backend.length % 512 == 0
        sizes = backend.block_sizes
        assert sizes.logical >= 512
        assert sizes.physical >= sizes.logical
        assert sizes.physical % sizes.logical == 0
        for offset, length in [(backend.length, 1), (backend.length - 1, 2), (-1, 1)]:
            with pytest.raises(BlockError):
                await read(backend, offset, length)

    run(case, folders, scenario)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_read_only_disk_reads_and_refuses_the_rest(
    case: Case, kind: str, folders: dict[str, Path]
) -> None:
    async def scenario(backend: BlockBackend) -> None:
        await read(backend, 100, 1000)
        for request in (
            backend.pwritev(0, IoVec.of(b"x")),
            backend.pwrite_zeroes(0, 512),
            backend.pdiscard(0, 512),
        ):
            with pytest.raises(BlockError):
                await request
        await backend.flush()
        for extent in await backend.extents(0, 4096):
            assert not extent.flags & ExtentFlag.WRITE
        with pytest.raises(ConfigError, match="read-only"):
            BlockBackend(backend.node, "a writer", writable=True)

    run(case, folders, scenario, **{"read-only": True})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_extents_say_the_truth(case: Case, kind: str, folders: dict[str, Path]) -> None:
    """What is read and written through an extent is what the block layer sees."""

    async def scenario(backend: BlockBackend) -> None:
        await backend.pwritev(0, IoVec.of(pattern(16_384)[:16_384]))
        await backend.flush()
        found = await backend.extents(0, backend.length)
        assert bool(found) == (case.name not in ASKED_EACH_TIME)
        for extent in found:
            assert extent.offset >= 0
            assert extent.end <= backend.length
            if extent.fd is None:
                assert extent.flags & (ExtentFlag.ZERO | ExtentFlag.NULL)
                continue
            fd = os.open(f"/proc/self/fd/{extent.fd}", os.O_RDWR)  # without O_DIRECT
            try:
                seen = os.pread(fd, 4096, extent.host_offset)
                assert seen == await read(backend, extent.offset, 4096)
                os.pwrite(fd, b"external", extent.host_offset)
                assert await read(backend, extent.offset, 8) == b"external"
                assert os.fstat(fd).st_size >= extent.host_offset + extent.length
            finally:
                os.close(fd)

    run(case, folders, scenario)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_flush_target_is_a_file_or_a_reason(
    case: Case, kind: str, folders: dict[str, Path]
) -> None:
    async def scenario(backend: BlockBackend) -> None:
        target = backend.flush_target()
        if isinstance(target, int):
            os.fdatasync(target)
        expected = {
            "null-latency": FlushTarget.ASK,
            "nbd": FlushTarget.ASK,
            "nbd-raw": FlushTarget.ASK,
            "null": FlushTarget.NOTHING,
            "null-zeroes": FlushTarget.NOTHING,
            "memory": FlushTarget.NOTHING,
            "raw-raw-memory": FlushTarget.NOTHING,
            "file-no-flush": FlushTarget.NOTHING,
        }.get(case.name)
        assert target is expected if expected else isinstance(target, int)

    run(case, folders, scenario)


@pytest.mark.parametrize("case", KEEPING, ids=str)
def test_concurrent_requests_of_all_kinds_keep_neighbours_apart(
    case: Case, kind: str, folders: dict[str, Path]
) -> None:
    """Many writers, each with its own odd bytes, sharing all the blocks."""

    async def scenario(backend: BlockBackend) -> None:
        writers = 64

        async def one(number: int) -> None:
            for turn in range(4):
                offset = (turn * writers + number) * 333
                if number % 8 == 7:
                    await backend.pwritev(offset, IoVec.of(b"\xff" * 333))
                    await backend.pwrite_zeroes(offset, 333)
                else:
                    await backend.pwritev(offset, IoVec.of(bytes([number + 1]) * 333))

        await asyncio.gather(*(one(number) for number in range(writers)))
        expected = b"".join(
            bytes([0 if number % 8 == 7 else number + 1]) * 333
            for _ in range(4)
            for number in range(writers)
        )
        assert await read(backend, 0, len(expected)) == expected

    run(case, folders, scenario)


def test_inline_drivers_finish_without_suspending(folders: dict[str, Path]) -> None:
    """A task per request costs more than the request: there must be none."""

    async def scenario(backend: BlockBackend) -> None:
        buffer = bytearray(4096)
        for coro in (
            backend.pwritev(4096, IoVec.of(bytes(4096))),
            backend.preadv(4096, IoVec.of(buffer)),
            backend.pwrite_zeroes(4096, 4096),
            backend.flush(),
        ):
            with pytest.raises(StopIteration):
                coro.send(None)

    for case in CASES:
        if case.name in ("memory", "null", "null-zeroes", "raw-raw-memory"):
            run(case, folders, scenario)


def test_page_cached_reads_and_everything_on_tmpfs_finish_without_suspending(
    folders: dict[str, Path],
) -> None:
    async def scenario(backend: BlockBackend) -> None:
        await backend.pwritev(0, IoVec.of(b"cached" * 1000))
        with pytest.raises(StopIteration):
            backend.preadv(0, IoVec.of(bytearray(6000))).send(None)

    for case in CASES:
        if case.name in ("file", "file-tmpfs", "raw-whole"):
            run(case, folders, scenario)


requests = st.lists(
    st.tuples(
        st.sampled_from(["read", "write", "zero", "unmap", "fua"]),
        st.integers(0, SIZE - 1),
        st.integers(0, 9000),
    ),
    max_size=8,
)


@settings(
    max_examples=25 * HUNT,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(requests)
@pytest.mark.parametrize("case", KEEPING, ids=str)
def test_random_requests_behave_like_a_byte_array(
    case: Case, folders: dict[str, Path], script: list[tuple[str, int, int]]
) -> None:
    async def scenario(backend: BlockBackend) -> None:
        model = bytearray(SIZE)
        for number, (what, offset, length) in enumerate(script):
            end = min(offset + length, SIZE)
            length = end - offset
            if what == "read":
                assert await read(backend, offset, length) == model[offset:end]
            elif what in ("write", "fua"):
                content = pattern(length, number)[:length]
                await backend.pwritev(offset, IoVec.of(content), FUA if what == "fua" else 0)
                model[offset:end] = content
            else:
                await backend.pwrite_zeroes(offset, length, what == "unmap")
                model[offset:end] = bytes(length)
        assert await read(backend, 0, SIZE) == model

    run(case, folders, scenario)
