"""What `vhostblk serve` makes of its options."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhostblk.cli import main, serve
from vhostblk.daemon import DaemonConfig
from vhostblk.vhost.access import PeerRule, SocketAccess


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ([], "pin_memory", False),
        (["--pin-memory"], "pin_memory", True),
        ([], "own_threads", 1),
        (["--iothreads", "3"], "own_threads", 3),
        ([], "socket_access", SocketAccess()),
        (["--socket-mode", "0640"], "socket_access", SocketAccess(mode=0o640)),
        (["--socket-owner", "root:7"], "socket_access", SocketAccess(uid=0, gid=7)),
        (
            ["--socket-owner", "5", "--socket-group", "root"],
            "socket_access",
            SocketAccess(uid=5, gid=0),
        ),
        ([], "peers", None),
        (
            ["--allow-user", "root", "--allow-user", "7", "--allow-group", "8"],
            "peers",
            PeerRule({0, 7}, {8}),
        ),
    ],
)
def test_options_reach_the_export(
    words: list[str], field: str, value: object, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[DaemonConfig] = []
    monkeypatch.setattr(serve, "run_daemon", lambda config, **_: made.append(config))
    assert main.main(["serve", "disk.img", "--socket", "s", *words]) == 0
    (config,) = made
    (export,) = config.exports
    assert getattr(export, field) == value
