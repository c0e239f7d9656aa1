"""The state of a device through fds of all kinds."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from vhostblk.errors import PeerError
from vhostblk.export import state_transfer
from vhostblk.export.state_transfer import StateTransfer

MOST = 28
STATE = b"s" * MOST


def pipe() -> tuple[int, int]:
    return os.pipe()


def pair() -> tuple[int, int]:
    one, other = socket.socketpair()
    return one.detach(), other.detach()


@pytest.fixture(params=[pipe, pair])
def channel(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """Reading end, writing end; whoever closes one takes it out of the list."""
    make: Callable[[], tuple[int, int]] = request.param
    ends = make()
    yield ends
    for fd in ends:
        if os.path.exists(f"/proc/self/fd/{fd}"):
            os.close(fd)


@pytest.fixture(params=["", "Linux 6.3"], autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is here, and as it was when pipes and sockets knew no RWF_NOWAIT."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "")

    if request.param:
        monkeypatch.setattr(os, "preadv", refuse)
        monkeypatch.setattr(os, "pwritev", refuse)


def run(test: Callable[[StateTransfer], Coroutine[Any, Any, None]]) -> None:
    async def begin() -> None:
        transfer = StateTransfer(MOST)
        try:
            await test(transfer)
        finally:
            transfer.close()
            await asyncio.sleep(0)

    asyncio.run(begin())


def test_saved_state_is_there_at_once_and_the_check_is_good(channel: tuple[int, int]) -> None:
    reading, writing = channel

    async def test(transfer: StateTransfer) -> None:
        transfer.save(writing, STATE)
        assert os.read(reading, 100) == STATE
        assert await transfer.check() is None
        with pytest.raises(PeerError, match="there was none"):
            await transfer.check()

    run(test)


def test_state_that_finds_no_room_is_refused_instead_of_waited_for() -> None:
    reading, writing = os.pipe()
    for _ in range(16):
        os.write(writing, bytes(4096))  # pipe(7): its capacity

    async def test(transfer: StateTransfer) -> None:
        with pytest.raises(PeerError, match="no room"):
            transfer.save(writing, STATE)
        with pytest.raises(PeerError, match="not written"):
            await transfer.check()

    run(test)
    os.close(reading)
    os.close(writing)


def test_state_cannot_be_saved_where_nobody_reads_nor_where_one_only_reads() -> None:
    reading, writing = os.pipe()

    async def test(transfer: StateTransfer) -> None:
        with pytest.raises(PeerError):
            transfer.save(reading, STATE)
        os.close(reading)
        with pytest.raises(PeerError, match="Broken pipe"):
            transfer.save(writing, STATE)

    run(test)
    os.close(writing)


def test_loaded_state_may_come_in_pieces(channel: tuple[int, int]) -> None:
    reading, writing = channel

    async def test(transfer: StateTransfer) -> None:
        transfer.load(reading)
        assert transfer.is_incomplete
        for i in range(MOST):
            os.write(writing, STATE[i : i + 1])
            await asyncio.sleep(0)
        os.close(writing)
        assert await transfer.check() == STATE
        assert not transfer.is_incomplete

    run(test)


def test_state_may_be_in_a_file() -> None:
    file = os.memfd_create("state")
    os.pwrite(file, STATE, 0)

    async def test(transfer: StateTransfer) -> None:
        transfer.load(file)
        assert await transfer.check() == STATE

    run(test)


def test_longer_states_are_not_read_to_their_end(channel: tuple[int, int]) -> None:
    reading, writing = channel
    os.write(writing, bytes(MOST + 1))

    async def test(transfer: StateTransfer) -> None:
        transfer.load(reading)
        with pytest.raises(PeerError, match="more than 28 bytes"):
            await transfer.check()

    run(test)


def test_end_that_does_not_come_fails_the_check(
    channel: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_transfer, "_SECONDS", 0.01)
    reading, writing = channel
    os.write(writing, STATE)

    async def test(transfer: StateTransfer) -> None:
        transfer.load(reading)
        with pytest.raises(PeerError, match="its end does not come"):
            await transfer.check()

    run(test)


def test_fd_that_cannot_be_read_fails_the_check() -> None:
    reading, writing = os.pipe()
    os.close(reading)

    async def test(transfer: StateTransfer) -> None:
        transfer.load(writing)
        with pytest.raises(PeerError, match="cannot read it"):
            await transfer.check()

    run(test)


def test_next_transfer_takes_the_place_of_the_one_before(channel: tuple[int, int]) -> None:
    reading, _ = channel
    file = os.memfd_create("state")
    os.pwrite(file, STATE, 0)

    async def test(transfer: StateTransfer) -> None:
        transfer.load(reading)
        await asyncio.sleep(0)
        transfer.load(file)
        assert await transfer.check() == STATE

    run(test)


@pytest.mark.timeout(20)
def test_loop_does_not_wait_for_a_state_that_the_front_end_takes_back(
    channel: tuple[int, int],
) -> None:
    reading, writing = channel
    other = os.dup(reading)

    async def test(transfer: StateTransfer) -> None:
        loop = asyncio.get_running_loop()
        taken = asyncio.Event()

        def take() -> None:
            """As a front-end does that has kept its copy of the fd, once the state is there."""
            assert os.read(other, 100) == STATE
            taken.set()
            loop.remove_reader(other)

        loop.add_reader(other, take)
        transfer.load(os.dup(reading))
        await asyncio.sleep(0)
        os.write(writing, STATE)
        await taken.wait()
        for _ in range(5):
            await asyncio.sleep(0)
        os.write(writing, STATE)
        os.close(writing)
        assert await transfer.check() == STATE

    run(test)
    os.close(other)
