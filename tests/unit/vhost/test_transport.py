"""Listeners: which paths and fds they take, and what they leave behind."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.vhost.resources import nothing_left
from vhostblk.errors import ConfigError, StateError
from vhostblk.vhost.access import SocketAccess
from vhostblk.vhost.message import Message, Request
from vhostblk.vhost.transport import BlockingConnection, Listener

DEADLINE = 10.0


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "socket")


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(DEADLINE):
            await main()

    asyncio.run(limited())


def make_stale(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()


def test_client_is_accepted_and_the_path_removed_at_the_end(path: str) -> None:
    async def main() -> None:
        listener = Listener.bind(path)
        client = BlockingConnection.connect(path)
        client.send(Message(Request.SET_OWNER))
        connection = await listener.accept()
        assert await connection.receive() == Message(Request.SET_OWNER)
        connection.close()
        assert client.receive() is None
        client.close()
        listener.close()
        listener.close()

    run(main)
    assert not os.path.lexists(path)


def test_accept_waits_for_a_client(path: str) -> None:
    async def main() -> None:
        listener = Listener.bind(path)
        accepting = asyncio.create_task(listener.accept())
        await asyncio.sleep(0)
        assert not accepting.done()
        client = BlockingConnection.connect(path)
        (await accepting).close()
        client.close()
        listener.close()

    run(main)


def test_clients_wait_their_turn_while_nobody_accepts(path: str) -> None:
    async def main() -> None:
        listener = Listener.bind(path)
        clients = [BlockingConnection.connect(path) for _ in range(3)]
        clients[0].close()
        for _ in clients:
            (await listener.accept()).close()
        for client in clients[1:]:
            assert client.receive() is None
            client.close()
        listener.close()

    run(main)


def test_close_ends_an_accept_that_waits(path: str) -> None:
    async def main() -> None:
        listener = Listener.bind(path)
        accepting = asyncio.create_task(listener.accept())
        await asyncio.sleep(0)
        listener.close()
        with pytest.raises(StateError, match="closed"):
            await accepting
        with pytest.raises(StateError, match="closed"):
            await listener.accept()

    run(main)


def test_socket_that_nobody_listens_on_is_replaced(path: str) -> None:
    make_stale(path)
    listener = Listener.bind(path)
    BlockingConnection.connect(path).close()
    listener.close()


def test_socket_that_somebody_listens_on_is_left_alone(path: str) -> None:
    first = Listener.bind(path)
    with pytest.raises(ConfigError, match="somebody listens"):
        Listener.bind(path)
    BlockingConnection.connect(path).close()
    first.close()


def test_socket_with_a_full_backlog_is_left_alone(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        waiting = BlockingConnection.connect(path)
        with pytest.raises(ConfigError, match="somebody listens"):
            Listener.bind(path)
        waiting.close()


def test_file_that_is_not_a_socket_is_left_alone(path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(ConfigError, match="is not a socket"):
        Listener.bind(path)
    assert Path(path).read_text() == "precious"


def test_symbolic_link_is_left_alone(path: str, tmp_path: Path) -> None:
    make_stale(str(tmp_path / "other"))
    os.symlink("other", path)
    with pytest.raises(ConfigError, match="is not a socket"):
        Listener.bind(path)
    assert (tmp_path / "other").is_socket()


@pytest.mark.parametrize("bad", ["", "a\0b", "no/such/folder/socket", "x" * 200])
def test_impossible_paths_are_told_in_one_line(tmp_path: Path, bad: str) -> None:
    with pytest.raises(ConfigError, match="socket path") as caught:
        Listener.bind(f"{tmp_path}/{bad}" if bad else bad)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_path_that_somebody_else_took_over_is_not_removed(path: str) -> None:
    ours = Listener.bind(path)
    os.unlink(path)
    theirs = Listener.bind(path)
    ours.close()
    assert os.path.lexists(path)
    theirs.close()
    assert not os.path.lexists(path)


def test_path_is_removed_also_by_a_daemon_that_has_changed_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    listener = Listener.bind("socket")
    monkeypatch.chdir("/")
    listener.close()
    assert not os.path.lexists(tmp_path / "socket")


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o777])
def test_socket_file_has_the_mode_that_was_asked_for(path: str, mode: int) -> None:
    listener = Listener.bind(path, SocketAccess(mode=mode))
    assert stat.S_IMODE(os.stat(path).st_mode) == mode
    listener.close()


def test_inherited_socket_is_served_and_its_path_is_not_ours(path: str) -> None:
    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)
            sock.listen()
            listener = Listener.adopt(os.dup(sock.fileno()))
        assert not os.get_inheritable(listener.fileno())
        client = BlockingConnection.connect(path)
        (await listener.accept()).close()
        client.close()
        listener.close()

    run(main)
    assert os.path.lexists(path)


def test_fds_that_are_no_listening_unix_sockets_are_refused_and_stay_open() -> None:
    reader, writer = os.pipe()
    connected, other = socket.socketpair()
    with socket.socket(socket.AF_INET) as inet:
        for fd, reason in (
            (reader, "not a socket"),
            (connected.fileno(), "not listening"),
            (inet.fileno(), "not a Unix stream socket"),
        ):
            with pytest.raises(ConfigError, match=reason):
                Listener.adopt(fd)
            os.fstat(fd)
    for sock in (connected, other):
        sock.close()
    os.close(reader)
    os.close(writer)
    with pytest.raises(ConfigError, match="not a socket"):
        Listener.adopt(reader)
    with pytest.raises(ConfigError, match="not a socket"):
        Listener.adopt(-1)


def test_a_thousand_connects_leave_nothing_behind(path: str) -> None:
    async def main() -> None:
        listener = Listener.bind(path)
        for _ in range(1000):
            client = BlockingConnection.connect(path)
            client.send(Message(Request.SET_OWNER, 1, fds=(0,)))
            connection = await listener.accept()
            message = await connection.receive()
            assert message is not None
            for fd in message.fds:
                os.close(fd)
            client.close()
            connection.close()
        listener.close()

    run(main)
