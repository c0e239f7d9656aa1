"""Wrong options of `vhostblk serve`: exit code 1 and one line that names option and value, before any socket exists."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.cli.complaints import complain
from vhostblk.cli import main as cli

pytestmark = pytest.mark.usefixtures("folder")

# words after `serve`; what the line must contain
SERVE = [
    ((), "IMAGE"),
    (("disk.img",), "one of --socket, --fd, or systemd's socket activation is needed"),
    (("disk.img", "other.img", "--socket", "s"), "other.img"),
    (("disk.img", "--sokcet", "s"), "--sokcet"),
    (("disk.img", "--socket"), "--socket: expected one argument"),
    (("disk.img", "--socket", "s", "--fd", "4"), "--fd: not allowed with argument --socket"),
    (("missing.img", "--socket", "s"), "IMAGE 'missing.img': No such file or directory"),
    (("", "--socket", "s"), "IMAGE '': No such file or directory"),
    (("folder", "--socket", "s"), "IMAGE 'folder': Is a directory"),
    (("a\nb", "--socket", "s"), r"IMAGE 'a\nb': No such file or directory"),
    (("a\x1b[31m", "--socket", "s"), r"IMAGE 'a\x1b[31m': No such file"),
    (("a\udcff", "--socket", "s"), r"IMAGE 'a\udcff': No such file"),
    (("fifo", "--socket", "s"), "Could not open 'fifo': neither a regular file nor a block device"),
    (("/dev/null", "--socket", "s"), "Could not open '/dev/null': neither a regular file"),
    (
        ("image.qcow2", "--socket", "s"),
        "image.qcow2: looks like a qcow2 image; --format qcow2 serves the disk that is in it, --format raw",
    ),
    (("disk.img", "--socket", "s", "--format", "qcow2"), "Image is not in qcow2 format"),
    (("missing.img", "--socket", "s", "--format", "qcow2"), "'missing.img': No such file"),
    (("disk.img", "--socket", "s", "--queues", "0"), "--queues: '0' is not a number from 1 to 256"),
    (("disk.img", "--socket", "s", "--queues", "-3"), "--queues: '-3'"),
    (("disk.img", "--socket", "s", "--queues", "257"), "--queues: '257'"),
    (("disk.img", "--socket", "s", "--queues", "two"), "--queues: 'two'"),
    (("disk.img", "--socket", "s", "--queues", "9" * 5000), "--queues: '999"),
    (("disk.img", "--socket", "s", "--queues", "²"), "--queues: '²'"),
    (("disk.img", "--socket", "s", "--iothreads", "0"), "--iothreads: '0'"),
    (("disk.img", "--socket", "s", "--iothreads", "-1"), "--iothreads: '-1'"),
    (("disk.img", "--socket", "s", "--iothreads", "100000"), "--iothreads: '100000'"),
    (("disk.img", "--fd", "-1"), "--fd: '-1'"),
    (("disk.img", "--fd", "x"), "--fd: 'x'"),
    *(
        (
            ("disk.img", "--fd", "3", option, value),
            "--fd: --socket-mode, --socket-owner and --socket-group need --socket",
        )
        for option, value in (
            ("--socket-mode", "0600"),
            ("--socket-owner", "0"),
            ("--socket-group", "0"),
        )
    ),
    (
        ("disk.img", "--socket", "s", "--socket-mode", "9"),
        "--socket-mode: expects three octal digits, as in 0660, not '9'",
    ),
    (
        ("disk.img", "--socket", "s", "--socket-owner", "no one"),
        "--socket-owner: there is no user 'no one'",
    ),
    (
        ("disk.img", "--socket", "s", "--socket-owner", "0:0", "--socket-group", "0"),
        "--socket-group: the group of the socket is given twice",
    ),
    (("disk.img", "--socket", "s", "--allow-user", ""), "--allow-user: there is no user ''"),
    (("disk.img", "--fd", "99999999999999999999"), "--fd: '99999999999999999999'"),
    (
        ("disk.img", "--socket", "s", "--serial", "x" * 21),
        "--serial: 'xxxxxxxxxxxxxxxxxxxxx' has more than 20 bytes",
    ),
    (("disk.img", "--socket", "s", "--serial", "é" * 11), "has more than 20 bytes"),
    (("disk.img", "--socket", "s", "--name", "a/b"), "--name: 'a/b' is not made of letters"),
    (("disk.img", "--socket", "s", "--name", ""), "--name: '' is not made of letters"),
    (("disk.img", "--socket", "s", "--cache", "fast"), "--cache: invalid choice: 'fast'"),
    (("disk.img", "--socket", "s", "--discard", "on"), "--discard: invalid choice: 'on'"),
    (("disk.img", "--socket", "s", "--aio", "native"), "--aio: invalid choice: 'native'"),
    (("disk.img", "--socket", "s", "--format", "vmdk"), "--format: invalid choice: 'vmdk'"),
    (("disk.img", "--socket", "s", "--data-path", "c"), "--data-path: invalid choice: 'c'"),
    (("disk.img", "--socket", "s", "--log-level", "loud"), "--log-level: invalid choice: 'loud'"),
    (
        ("disk.img", "--socket", "s", "--pidfile", "nowhere/pid"),
        "--pidfile nowhere/pid: No such file",
    ),
    (("disk.img", "--socket", "s", "--pidfile", "folder"), "--pidfile folder: Is a directory"),
    (("disk.img", "--socket", "s", "--pidfile", "fifo"), "--pidfile fifo: not a regular file"),
    (
        ("disk.img", "--socket", "s", "--pidfile", "/dev/null"),
        "--pidfile /dev/null: not a regular file",
    ),
]


@pytest.mark.parametrize(("words", "message"), SERVE, ids=lambda value: " ".join(value)[:40])
def test_serve_refuses(
    words: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    sockets: list[str],
    log: list[str],
) -> None:
    assert message in complain(cli.main, ("serve", *words), capsys)
    assert (sockets, log) == ([], [])


# Only listening tells that it is impossible.
SOCKETS = [
    (("--socket", ""), "--socket: socket path '': not a path"),
    (("--socket", "x" * 200), "path too long"),
    (("--socket", "nowhere/s"), "--socket: socket path nowhere/s: No such file or directory"),
    (
        ("--socket", "not-a-socket"),
        "--socket: socket path not-a-socket: exists and is not a socket",
    ),
    (("--fd", "999"), "--fd: fd 999 is not a socket: Bad file descriptor"),
    (("--fd", "2147483647"), "--fd: fd 2147483647 is not a socket: Bad file descriptor"),
]


@pytest.mark.parametrize(("words", "message"), SOCKETS, ids=lambda value: " ".join(value)[:40])
def test_serve_cannot_listen(
    words: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    log: list[str],
    folder: Path,
) -> None:
    before = set(os.listdir(folder))
    said = complain(cli.main, ("serve", "disk.img", *words, "--pidfile", "pid"), capsys)
    assert message in said
    assert log == []
    assert set(os.listdir(folder)) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "a COMMAND is needed: serve, storage-daemon, img, io, bench, check or stats"),
        (("--typo",), "--typo"),
        (("server",), "COMMAND: invalid choice: 'server'"),
    ],
)
def test_vhostblk_refuses(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in complain(cli.main, words, capsys)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LISTEN_FDS": "1", "LISTEN_PID": "1"}, "one of --socket, --fd, or systemd's"),
        ({"LISTEN_FDS": "2", "LISTEN_PID": "self"}, "LISTEN_FDS='2': one socket is needed"),
        ({"LISTEN_FDS": "", "LISTEN_PID": "self"}, "LISTEN_FDS=''"),
    ],
)
def test_systemd_must_mean_this_process_and_one_socket(
    environment: dict[str, str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("self", str(os.getpid())))
    assert message in complain(cli.main, ("serve", "disk.img"), capsys)
