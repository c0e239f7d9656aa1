"""Whose a socket file is and who may write it; who has connected, and who is served."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.requirements import require
from tests.unit.vhost.resources import nothing_left
from vhostblk.errors import ConfigError
from vhostblk.vhost.access import Peer, PeerRule, SocketAccess, peer_of
from vhostblk.vhost.transport import Listener


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "socket")


@pytest.mark.parametrize("umask", [0, 0o077])
def test_socket_file_is_never_more_open_than_it_is_going_to_be(
    path: str, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []

    def look(call: str) -> None:
        original = getattr(os, call)

        def looking(file: str, *arguments: int) -> None:
            modes.append(stat.S_IMODE(os.stat(path).st_mode))
            original(file, *arguments)
            modes.append(stat.S_IMODE(os.stat(path).st_mode))

        monkeypatch.setattr(os, call, looking)

    look("chmod")
    look("chown")
    before = os.umask(umask)
    try:
        listener = Listener.bind(path, SocketAccess(0o660, os.getuid(), os.getgid()))
    finally:
        os.umask(before)
    listener.close()
    assert modes == [0, 0o660, 0o660, 0o660]


def test_socket_file_is_as_the_umask_has_it_unless_somebody_says_otherwise(path: str) -> None:
    before = os.umask(0o027)
    try:
        listener = Listener.bind(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o750
    listener.close()


def test_socket_file_is_given_away(path: str) -> None:
    require("root")
    listener = Listener.bind(path, SocketAccess(0o600, 1234, 2345))
    status = os.stat(path)
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1234, 2345, 0o600)
    listener.close()
    assert not os.path.lexists(path)


def test_socket_that_cannot_be_given_away_leaves_nothing_behind(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(ConfigError) as raised:
        Listener.bind(path, SocketAccess(0o600, 1234, 2345))
    assert str(raised.value) == (
        f"socket path {path}: cannot be given to user 1234 and group 2345: Operation not permitted"
    )
    assert not os.path.lexists(path)


def test_link_that_somebody_puts_into_the_place_of_the_socket_is_not_followed(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.touch(0o600)
    bind = socket.socket.bind

    class Replaced(socket.socket):
        def bind(self, address: str) -> None:  # type: ignore[override]
            bind(self, address)
            os.unlink(address)
            os.symlink(victim, address)

    monkeypatch.setattr(socket, "socket", Replaced)
    with pytest.raises(ConfigError):
        Listener.bind(path, SocketAccess(0o666))
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600


def test_peer_is_who_has_made_the_connection() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = peer_of(ours)
    assert peer == Peer(os.getpid(), os.geteuid(), os.getegid(), frozenset(os.getgroups()))


@pytest.mark.parametrize(
    ("uids", "gids", "allowed"),
    [
        ({10}, set(), True),
        (set(), {20}, True),
        (set(), {30}, True),
        ({11}, {31, 30}, True),
        ({20, 30}, {10}, False),
        ({0}, {0}, False),
    ],
)
def test_rule_names_users_and_groups_of_any_kind(
    uids: set[int], gids: set[int], allowed: bool
) -> None:
    peer = Peer(1, uid=10, gid=20, groups=frozenset({30, 40}))
    assert PeerRule(uids, gids).allows(peer) is allowed


def test_root_is_served_only_if_it_is_named() -> None:
    assert not PeerRule({10}, {20}).allows(Peer(1, 0, 0))
    assert PeerRule({0}).allows(Peer(1, 0, 0))
