"""An NBD server that keeps its connection and does not answer: `request-timeout`."""

from __future__ import annotations

import asyncio
import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.disks import read
from tests.nbd_server import Answer, Seen, Server, honest
from tests.unit.block.drivers.nbd_disks import (
    Clock,
    connected,
    connections,
    reads_again,
    requests,
    run,
    skip,
)
from vhostblk.block.backend import BlockBackend
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError, ConfigError

SHORT = {"request-timeout": 10}
A_LITTLE, ENOUGH, TOO_LATE = 6.0, 11.0, 20.0
GIVEN_UP = "the NBD server has not answered a request for 10 seconds"
MANY = 40  # more than can be under way
AT_ONCE = 16


@pytest.fixture
def path() -> Iterator[Path]:
    """A socket; names of sockets are short."""
    with tempfile.TemporaryDirectory(prefix="vb-nbd-") as folder:
        yield Path(folder) / "s"


async def silent(server: Server, seen: Seen, writer: asyncio.StreamWriter) -> None:
    """Hear it, and say nothing."""


async def silent_at_first(server: Server, seen: Seen, writer: asyncio.StreamWriter) -> None:
    """The same on the first connection only."""
    if server.connections > 1:
        await honest(server, seen, writer)


def when_told(go_on: asyncio.Event) -> Answer:
    """Answer then, and in a task: others are heard meanwhile."""

    async def answer(server: Server, seen: Seen, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        await honest(server, seen, writer)

    return answer


async def has_failed(many: list[asyncio.Task[Any]]) -> None:
    for one in await asyncio.gather(*many, return_exceptions=True):
        assert isinstance(one, BlockError)
        assert one.errno == errno.EIO


def reads(backend: BlockBackend, count: int) -> list[asyncio.Task[Any]]:
    loop = asyncio.get_running_loop()
    return [loop.create_task(read(backend, number * 512, 512)) for number in range(count)]


@pytest.mark.warns(GIVEN_UP)
def test_server_that_does_not_answer_in_time_fails_what_is_in_flight_and_what_waits(
    path: Path,
) -> None:
    server = Server(answer=silent_at_first)

    async def scenario(backend: BlockBackend) -> None:
        many = reads(backend, MANY)
        await requests(server, AT_ONCE)
        assert not any(one.done() for one in many)
        skip(ENOUGH)
        await has_failed(many)
        await connections(server, 2)
        await reads_again(backend)

    run(server, path, scenario, SHORT, clock=Clock)


@pytest.mark.warns(GIVEN_UP)
def test_requests_are_made_anew_where_a_delay_lets_them_wait(path: Path) -> None:
    server = Server(answer=silent_at_first)

    async def scenario(backend: BlockBackend) -> None:
        many = asyncio.gather(
            *(backend.pwritev(number * 512, IoVec.of(b"z" * 512)) for number in range(MANY))
        )
        await requests(server, AT_ONCE)
        skip(ENOUGH)
        await many
        assert server.content[: (MANY + 1) * 512] == b"z" * MANY * 512 + bytes(512)
        assert server.connections == 2

    run(server, path, scenario, SHORT | {"reconnect-delay": 3600}, clock=Clock)


@pytest.mark.warns(GIVEN_UP)
def test_each_request_has_its_time_whatever_else_is_answered(path: Path) -> None:
    async def not_the_first(server: Server, seen: Seen, writer: asyncio.StreamWriter) -> None:
        if seen.offset or server.connections > 1:
            await honest(server, seen, writer)

    server = Server(answer=not_the_first)

    async def scenario(backend: BlockBackend) -> None:
        stuck = asyncio.ensure_future(read(backend, 0, 512))
        await requests(server, 1)
        skip(A_LITTLE)
        await read(backend, 512, 512)
        assert not stuck.done()
        skip(ENOUGH - A_LITTLE)
        assert await stuck == bytes(512)
        assert server.connections == 2

    run(server, path, scenario, SHORT | {"reconnect-delay": 3600}, clock=Clock)


def test_time_of_a_request_begins_when_it_is_made(path: Path) -> None:
    go_on = asyncio.Event()
    server = Server()

    async def scenario(backend: BlockBackend) -> None:
        await read(backend, 0, 512)
        skip(A_LITTLE)
        server.answer = when_told(go_on)
        later = asyncio.ensure_future(read(backend, 512, 512))
        await requests(server, 2)
        skip(A_LITTLE)  # the first one would be due
        for _ in range(5):
            await asyncio.sleep(0)
        go_on.set()
        assert await later == bytes(512)
        assert server.connections == 1

    run(server, path, scenario, SHORT, clock=Clock)


@pytest.mark.warns(GIVEN_UP)
def test_server_that_only_shakes_hands_does_not_renew_the_delay(path: Path) -> None:
    server = Server(answer=silent)

    async def scenario(backend: BlockBackend) -> None:
        many = reads(backend, MANY)
        await requests(server, AT_ONCE)
        for connection in range(2, 5):
            skip(ENOUGH)
            await requests(server, connection * AT_ONCE)
            assert server.connections == connection
            assert not any(one.done() for one in many)
        skip(ENOUGH)  # it is 33 seconds since the first time-out
        await has_failed(many)

    run(server, path, scenario, SHORT | {"reconnect-delay": 30}, clock=Clock)


@pytest.mark.warns(GIVEN_UP)
def test_reply_renews_the_delay(path: Path) -> None:
    async def silent_in_turns(server: Server, seen: Seen, writer: asyncio.StreamWriter) -> None:
        if server.connections % 2 == 0:
            await honest(server, seen, writer)

    server = Server(answer=silent_in_turns)

    async def scenario(backend: BlockBackend) -> None:
        for turn in range(1, 4):
            stuck = asyncio.ensure_future(read(backend, 0, 512))
            await requests(server, 2 * turn - 1)
            skip(ENOUGH)
            assert await stuck == bytes(512)
            assert server.connections == 2 * turn
            server.hang_up()
            await connections(server, 2 * turn + 1)
            await connected(backend)
            skip(100)

    run(server, path, scenario, SHORT | {"reconnect-delay": 30}, clock=Clock)


@pytest.mark.warns(GIVEN_UP)
def test_server_that_does_not_take_what_is_written_is_given_up_too(path: Path) -> None:
    async def deaf(server: Server, seen: Seen, writer: asyncio.StreamWriter) -> None:
        if server.connections == 1:
            await asyncio.Event().wait()
        await honest(server, seen, writer)

    server = Server(size=64 << 20, answer=deaf)

    async def scenario(backend: BlockBackend) -> None:
        content = bytes(range(256)) * (8 << 12)
        both = asyncio.gather(read(backend, 0, 512), backend.pwritev(512, IoVec.of(content)))
        await requests(server, 1)
        skip(ENOUGH)
        await both
        assert server.content[512 : 512 + len(content)] == content

    run(server, path, scenario, SHORT | {"reconnect-delay": 3600}, clock=Clock)


def test_who_looks_too_late_does_not_blame_the_server(path: Path) -> None:
    """As a process that was stopped and goes on: its server is about to answer."""
    go_on = asyncio.Event()
    server = Server(answer=when_told(go_on))

    async def scenario(backend: BlockBackend) -> None:
        waits = asyncio.ensure_future(read(backend, 0, 512))
        await requests(server, 1)
        skip(TOO_LATE)
        for _ in range(5):
            await asyncio.sleep(0)
        go_on.set()
        assert await waits == bytes(512)
        assert server.connections == 1

    run(server, path, scenario, SHORT, clock=Clock)


def test_without_a_time_out_requests_wait(path: Path) -> None:
    go_on = asyncio.Event()
    server = Server(answer=when_told(go_on))

    async def scenario(backend: BlockBackend) -> None:
        waits = asyncio.ensure_future(read(backend, 0, 512))
        await requests(server, 1)
        for _ in range(100):
            skip(ENOUGH)
            await asyncio.sleep(0)
        go_on.set()
        assert await waits == bytes(512)
        assert server.connections == 1

    run(server, path, scenario, clock=Clock)


@pytest.mark.parametrize("wrong", ["-1", "soon", "31536001", True])
def test_time_out_is_a_number_of_seconds(wrong: object, path: Path) -> None:
    async def never(backend: BlockBackend) -> None:
        raise AssertionError

    with pytest.raises(ConfigError, match="'request-timeout' expects seconds"):
        run(Server(), path, never, {"request-timeout": wrong})
