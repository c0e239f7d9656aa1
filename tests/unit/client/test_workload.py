"""The workload is content with a correct disk, and finds every way to lose a sector."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.unit.client.loopback import Loopback
from vhostblk.client.shared_memory import SharedMemory
from vhostblk.client.workload import Workload
from vhostblk.errors import BlockError, PeerError
from vhostblk.virtio.blk import RequestType, Status
from vhostblk.virtio.blk_request import BlkRequest


@pytest.mark.parametrize("queues", [1, 3])
@pytest.mark.parametrize("event_idx", [False, True])
def test_correct_disk_passes(queues: int, event_idx: bool) -> None:
    memory = SharedMemory([1 << 20] * 3, gap=0, spread=True)
    loop = Loopback(queues=queues, event_idx=event_idx, memory=memory)
    try:
        workload = Workload(loop.as_client(), seed=queues, depth=8, max_length=32 << 10)
        counts = workload.run(600)
        workload.verify()
        assert counts.errors == {}
        assert set(counts.requests) == set(RequestType) - {
            RequestType.GET_ID,
            RequestType.GET_LIFETIME,
            RequestType.SECURE_ERASE,
        }
        assert counts.compared > 1 << 20
    finally:
        loop.close()


def lose_a_write(loop: Loopback, request: BlkRequest) -> None:
    if request.type == RequestType.OUT and request.offset > 512 << 10:
        request.complete(Status.OK)
        request.data = ()
        request.length = 0


def shift_a_write(loop: Loopback, request: BlkRequest) -> None:
    if request.type == RequestType.OUT and request.length == 512:
        request.offset ^= 512


def keep_what_should_be_zeroed(loop: Loopback, request: BlkRequest) -> None:
    if request.type == RequestType.WRITE_ZEROES:
        request.segments = ()


def flip_a_bit_before_a_long_write(loop: Loopback, request: BlkRequest) -> None:
    if request.type == RequestType.OUT and request.length >= 8192:
        loop.disk[request.offset - 1] ^= 1


def write_the_whole_block_around_a_sector(loop: Loopback, request: BlkRequest) -> None:
    """A read-modify-write of 4096 bytes that takes the neighbours from an older state."""
    if request.type == RequestType.OUT and request.length == 512:
        start = request.offset & ~4095
        for neighbour in range(start, start + 4096, 512):
            if neighbour != request.offset:
                loop.disk[neighbour : neighbour + 512] = bytes(512)


def run_and_verify(workload: Workload) -> None:
    workload.run(1500)
    workload.verify()


@pytest.mark.parametrize(
    "bug",
    [
        lose_a_write,
        shift_a_write,
        keep_what_should_be_zeroed,
        flip_a_bit_before_a_long_write,
        write_the_whole_block_around_a_sector,
    ],
)
def test_broken_disk_is_found_out(bug: Callable[[Loopback, BlkRequest], None]) -> None:
    loop = Loopback(serve=bug)
    try:
        workload = Workload(loop.as_client(), seed=1)
        with pytest.raises(PeerError, match="seed 1: read of"):
            run_and_verify(workload)
    finally:
        loop.close()


def fail_some(loop: Loopback, request: BlkRequest) -> None:
    if request.offset % 7 == 3 or (request.segments and request.segments[0].offset % 3 == 0):
        loop.disk[request.offset : request.offset + request.length] = bytes(request.length)
        request.status = Status.IOERR


def test_error_ends_the_workload_unless_errors_are_allowed() -> None:
    loop = Loopback(serve=fail_some)
    try:
        with pytest.raises(BlockError):
            Workload(loop.as_client(), seed=2).run(300)
        loop.wait([])
        workload = Workload(loop.as_client(), seed=2, allow_errors=True)
        counts = workload.run(300)
        assert counts.errors
        assert counts.compared
    finally:
        loop.close()


def test_same_seed_makes_the_same_requests() -> None:
    disks = []
    for _ in range(2):
        loop = Loopback()
        try:
            Workload(loop.as_client(), seed=3, depth=1).run(100)
            disks.append(bytes(loop.disk))
        finally:
            loop.close()
    assert disks[0] == disks[1]
    assert any(disks[0])
