"""Sockets that somebody else has opened: --fd, addr.type=fd, and systemd's LISTEN_FDS."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vhostblk.client.client import Client
from vhostblk.testing.daemon_process import VHOSTBLK
from vhostblk.testing.plugin import DaemonStarter

PATHS = pytest.mark.parametrize("path", ["native", "python"])
# systemd: the environment is made for the process that it becomes, and the sockets begin at fd 3.
ACTIVATE = """
import os, sys
sockets, environment, *command = sys.argv[1:]
for number, fd in enumerate(sockets.split()):
    os.dup2(int(fd), 3 + number)
    os.set_inheritable(3 + number, True)
for item in environment.split():
    name, value = item.split("=")
    os.environ[name] = value.replace("self", str(os.getpid()))
os.execv(command[0], command)
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"d" * (1 << 20))
    return path


@pytest.fixture
def listening(socket_directory: Path) -> Iterator[list[socket.socket]]:
    """Two listening sockets, with fds far from those that a shell uses."""
    with ExitStack() as stack:
        sockets = []
        for name in ("a", "b"):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.bind(os.fspath(socket_directory / name))
            sock.listen()
            sockets.append(sock)
        yield sockets


def check(sock: socket.socket) -> None:
    """Served, and again: the daemon listens on."""
    for _ in range(3):
        with Client.connect(sock.getsockname()) as client:
            assert client.read(0, 512) == b"d" * 512


@PATHS
def test_serve_listens_on_an_inherited_fd(
    daemon: DaemonStarter, image: Path, listening: list[socket.socket], path: str
) -> None:
    fd = listening[0].fileno()
    process = daemon("serve", image, "--fd", str(fd), "--data-path", path, pass_fds=[fd])
    check(listening[0])
    assert process.stop() == 0
    # It was not its own: the file stays, and whoever opened the socket can give it to the next.
    assert os.path.exists(listening[0].getsockname())
    daemon("serve", image, "--fd", str(fd), "--data-path", path, pass_fds=[fd])
    check(listening[0])


@PATHS
def test_storage_daemon_takes_two_fds(
    storage_daemon: DaemonStarter, image: Path, listening: list[socket.socket], path: str
) -> None:
    """As QEMU's qtests start their daemon."""
    words = ["--data-path", path]
    for number, sock in enumerate(listening):
        words += ["--blockdev", f"driver=file,node-name=disk{number},filename={image},read-only=on"]
        words += [
            "--export",
            f"type=vhost-user-blk,id=disk{number},addr.type=fd,addr.str={sock.fileno()},"
            f"node-name=disk{number},num-queues=8",
        ]
    process = storage_daemon(*words, pass_fds=[sock.fileno() for sock in listening])
    for sock in listening:
        check(sock)
    assert process.stop() == 0


@PATHS
@pytest.mark.parametrize("extra", ["", " LISTEN_FDNAMES=vhostblk.socket"])
def test_systemds_socket_is_used(
    daemon: DaemonStarter, image: Path, listening: list[socket.socket], path: str, extra: str
) -> None:
    fd = listening[0].fileno()
    process = daemon(
        *("serve", image, "--data-path", path),
        command=[
            *[sys.executable, "-c", ACTIVATE, str(fd), f"LISTEN_FDS=1 LISTEN_PID=self{extra}"],
            *VHOSTBLK,
        ],
        pass_fds=[fd],
    )
    check(listening[0])
    assert "listening on fd 3" in process.output
    assert process.stop() == 0


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("LISTEN_FDS=1 LISTEN_PID=1", "one of --socket, --fd, or systemd's socket activation"),
        ("LISTEN_FDS=1", "one of --socket, --fd, or systemd's socket activation"),
        ("LISTEN_FDS=2 LISTEN_PID=self", "systemd's LISTEN_FDS='2': one socket is needed"),
        ("LISTEN_FDS=0 LISTEN_PID=self", "systemd's LISTEN_FDS='0': one socket is needed"),
    ],
)
def test_what_systemd_means_for_somebody_else_is_left_alone(
    daemon: DaemonStarter,
    image: Path,
    listening: list[socket.socket],
    environment: str,
    message: str,
) -> None:
    fds = [sock.fileno() for sock in listening]
    process = daemon(
        *("serve", image),
        command=[
            *[sys.executable, "-c", ACTIVATE, f"{fds[0]} {fds[1]}", environment],
            *VHOSTBLK,
        ],
        pass_fds=fds,
    )
    assert message in process.expect_end(1)


def test_socket_option_goes_before_systemds(
    daemon: DaemonStarter, image: Path, listening: list[socket.socket], socket_directory: Path
) -> None:
    fd, own = listening[0].fileno(), socket_directory / "own"
    daemon(
        *("serve", image, "--socket", own),
        sockets=[own],
        command=[
            *[sys.executable, "-c", ACTIVATE, str(fd), "LISTEN_FDS=1 LISTEN_PID=self"],
            *VHOSTBLK,
        ],
        pass_fds=[fd],
    )
    with Client.connect(own) as client:
        assert client.read(0, 512) == b"d" * 512


def test_fds_that_are_no_listening_unix_sockets_are_refused(
    daemon: DaemonStarter, image: Path, tmp_path: Path
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket() as inet, socket.socket(socket.AF_UNIX) as fresh:
        inet.bind(("127.0.0.1", 0))
        inet.listen()
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
            image.open("rb") as file,
        ):
            for wrong, message in (
                (theirs.fileno(), "not listening"),
                (fresh.fileno(), "not listening"),
                (inet.fileno(), "not a Unix stream socket"),
                (datagrams.fileno(), "not a Unix stream socket"),
                (file.fileno(), "not a socket: Socket operation on non-socket"),
            ):
                process = daemon("serve", image, "--fd", str(wrong), pass_fds=[wrong])
                assert process.expect_end(1) == f"vhostblk: --fd: fd {wrong} is {message}\n"


def test_one_fd_cannot_be_two_exports(
    storage_daemon: DaemonStarter, image: Path, listening: list[socket.socket]
) -> None:
    fd = listening[0].fileno()
    words = ["--blockdev", f"file,node-name=d,filename={image},read-only=on"]
    for name in ("a", "b"):
        words += ["--export", f"vhost-user-blk,id={name},node-name=d,addr.type=fd,addr.str={fd}"]
    said = storage_daemon(*words, pass_fds=[fd]).expect_end(1)
    assert said == f"vhostblk: --export id=b: fd {fd} is used by export 'a'\n"
