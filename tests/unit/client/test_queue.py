"""Requests through a queue to a device and back, in every framing."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

import pytest

from tests.unit.client.loopback import Loopback
from vhostblk.errors import BlockError, StateError
from vhostblk.virtio.blk import RequestType, Status
from vhostblk.virtio.blk_request import BlkRequest

IN, OUT = RequestType.IN, RequestType.OUT


@pytest.fixture
def loop() -> Iterator[Loopback]:
    loopback = Loopback()
    yield loopback
    loopback.close()


def bytewise(length: int) -> Sequence[int]:
    """Header and status in small pieces, some of them empty."""
    return [1, 0, 2, 3, length - 6] if length > 6 else [1] * length


@pytest.mark.parametrize("framing", [None, bytewise])
@pytest.mark.parametrize("indirect", [False, True])
def test_written_bytes_are_read_back(loop: Loopback, framing: object, indirect: bool) -> None:
    data = bytes(range(256)) * 4
    write = loop.submit(OUT, 1024, out=data, framing=framing, indirect=indirect)
    assert not write.is_done
    with pytest.raises(StateError):
        write.result()
    loop.wait([write])
    assert write.result() == b""
    read = loop.submit(IN, 512, room=2048, framing=framing, indirect=indirect)
    loop.wait([read])
    assert read.result() == bytes(512) + data + bytes(512)
    assert read.written == 2049


@pytest.mark.parametrize(
    ("status", "code"),
    [(Status.IOERR, errno.EIO), (Status.UNSUPP, errno.EOPNOTSUPP), (77, errno.EPROTO)],
)
def test_status_becomes_an_errno(status: int, code: int) -> None:
    def fail(_: Loopback, request: BlkRequest) -> None:
        request.status = status  # type: ignore[assignment]

    loop = Loopback(serve=fail)
    try:
        pending = loop.submit(IN, 0, room=512)
        loop.wait([pending])
        assert pending.status == status
        with pytest.raises(BlockError) as caught:
            pending.result()
        assert caught.value.errno == code
    finally:
        loop.close()


def test_status_that_was_never_written_is_noticed(loop: Loopback) -> None:
    pending = loop.submit(RequestType.FLUSH, 0)
    chain = loop.devices[0].pop()
    assert chain is not None
    loop.devices[0].push(chain.head, 0)
    loop.wait([pending])
    with pytest.raises(BlockError):
        pending.result()


def test_memory_of_finished_requests_is_used_again(loop: Loopback) -> None:
    buffers = set()
    for _ in range(50):
        pending = loop.submit(IN, 0, room=512 << 10)
        loop.wait([pending])
        buffers.add(pending.buffer)
    assert len(buffers) == 1


def test_full_ring_gives_the_memory_back(loop: Loopback) -> None:
    flying = [loop.submit(IN, 0, room=512, indirect=True) for _ in range(16)]
    free = loop.memory.allocate(4096, alignment=4096)
    loop.memory.free(free)
    with pytest.raises(StateError):
        loop.submit(IN, 0, room=512)
    assert loop.memory.allocate(4096, alignment=4096) == free
    loop.wait(flying)


def test_chain_made_by_hand_is_kept_apart(loop: Loopback) -> None:
    queue = loop.queues[0]
    status = loop.memory.allocate(1)
    head = queue.driver.add([], [status], token="mine")
    queue.driver.publish()
    loop.wait([])
    assert [(used.head, used.token) for used in queue.foreign] == [(head, "mine")]
    assert loop.memory.read(status) == bytes([Status.IOERR])
