"""What tests of wrong command lines share: a folder to be in, and spies."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostblk.vhost.access import SocketAccess
from vhostblk.vhost.transport import Listener


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a disk and one of everything that is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    (tmp_path / "folder").mkdir()
    (tmp_path / "image.qcow2").write_bytes(b"QFI\xfb" + bytes(508))
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "not-a-socket").touch()
    monkeypatch.delenv("LISTEN_FDS", raising=False)
    monkeypatch.delenv("LISTEN_PID", raising=False)
    return tmp_path


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was listened on."""
    listened: list[str] = []
    bind, adopt = Listener.bind, Listener.adopt

    def spy_on_bind(path: str, access: SocketAccess) -> Listener:
        listened.append(path)
        return bind(path, access)

    def spy_on_adopt(fd: int) -> Listener:
        listened.append(str(fd))
        return adopt(fd)

    monkeypatch.setattr(Listener, "bind", spy_on_bind)
    monkeypatch.setattr(Listener, "adopt", spy_on_adopt)
    return listened


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What vhostblk's loggers have said."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("vhostblk"), Collector()
    level = logger.level
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)
