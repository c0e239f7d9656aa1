"""Exports that have their image only while queues run: of two daemons the one has it whose guest runs."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.daemons import eventually
from tests.locks import held_by_qemu
from tests.requirements import require
from vhostblk.client.client import Client
from vhostblk.client.control import PROTOCOL_FEATURES
from vhostblk.errors import PeerError, SessionError
from vhostblk.testing.plugin import DaemonStarter
from vhostblk.vhost.message import ProtocolFeature

SIZE = 4 << 20
ROUNDS = 4


def make(image: Path, image_format: str) -> list[str]:
    """A fresh image, and the options to serve it."""
    command = [require("qemu-img", group="qemu"), "create", "-qf", image_format]
    subprocess.run([*command, image, str(SIZE)], check=True)
    return ["serve", str(image), "--format", image_format, "--allow-inactive"]


@pytest.mark.parametrize("data_path", ["native", "python"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_image_goes_where_queues_run(
    daemon: DaemonStarter,
    socket_directory: Path,
    tmp_path: Path,
    image_format: str,
    data_path: str,
) -> None:
    words = [*make(tmp_path / "disk", image_format), "--data-path", data_path]
    sockets = [socket_directory / name for name in ("a", "b")]
    daemons = [daemon(*words, "--socket", path, sockets=[path]) for path in sockets]
    with ExitStack() as stack:
        clients = []
        for path in sockets:
            client = stack.enter_context(Client.connect(path))
            assert client.capacity == SIZE
            client.stop_queue(0)
            clients.append(client)
        expected = bytearray(SIZE)
        for number in range(ROUNDS):
            here = clients[number % 2]
            here.start_queue(0)
            assert here.read(0, SIZE) == bytes(expected)
            for offset in range(number << 16, SIZE, 7 << 16):
                data = os.urandom(1 << 12)
                here.write(offset, data)
                expected[offset : offset + len(data)] = data
            here.stop_queue(0)
    for process in daemons:
        assert process.stop() == 0


def test_queue_that_starts_waits_for_the_image_and_fails_in_the_end(
    daemon: DaemonStarter, socket_directory: Path, tmp_path: Path
) -> None:
    image, sock = tmp_path / "disk", socket_directory / "s"
    words = make(image, "qcow2")
    process = daemon(*words, "--socket", sock, "--lock-timeout", "1", sockets=[sock])
    with held_by_qemu(image), pytest.raises((PeerError, SessionError)):
        Client.connect(sock)
    assert "the image belongs to somebody else: Failed to get" in process.output
    assert "(waited 1 s for it)" in process.output
    with Client.connect(sock) as client:
        client.write(0, bytes(512))
    assert process.stop() == 0


def test_image_that_is_needed_again_before_it_is_given_up_stays(
    daemon: DaemonStarter, socket_directory: Path, tmp_path: Path
) -> None:
    """A migration that fails: the source goes on."""
    sock = socket_directory / "s"
    words = make(tmp_path / "disk", "qcow2")
    process = daemon(*words, "--socket", sock, sockets=[sock])
    with Client.connect(sock, queues=2) as client:
        for number in range(3):
            client.write(number << 16, b"%d" % number * 512)
            for index in range(2):
                client.stop_queue(index)
            for index in range(2):
                client.start_queue(index)
        assert client.read(1 << 16, 512) == b"1" * 512
    eventually(lambda: process.output.count("its image is given up") == 4, "it is given up")
    assert process.stop() == 0


def test_nodes_that_are_not_active_are_activated_for_exports_that_need_it(
    storage_daemon: DaemonStarter, socket_directory: Path, tmp_path: Path
) -> None:
    image, sock = tmp_path / "disk", socket_directory / "s"
    make(image, "raw")
    node = f"driver=raw,node-name=d,active=off,file.driver=file,file.filename={image}"
    export = f"vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={sock}"
    words = ["--blockdev", node, "--export", export, "--lock-timeout", "0"]
    with held_by_qemu(image):
        said = storage_daemon(*words).expect_end(1)
        assert "lock" in said
        allowed = [*words[:3], f"{export},allow-inactive=on", *words[4:]]
        process = storage_daemon(*allowed, sockets=[sock])
    with Client.connect(sock) as client:
        client.write(0, bytes(512))
    assert process.stop() == 0


def test_base_is_told_after_a_status_of_zero(
    daemon: DaemonStarter, socket_directory: Path, tmp_path: Path
) -> None:
    """QEMU up to 7.2 says SET_STATUS 0 before GET_VRING_BASE when a machine stops, and goes on from there."""
    sock = socket_directory / "s"
    process = daemon(*make(tmp_path / "disk", "raw"), "--socket", sock, sockets=[sock])
    features = PROTOCOL_FEATURES | ProtocolFeature.STATUS
    with Client.connect(sock, protocol_features=features) as client:
        for _ in range(3):
            client.read(0, 512)
        client.control.ask(client.control.frontend.set_status(0))
        assert client.control.vring_base(0) == 3
    assert process.stop() == 0
