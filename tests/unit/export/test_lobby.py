"""Who has said nothing has nothing; who speaks is handed out; there is a bounded number of them."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable

import pytest

from vhostblk.export.error_log import ErrorLog
from vhostblk.export.lobby import MAX_WAITING, Lobby
from vhostblk.testing.plugin import ExpectedLog
from vhostblk.vhost.connection import Connection
from vhostblk.vhost.message import Message, Request

HELLO = Message(Request.GET_FEATURES).encode()
Scene = Callable[[Lobby, list[Connection]], Awaitable[None]]


def play(scene: Scene, timeout: float = 60.0) -> None:
    """Run a scene with a lobby, and a list of who has spoken."""

    async def limited() -> None:
        spoken: list[Connection] = []
        log = ErrorLog(logging.LoggerAdapter(logging.getLogger("vhostblk.test")))
        lobby = Lobby(timeout, spoken.append, log)
        async with asyncio.timeout(10):
            await scene(lobby, spoken)
        lobby.clear()
        for connection in spoken:
            connection.close()

    asyncio.run(limited())


def newcomer(lobby: Lobby) -> socket.socket:
    ours, theirs = socket.socketpair()
    lobby.admit(Connection(ours))
    return theirs


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


def test_who_speaks_is_handed_out_and_the_others_go_on_waiting() -> None:
    async def scene(lobby: Lobby, spoken: list[Connection]) -> None:
        with newcomer(lobby) as first, newcomer(lobby) as second:
            second.send(HELLO)
            await until(lambda: bool(spoken))
            assert len(lobby) == 1
            first.send(HELLO)
            await until(lambda: len(spoken) == 2)
            for connection in spoken:
                message = await connection.receive()
                assert message is not None
                assert message.request == Request.GET_FEATURES

    play(scene)


@pytest.mark.warns("hung up on a connection before its first message: nothing was said in 0.01 s")
def test_silence_has_a_deadline() -> None:
    async def scene(lobby: Lobby, spoken: list[Connection]) -> None:
        with newcomer(lobby) as silent:
            await until(lambda: not len(lobby))
            assert silent.recv(1) == b""
        assert not spoken

    play(scene, 0.01)


def test_one_that_leaves_without_a_word_leaves_nothing(expect_log: ExpectedLog) -> None:
    async def scene(lobby: Lobby, spoken: list[Connection]) -> None:
        newcomer(lobby).close()
        await until(lambda: not len(lobby))
        assert not spoken

    play(scene)
    assert not expect_log.messages


@pytest.mark.warns("hung up on a connection that had said nothing")
def test_oldest_makes_room_but_not_if_it_has_spoken() -> None:
    async def scene(lobby: Lobby, spoken: list[Connection]) -> None:
        guest = newcomer(lobby)
        guest.send(HELLO)
        crowd = []
        for _ in range(MAX_WAITING + 5):
            crowd.append(newcomer(lobby))
            await asyncio.sleep(0)  # as whoever accepts them does
        assert len(lobby) == MAX_WAITING
        assert len(spoken) == 1
        assert [sock.recv(1) for sock in crowd[:5]] == [b""] * 5
        for sock in [guest, *crowd]:
            sock.close()
        await until(lambda: not len(lobby))

    play(scene)


def test_all_are_hung_up_on_together() -> None:
    async def scene(lobby: Lobby, spoken: list[Connection]) -> None:
        with newcomer(lobby) as first, newcomer(lobby) as second:
            await asyncio.sleep(0)
            lobby.clear()
            assert (first.recv(1), second.recv(1)) == (b"", b"")
            assert not len(lobby)
        await asyncio.sleep(0)
        assert not spoken

    play(scene)
