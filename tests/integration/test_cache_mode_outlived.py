"""The mode of the write cache that a driver believes in is that of the next daemon, too, however the last one ended.

vhost-user, "Inflight I/O tracking": it is noted in the region that the front-end keeps. What migrations hand over is
test_device_state_contract.py's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.requirements import require
from vhostblk.client.client import Client
from vhostblk.client.control import PROTOCOL_FEATURES
from vhostblk.testing.daemon_process import VHOSTBLK, DaemonProcess
from vhostblk.vhost.message import ProtocolFeature

BACK, THROUGH = True, False
BOTH_PATHS = pytest.mark.parametrize("place", ["native", "python"], indirect=True)
ENGINE = pytest.mark.parametrize("place", ["native"], indirect=True)


class Place:
    """A disk that daemons serve one after the other."""

    def __init__(self, folder: Path, data_path: str) -> None:
        self.socket = folder / "s"
        self._image = folder / "image"
        self._data_path = data_path
        self._daemons: list[DaemonProcess] = []
        self.resize(1 << 20)

    def resize(self, size: int) -> None:
        with self._image.open("ab") as file:
            os.truncate(file.fileno(), size)

    def start(self, cache: str = "writeback") -> None:
        words = ("serve", self._image, "--socket", self.socket, "--cache", cache)
        command: list[str | Path] = [*VHOSTBLK, *words, "--data-path", self._data_path]
        daemon = DaemonProcess(command, sockets=[self.socket])
        daemon.start()
        self._daemons.append(daemon)

    def end(self, *, killed: bool = True) -> None:
        daemon = self._daemons.pop()
        if killed:
            daemon.kill()
        daemon.close()

    def close(self) -> None:
        while self._daemons:
            self.end()


@pytest.fixture
def place(request: pytest.FixtureRequest, socket_directory: Path) -> Iterator[Place]:
    if request.param == "native":
        require("engine")
    place = Place(socket_directory, request.param)
    yield place
    place.close()


@BOTH_PATHS
@pytest.mark.parametrize("killed", [True, False], ids=["killed", "stopped"])
def test_mode_that_the_driver_has_set_is_that_of_the_next_daemon(
    place: Place, killed: bool
) -> None:
    place.start()
    with Client.connect(place.socket) as client:
        for mode in (THROUGH, BACK, THROUGH):
            client.set_writeback(mode)
        client.write(0, b"x" * 512)
        place.end(killed=killed)
        place.start()
        client.reconnect(place.socket)
        assert client.read_config().writeback == THROUGH
        assert client.read(0, 512) == b"x" * 512
        # Where nothing is tracked nobody knows.
        place.end(killed=killed)
    place.start()
    agreed = PROTOCOL_FEATURES & ~ProtocolFeature.INFLIGHT_SHMFD
    with Client.connect(place.socket, protocol_features=agreed) as client:
        assert client.config.writeback == BACK


@ENGINE
def test_driver_that_was_told_of_no_cache_gets_none_from_a_daemon_with_other_options(
    place: Place,
) -> None:
    place.start("writethrough")
    with Client.connect(place.socket) as client:
        assert client.config.writeback == THROUGH
        place.end()
        place.start("writeback")
        client.reconnect(place.socket)
        assert client.read_config().writeback == THROUGH
        client.reset_device()
        assert client.read_config().writeback == BACK


@ENGINE
def test_driver_hears_of_another_size_of_the_disk_from_the_next_daemon(place: Place) -> None:
    place.start()
    with Client.connect(place.socket) as client:
        place.end()
        place.resize(2 << 20)
        place.start()
        client.reconnect(place.socket)
        client.wait_config_change()
        assert client.capacity == 2 << 20
