"""Daemons that may do little, and clients that may not connect."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemons import eventually, stops_answering
from tests.locks import qemu_io
from tests.requirements import require
from tests.unprivileged import NOBODY, as_user, unprivileged
from vhostblk.client.client import Client
from vhostblk.testing.daemon_process import VHOSTBLK, DaemonProcess
from vhostblk.testing.plugin import DaemonStarter

SIZE = 1 << 20
SOMEBODY, THEIR_GROUP = 12345, 23456

Served = Callable[..., tuple[DaemonProcess, Path]]


@pytest.fixture
def disk(socket_directory: Path) -> Path:
    """An image of nobody's."""
    require("root")
    path = socket_directory / "disk.img"
    path.write_bytes(b"d" * SIZE)
    os.chown(path, NOBODY, NOBODY)
    return path


@pytest.fixture
def served_by_nobody(daemon: DaemonStarter, socket_directory: Path, disk: Path) -> Served:
    """Start a daemon of nobody's, with these options; gives it, and its socket."""

    def start(*words: str) -> tuple[DaemonProcess, Path]:
        sock = socket_directory / "sock"
        process = daemon(
            *("serve", disk, "--socket", sock),
            *words,
            command=[*unprivileged(socket_directory), *VHOSTBLK],
            sockets=[sock],
        )
        return process, sock

    return start


# ---------------------------------------------------------------- a daemon without privileges


@pytest.mark.parametrize(
    "words",
    [
        ["--cache", "none", "--pin-memory"],
        ["--data-path", "python"],
        ["--aio", "threads"],
    ],
    ids=" ".join,
)
def test_daemon_of_nobody_serves_guests_larger_than_the_memory_it_may_lock(
    served_by_nobody: Served, disk: Path, words: list[str]
) -> None:
    process, sock = served_by_nobody(*words)
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert f"Uid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}\n" in status
    assert f"CapEff:\t{0:016x}\n" in status
    assert os.stat(sock).st_uid == NOBODY
    assert 'Failed to get "write" lock' in qemu_io(disk)
    for _ in range(2):  # the guest's memory is 32 MiB
        with Client.connect(sock, queues=2) as client:
            client.write(0, b"w" * 65536)
            client.flush()
            assert client.read(0, 131072, queue=1) == b"w" * 65536 + b"d" * 65536
    assert process.stop() == 0
    assert not sock.exists()
    assert disk.read_bytes()[:512] == b"w" * 512


@pytest.mark.parametrize(
    "words", [[], ["--data-path", "python"], ["--aio", "threads"]], ids=" ".join
)
def test_daemon_that_may_start_no_more_threads_serves_and_ends_in_order(
    served_by_nobody: Served, disk: Path, words: list[str]
) -> None:
    process, sock = served_by_nobody(*words)
    with Client.connect(sock) as client:
        client.write(0, b"1" * 512)
        as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        subprocess.run(
            [*as_nobody, "prlimit", "--nproc=1:1", f"--pid={process.pid}"], check=True, timeout=10
        )
        for number in range(64):
            client.write(512 * number, b"2" * 512)
        client.flush()
        assert client.read(0, 64 * 512) == b"2" * 64 * 512
    assert process.stop() == 0
    assert "WARNING: the end may take longer than --shutdown-timeout: " in process.output
    assert disk.read_bytes()[: 64 * 512] == b"2" * 64 * 512


@pytest.mark.parametrize(
    ("image_mode", "folder_mode", "complaint"),
    [
        (0o000, 0o755, "IMAGE '{image}': Permission denied"),
        (
            0o400,
            0o755,
            "Could not open '{image}': Permission denied (read-only=on needs less)",
        ),
        (0o600, 0o555, "--socket: socket path {sock}: Permission denied"),
        (0o600, 0o000, "IMAGE '{image}': Permission denied"),
    ],
    ids=["no image", "image is read-only", "no place for the socket", "no folder"],
)
def test_what_nobody_may_not_do_is_told_in_one_line(
    daemon: DaemonStarter,
    socket_directory: Path,
    disk: Path,
    image_mode: int,
    folder_mode: int,
    complaint: str,
) -> None:
    folder = socket_directory / "theirs"
    folder.mkdir()
    image = disk.rename(folder / "disk.img")
    sock = folder / "sock"
    image.chmod(image_mode)
    folder.chmod(folder_mode)
    os.chown(folder, NOBODY, NOBODY)
    process = daemon(
        *("serve", image, "--socket", sock),
        command=[*unprivileged(socket_directory), *VHOSTBLK],
    )
    assert process.expect_end(1) == f"vhostblk: {complaint.format(image=image, sock=sock)}\n"


def test_nobody_cannot_give_a_socket_away(
    daemon: DaemonStarter, socket_directory: Path, disk: Path
) -> None:
    sock = socket_directory / "sock"
    process = daemon(
        *("serve", disk, "--socket", sock, "--socket-mode", "0660", "--socket-group", "0"),
        command=[*unprivileged(socket_directory), *VHOSTBLK],
    )
    said = process.expect_end(1)
    assert f"--socket: socket path {sock}: cannot be given to group 0: Operation not" in said
    assert not sock.exists()


# ---------------------------------------------------------------- sockets that are not for everybody


def connects(sock: Path, uid: int, gid: int, groups: tuple[int, ...] = ()) -> int:
    """The errno with which a connect fails; 0 if it does not."""
    with socket.socket(socket.AF_UNIX) as client, as_user(uid, gid, groups):
        return client.connect_ex(os.fspath(sock))


def test_socket_has_the_mode_and_the_owner_that_were_asked_for(
    daemon: DaemonStarter, socket_directory: Path, disk: Path
) -> None:
    socket_directory.chmod(0o755)
    sock = socket_directory / "sock"
    process = daemon(
        *("serve", disk, "--socket", sock, "--socket-mode", "660"),
        *("--socket-owner", f"nobody:{THEIR_GROUP}"),
        sockets=[sock],
    )
    status = sock.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (
        *(0o660, NOBODY, THEIR_GROUP),
    )
    assert connects(sock, NOBODY, NOBODY) == 0
    assert connects(sock, SOMEBODY, THEIR_GROUP) == 0
    assert connects(sock, SOMEBODY, 1, (THEIR_GROUP,)) == 0
    assert connects(sock, SOMEBODY, SOMEBODY) == errno.EACCES
    assert process.stop() == 0
    assert not sock.exists()


def test_each_export_has_its_own_socket(
    storage_daemon: DaemonStarter, socket_directory: Path, disk: Path
) -> None:
    words = ["--blockdev", f"file,node-name=d,filename={disk},read-only=on"]
    socks = [socket_directory / name for name in ("a", "b", "c")]
    for sock, more in zip(
        socks,
        ("addr.mode=0600,addr.owner=nobody", f"addr.mode=0666,addr.group={THEIR_GROUP}", ""),
        strict=True,
    ):
        words += [
            "--export",
            f"vhost-user-blk,id={sock.name},node-name=d,addr.type=unix,addr.path={sock},{more}".rstrip(
                ","
            ),
        ]
    before = os.umask(0o022)
    try:
        process = storage_daemon(*words, sockets=socks)
    finally:
        os.umask(before)
    # It listens before it has looked at the file once more, and the folder is gone soon.
    eventually(lambda: process.output.count("listening on") == len(socks), "all exports started")
    found = [
        (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)
        for status in map(os.stat, socks)
    ]
    assert found == [(0o600, NOBODY, 0), (0o666, 0, THEIR_GROUP), (0o755, 0, 0)]


def test_stale_socket_of_somebody_else_is_replaced_by_one_as_asked_for(
    daemon: DaemonStarter, socket_directory: Path, disk: Path
) -> None:
    sock = socket_directory / "sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(os.fspath(sock))
    sock.chmod(0o777)
    daemon("serve", disk, "--socket", sock, "--socket-mode", "0600", sockets=[sock])
    assert stat.S_IMODE(sock.stat().st_mode) == 0o600


def refused(sock: Path, uid: int, gid: int, groups: tuple[int, ...] = ()) -> bool:
    """Whether somebody who has connected is hung up on, before a byte was said."""
    with socket.socket(socket.AF_UNIX) as client:
        with as_user(uid, gid, groups):
            client.connect(os.fspath(sock))
        return stops_answering(client)


@pytest.mark.parametrize("way", ["path", "fd"])
def test_only_those_who_are_named_are_served(
    storage_daemon: DaemonStarter, socket_directory: Path, disk: Path, way: str
) -> None:
    socket_directory.chmod(0o755)
    sock = socket_directory / "sock"
    with socket.socket(socket.AF_UNIX) as listener:
        address = f"addr.type=unix,addr.path={sock},addr.mode=0666"
        if way == "fd":
            listener.bind(os.fspath(sock))
            sock.chmod(0o666)
            listener.listen()
            address = f"addr.type=fd,addr.str={listener.fileno()}"
        process = storage_daemon(
            *["--blockdev", f"file,node-name=d,filename={disk},read-only=on", "--export"],
            f"vhost-user-blk,id=e,node-name=d,{address},allow-user.0=nobody,"
            f"allow-group.0={THEIR_GROUP},allow-group.1=12",
            sockets=[sock],
            pass_fds=[listener.fileno()],
        )
    for uid, gid, groups in (
        (NOBODY, 1, ()),
        (SOMEBODY, 12, ()),
        (SOMEBODY, 1, (7, THEIR_GROUP)),
    ):
        client = socket.socket(socket.AF_UNIX)
        with as_user(uid, gid, groups):
            client.connect(os.fspath(sock))
        with Client.connect(client) as served:
            assert served.read(0, 512) == b"d" * 512
            # They are not even told that somebody is served already.
            assert refused(sock, SOMEBODY, 1)
    assert refused(sock, 0, 0)
    assert refused(sock, SOMEBODY, 1, (7, 8))
    said = [line for line in process.output.splitlines() if "WARNING" in line]
    assert len(said) == 2
    assert (
        f"export e: refused a front-end of user {SOMEBODY}, group 1: not allowed, process"
        in (said[0])
    )
    assert f", process {os.getpid()} (logged once" in said[1]
    assert process.stop() == 0
    assert f"user {SOMEBODY}, group 1: not allowed: 4 times in all" in process.output
