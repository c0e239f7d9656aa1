"""File I/O under the drivers: both implementations, failures, cancellation."""

from __future__ import annotations

import asyncio
import collections
import errno
import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.requirements import require
from tests.unit.block.fakes import turns
from vhostblk import native
from vhostblk.block.host_io import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    HostIO,
    NativeHostIO,
    ThreadHostIO,
    create_host_io,
)
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError, ConfigError
from vhostblk.native import IOPart

Scenario = Callable[[HostIO], Awaitable[None]]


@pytest.fixture(params=["python", "threads", "io_uring"])
def run(request: pytest.FixtureRequest) -> Callable[[Scenario], None]:
    """Run a scenario on one implementation, then close that."""
    if request.param != "python" and not native.available:
        pytest.skip("the engine is not built")
    if request.param == "io_uring" and native.io_uring_error():
        pytest.skip("io_uring does not work here")

    def run_scenario(scenario: Scenario) -> None:
        async def everything() -> None:
            io = ThreadHostIO() if request.param == "python" else NativeHostIO(request.param)
            assert io.kind == request.param.replace("python", "threads")
            try:
                await scenario(io)
            finally:
                await io.close()

        # Where asyncio notes where each of thousands of futures comes from, that is what takes the time.
        asyncio.run(everything(), debug=False)

    return run_scenario


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def test_vectors_are_written_and_read(run: Callable[[Scenario], None], fd: int) -> None:
    async def scenario(io: HostIO) -> None:
        for dsync in (False, True):
            await io.pwritev(fd, 10, IoVec.of(b"ab", b"", b"cdef"), dsync)
            first, second = bytearray(3), bytearray(3)
            assert await io.preadv(fd, 10, IoVec.of(first, second)) == 6
            assert first + second == b"abcdef"
        await io.fdatasync(fd)

    run(scenario)


def test_read_is_short_only_at_the_end(run: Callable[[Scenario], None], fd: int) -> None:
    async def scenario(io: HostIO) -> None:
        await io.pwritev(fd, 0, IoVec.of(b"x" * 1000))
        assert await io.preadv(fd, 900, IoVec.of(bytearray(50), bytearray(500))) == 100
        assert await io.preadv(fd, 1000, IoVec.of(bytearray(1))) == 0

    run(scenario)


def test_transfer_does_all_parts_in_order(run: Callable[[Scenario], None], fd: int) -> None:
    """More than one call takes, next to each other and apart, of two files."""
    sizes = [3 << 20, 512, 512, 1 << 20, *[4096] * 100]
    content = [bytearray(os.urandom(size)) for size in sizes]
    places = [sum(sizes[:n]) + (n > 2) * 4096 for n in range(len(sizes))]

    async def scenario(io: HostIO) -> None:
        other = os.open("/dev/null", os.O_RDWR)
        try:
            parts = [IOPart(fd, *part) for part in zip(places, content, strict=True)]
            parts.insert(1, IOPart(other, 0, bytes(4096)))
            assert await io.transfer(parts, write=True) == sum(sizes) + 4096
        finally:
            os.close(other)
        for place, part in zip(places, content, strict=True):
            assert os.pread(fd, len(part), place) == part
        again = [bytearray(size) for size in sizes]
        parts = [IOPart(fd, *part) for part in zip(places, again, strict=True)]
        assert await io.transfer(parts, write=False) == sum(sizes)
        assert again == content

    run(scenario)


def test_transfer_ends_where_a_file_does_or_fails(run: Callable[[Scenario], None], fd: int) -> None:
    async def scenario(io: HostIO) -> None:
        os.pwrite(fd, b"x" * 1000, 0)
        first, second = bytearray(600), bytearray(b"y" * 600)
        parts = [IOPart(fd, 0, first), IOPart(fd, 2000, bytearray(1)), IOPart(fd, 0, second)]
        assert await io.transfer(parts, write=False) == 600
        assert await io.transfer([IOPart(fd, 500, first)], write=False) == 500
        assert second == b"y" * 600
        full = os.open("/dev/full", os.O_RDWR)
        try:
            parts = [IOPart(fd, 0, b"a"), IOPart(full, 0, b"b"), IOPart(fd, 1, b"c")]
            with pytest.raises(BlockError) as caught:
                await io.transfer(parts, write=True)
        finally:
            os.close(full)
        assert caught.value.errno == errno.ENOSPC
        assert os.pread(fd, 3, 0) == b"axx"

    run(scenario)


def test_fallocate_punches_holes(run: Callable[[Scenario], None], fd: int) -> None:
    async def scenario(io: HostIO) -> None:
        await io.pwritev(fd, 0, IoVec.of(b"x" * 12288))
        await io.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 4096, 4096)
        assert os.pread(fd, 12288, 0) == b"x" * 4096 + bytes(4096) + b"x" * 4096

    run(scenario)


def test_kernel_errors_keep_their_errno(run: Callable[[Scenario], None], fd: int) -> None:
    async def scenario(io: HostIO) -> None:
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        closed = os.open("/dev/full", os.O_RDWR)
        try:
            for expected, coro in (
                (errno.EBADF, io.pwritev(reader, 0, IoVec.of(b"x"))),
                (errno.ENOSPC, io.pwritev(closed, 0, IoVec.of(b"x"))),
                (errno.EBADF, io.preadv(999, 0, IoVec.of(bytearray(1)))),
                (errno.EBADF, io.fdatasync(999)),
                (errno.EBADF, io.fallocate(reader, 0, 0, 1)),
            ):
                with pytest.raises(BlockError) as caught:
                    await coro
                assert caught.value.errno == expected
        finally:
            os.close(reader)
            os.close(closed)

    run(scenario)


def test_many_at_once_all_finish(run: Callable[[Scenario], None], fd: int) -> None:
    """More than any queue is deep."""

    async def scenario(io: HostIO) -> None:
        count = 3000
        await asyncio.gather(*(io.pwritev(fd, n, IoVec.of(bytes([n % 251]))) for n in range(count)))
        assert os.pread(fd, count, 0) == bytes(n % 251 for n in range(count))

    run(scenario)


class Submissions:
    """How many requests each submission had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        submit = native.HostIO.submit

        def spy(io: native.HostIO, requests: Sequence[native.IORequest]) -> int:
            self.sizes.append(len(requests))
            return submit(io, requests)

        monkeypatch.setattr(native.HostIO, "submit", spy)


def test_burst_of_64_requests_is_one_submission_and_nested_plugs_submit_once(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("engine")
    submissions = Submissions(monkeypatch)

    async def scenario() -> None:
        io = NativeHostIO("auto")
        for number in (64, 63):
            submissions.sizes = []
            io.plug()
            io.plug()
            writes = [
                asyncio.create_task(io.pwritev(fd, n, IoVec.of(bytes([number + n]))))
                for n in range(number)
            ]
            await turns(1)
            io.unplug()
            assert submissions.sizes == ([64] if number == 64 else [])  # enough not to wait
            io.unplug()
            assert submissions.sizes == [number]
            await asyncio.gather(*writes)
            assert os.pread(fd, number, 0) == bytes(range(number, 2 * number))
        await io.fdatasync(fd)
        assert submissions.sizes == [63, 1]
        await io.close()

    asyncio.run(scenario())


def test_what_the_engine_did_not_take_of_a_burst_follows_when_it_has_room(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("engine")
    submissions = Submissions(monkeypatch)

    async def scenario() -> None:
        io = NativeHostIO("auto")
        io.plug()
        writes = [
            asyncio.create_task(io.pwritev(fd, n, IoVec.of(bytes([n % 251])))) for n in range(1500)
        ]
        await turns(1)
        io.unplug()
        assert 0 < sum(submissions.sizes) < 1500  # the others are not offered again and again
        await asyncio.gather(*writes)
        assert os.pread(fd, 1500, 0) == bytes(n % 251 for n in range(1500))
        await io.close()

    asyncio.run(scenario())


def test_calls_run_in_another_thread_and_raise_here(run: Callable[[Scenario], None]) -> None:
    async def scenario(io: HostIO) -> None:
        assert await io.call(threading.get_ident) != threading.get_ident()
        with pytest.raises(FileNotFoundError):
            await io.call(os.stat, "/nonexistent")

    run(scenario)


def test_files_that_hang_leave_threads_for_others(run: Callable[[Scenario], None]) -> None:
    async def scenario(io: HostIO) -> None:
        gate = threading.Event()
        begun: collections.Counter[int] = collections.Counter()

        def hang(file: int) -> None:
            begun[file] += 1
            gate.wait(30)

        hanging = [
            asyncio.create_task(io.call(hang, file, file=file))
            for file in range(4)
            for _ in range(40)
        ]
        await turns(3)
        for _ in range(3):
            assert await io.call(len, "abc", file=4) == 3
        assert max(begun.values()) <= 16
        gate.set()
        await asyncio.gather(*hanging)
        assert begun == dict.fromkeys(range(4), 40)

    run(scenario)


def test_call_that_waits_for_its_turn_can_be_cancelled(run: Callable[[Scenario], None]) -> None:
    async def scenario(io: HostIO) -> None:
        gate = threading.Event()
        done: list[int] = []
        hanging = [asyncio.create_task(io.call(gate.wait, 30, file=1)) for _ in range(16)]
        late = [asyncio.create_task(io.call(done.append, n, file=1)) for n in range(4)]
        await turns(3)
        late[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await late.pop(1)
        gate.set()
        await asyncio.gather(*hanging, *late)
        assert sorted(done) == [0, 2, 3]

    run(scenario)


def test_cancelled_waiter_is_released_only_when_the_call_is_over(
    run: Callable[[Scenario], None],
) -> None:
    """Its buffers may be written until then."""

    async def scenario(io: HostIO) -> None:
        gate = threading.Event()
        task = asyncio.create_task(io.call(gate.wait, 30))
        await turns(2)
        task.cancel()
        await turns(5)
        assert not task.done()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario)


def test_cancelled_waiter_gets_the_error_as_the_cause(run: Callable[[Scenario], None]) -> None:
    """The kernel tells of it once; a driver that must know must be able to."""

    causes: list[BaseException | None] = []

    async def flush(io: HostIO) -> None:
        try:
            await io.fdatasync(1 << 20)
        except asyncio.CancelledError as cancelled:
            causes.append(cancelled.__cause__)
            raise

    async def scenario(io: HostIO) -> None:
        request = asyncio.create_task(flush(io))
        await turns(1)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request

    run(scenario)
    (cause,) = causes
    assert isinstance(cause, BlockError)
    assert cause.errno == errno.EBADF


def test_what_a_cancelled_call_has_made_is_undone(run: Callable[[Scenario], None], fd: int) -> None:
    async def scenario(io: HostIO) -> None:
        undone: list[int] = []
        request = asyncio.create_task(io.call(os.dup, fd, undo=undone.append))
        await turns(1)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        os.close(undone.pop())

    run(scenario)


def test_io_uring_where_it_is_forbidden_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(native, "available", True)
        monkeypatch.setattr(native, "io_uring_error", lambda: errno.EPERM)
        with pytest.raises(ConfigError, match="'io_uring' here: Operation not permitted"):
            create_host_io("io_uring")
        monkeypatch.setattr(native, "available", False)
        with pytest.raises(ConfigError, match="the engine is not built"):
            create_host_io("io_uring")
        for aio in ("threads", None):
            io = create_host_io(aio)
            assert isinstance(io, ThreadHostIO)
            await io.close()

    asyncio.run(scenario())


def _refuse(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_without_any_thread_a_call_fails_and_is_not_done_later(
    run: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(io: HostIO) -> None:
        done: list[int] = []
        with monkeypatch.context() as limited:
            limited.setattr(threading.Thread, "start", _refuse)
            with pytest.raises(BlockError) as caught:
                await io.call(done.append, 1)
            assert caught.value.errno == errno.EAGAIN
        await io.call(done.append, 2)
        assert done == [2]

    run(scenario)


def test_where_no_more_threads_can_be_started_those_there_are_do_everything_once(
    run: Callable[[Scenario], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(io: HostIO) -> None:
        done: list[int] = []
        await io.call(done.append, 0)
        monkeypatch.setattr(threading.Thread, "start", _refuse)
        await asyncio.gather(*(io.call(done.append, number) for number in range(1, 50)))
        monkeypatch.undo()
        assert sorted(done) == list(range(50))

    run(scenario)
