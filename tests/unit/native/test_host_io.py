"""HostIO with io_uring and with threads."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vhostblk import native
from vhostblk.native import HostIO, IOOp, IORequest

pytestmark = pytest.mark.skipif(not native.available, reason="the engine is not built")


@pytest.fixture(params=["io_uring", "threads"])
def io(request: pytest.FixtureRequest) -> Iterator[HostIO]:
    if request.param == "io_uring" and native.io_uring_error():
        pytest.skip("io_uring is forbidden here")
    io = HostIO(request.param, depth=4)
    assert io.kind == request.param
    yield io
    io.close()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def reap(io: HostIO, count: int) -> dict[int, int]:
    done: dict[int, int] = {}
    while len(done) < count:
        readable, _, _ = select.select([io.fd], [], [], 10)
        assert readable
        done.update(io.reap())
    return done


def run(io: HostIO, op: IOOp, fd: int, offset: int = 0, *buffers: object, **options: Any) -> int:
    assert io.submit([IORequest(1, op, fd, offset, buffers, **options)]) == 1
    return reap(io, 1)[1]


def test_data_makes_the_way_there_and_back_in_pieces(io: HostIO, fd: int) -> None:
    assert run(io, IOOp.WRITE, fd, 10, b"hello ", b"", bytearray(b"world")) == 11
    first, second = bytearray(4), bytearray(7)
    assert run(io, IOOp.READ, fd, 10, first, second) == 11
    assert first + second == b"hello world"


def test_read_is_short_only_at_the_end_of_the_file(io: HostIO, fd: int) -> None:
    os.write(fd, b"x" * 100)
    assert run(io, IOOp.READ, fd, 90, bytearray(20)) == 10
    assert run(io, IOOp.READ, fd, 100, bytearray(20)) == 0
    assert run(io, IOOp.READ, fd, 0) == 0


def test_sync_and_durable_writes(io: HostIO, fd: int) -> None:
    assert run(io, IOOp.WRITE, fd, 0, b"durable", flags=1) == 7
    assert run(io, IOOp.FDATASYNC, fd) == 0


def test_fallocate_takes_a_mode(io: HostIO, fd: int) -> None:
    keep_size, punch_hole = 1, 2
    assert run(io, IOOp.FALLOCATE, fd, 0, length=8192) == 0
    assert os.fstat(fd).st_size == 8192
    os.pwrite(fd, b"x" * 8192, 0)
    assert run(io, IOOp.FALLOCATE, fd, 0, length=4096, flags=keep_size | punch_hole) == 0
    assert os.pread(fd, 8192, 0) == b"\0" * 4096 + b"x" * 4096


def test_errors_are_negative_errnos(io: HostIO) -> None:
    assert run(io, IOOp.READ, -1, 0, bytearray(1)) == -errno.EBADF
    full = os.open("/dev/full", os.O_WRONLY)
    assert run(io, IOOp.WRITE, full, 0, b"x") == -errno.ENOSPC
    os.close(full)


def test_more_than_the_depth_has_to_wait(io: HostIO, fd: int) -> None:
    os.write(fd, b"x" * 4096)
    buffers = [bytearray(4096) for _ in range(10)]
    requests = [IORequest(n, IOOp.READ, fd, 0, [buffers[n]]) for n in range(10)]
    assert io.submit(requests) == 4
    assert io.submit(requests[4:]) == 0
    assert reap(io, 4) == dict.fromkeys(range(4), 4096)
    assert io.submit(requests[9:]) == 1
    assert reap(io, 1) == {9: 4096}
    assert [bytes(buffer[:1]) for buffer in buffers] == [b"x"] * 4 + [b"\0"] * 5 + [b"x"]


def test_requests_that_are_submitted_together_have_vectors_of_their_own(
    io: HostIO, fd: int
) -> None:
    os.write(fd, b"abcdefghijkl")
    buffers = [[bytearray(1), bytearray(2)] for _ in range(4)]
    requests = [IORequest(n, IOOp.READ, fd, 3 * n, buffers[n]) for n in range(4)]
    assert io.submit(requests) == 4
    assert reap(io, 4) == dict.fromkeys(range(4), 3)
    assert b"".join(map(b"".join, buffers)) == b"abcdefghijkl"


def test_close_waits_for_what_is_in_flight(fd: int) -> None:
    io = HostIO("threads", depth=64)
    writes = [IORequest(n, IOOp.WRITE, fd, n * 65536, [bytes(65536)]) for n in range(64)]
    assert io.submit(writes) == 64
    io.close()
    io.close()
    assert os.fstat(fd).st_size == 64 * 65536


def test_a_kind_that_does_not_exist_is_refused() -> None:
    with pytest.raises(KeyError):
        HostIO("native")
