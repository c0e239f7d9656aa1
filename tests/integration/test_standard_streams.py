"""Programs whose standard streams are closed, full, or read by nobody."""

from __future__ import annotations

import fcntl
import os
import select
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemons import eventually, terminate
from vhostblk.client.client import Client
from vhostblk.testing.daemon_process import VHOSTBLK, is_listening

CLOSED = ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"]


def shell(words: list[str], redirections: str, **environment: str) -> tuple[int, str]:
    """Exit status, and what was said on the streams that are left."""
    done = subprocess.run(
        ["sh", "-c", f"exec {shlex.join([*VHOSTBLK, *words])} {redirections}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
        timeout=30,
        check=False,
    )
    return done.returncode, done.stdout.decode()


@pytest.mark.parametrize("redirections", CLOSED)
@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["stats", "--json"], 0),
        (["check", "--list"], 0),
        (["io"], 0),
        (["io", "-f", "raw", "-c", "map", "disk.img"], 0),
        (["img", "info", "disk.img"], 0),
        (["storage-daemon", "--blockdev", "help"], 0),
        (["serve", "missing.img", "--socket", "s"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_program_does_its_work_without_a_stream(
    words: list[str],
    status: int,
    redirections: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("disk.img").write_bytes(bytes(4096))
    found, said = shell(words, redirections)
    assert found == status
    assert "Traceback" not in said
    # What belongs to a stream that is closed comes out of no other one.
    if ">&-" in redirections.split() and not status:
        assert said == ""
    if "2>&-" in redirections and status:
        assert said == ""


@pytest.mark.parametrize(
    "words",
    [["--help"], ["stats"], ["check", "--list"], ["io", "-c", "help"], ["bench", "--help"]],
    ids=" ".join,
)
def test_output_that_has_no_room_is_an_error_that_names_it(words: list[str]) -> None:
    status, said = shell(words, ">/dev/full")
    assert status == 1
    program = "vhostblk-io" if words[0] == "io" else "vhostblk"
    assert said == f"{program}: standard output: No space left on device\n"


@pytest.mark.parametrize(
    "words", [["io", "-c", "help", "-c", "help"], ["storage-daemon", "--blockdev", "help"]], ids=str
)
def test_reader_that_has_left_is_no_error(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        [*VHOSTBLK, *words], stdout=writer, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        os.close(writer)
        assert process.communicate(timeout=30)[1] == b""
    assert process.returncode == 0


@pytest.mark.parametrize("words", [["check", "--list"], ["storage-daemon", "--help"]], ids=str)
def test_terminal_without_unicode_is_no_error(words: list[str]) -> None:
    old = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    status, said = shell(words, "", **old)
    assert status == 0
    assert said.isascii()
    assert ("\\xa7" if words[0] == "check" else "\\u2026") in said


@pytest.mark.parametrize("redirections", CLOSED)
def test_daemon_serves_in_the_background_whatever_was_closed_when_it_was_started(
    redirections: str, tmp_path: Path, socket_directory: Path
) -> None:
    """What it opens must not get the number of a stream: those are replaced when it goes to the background."""
    path, pid_file = socket_directory / "s", tmp_path / "pid"
    words = ["storage-daemon", "--daemonize", "--pidfile", str(pid_file)]
    words += ["--blockdev", "memory,node-name=d,size=1M", "--export"]
    words += [f"vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={path}"]
    status, said = shell(words, redirections)
    assert status == 0, said
    pid = int(pid_file.read_text())
    try:
        with Client.connect(str(path)) as client:
            assert client.read(0, 512) == bytes(512)
        for fd in range(3):
            assert os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/null"
    finally:
        terminate(pid)
    assert not pid_file.exists()


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_socket_may_be_standard_input(
    background: bool, tmp_path: Path, socket_directory: Path
) -> None:
    """As inetd passes it; a daemon that goes to the background has it still."""
    path, pid_file = str(socket_directory / "s"), tmp_path / "pid"
    words = ["storage-daemon", "--pidfile", str(pid_file), *["--daemonize"] * background]
    words += ["--blockdev", "memory,node-name=d,size=1M"]
    words += ["--export", "vhost-user-blk,id=e,node-name=d,addr.type=fd,addr.str=0"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        starter = subprocess.Popen([*VHOSTBLK, *words], stdin=listener.fileno())
    with starter:
        try:
            with Client.connect(path, timeout=10) as client:
                assert client.read(0, 512) == bytes(512)
        finally:
            eventually(pid_file.exists, "the pid file")
            terminate(int(pid_file.read_text())) if background else starter.terminate()
    assert starter.returncode == 0
    with pytest.raises(ConnectionRefusedError), socket.socket(socket.AF_UNIX) as late:
        late.connect(path)


@contextmanager
def daemon_that_logs_to(
    writer: int, socket: Path, *options: str
) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [*VHOSTBLK, "serve", *options, "--socket", str(socket), "disk.img"], stderr=writer
    ) as process:
        try:
            eventually(lambda: is_listening(socket), "the socket")
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("path", ["native", "python"])
def test_daemon_waits_for_nobody_who_reads_its_log(
    path: str, tmp_path: Path, socket_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("disk.img").write_bytes(bytes(4096))
    socket = socket_directory / "s"
    reader, writer = os.pipe()
    room = 4 * select.PIPE_BUF
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, room)
    with daemon_that_logs_to(writer, socket, "--data-path", path) as process:
        os.close(writer)
        connections = 0
        # Each says that it has come, and that it has left.
        while connections * len("vhostblk: INFO: export disk: the front-end has left") < 2 * room:
            with Client.connect(str(socket)) as client:
                assert client.read(0, 512) == bytes(512)
            connections += 1
        text = os.read(reader, 2 * room)
        while b"missing" not in text:
            with Client.connect(str(socket)):
                connections += 1
            text += os.read(reader, 2 * room)
        os.set_blocking(reader, True)
        process.send_signal(signal.SIGTERM)
        while more := os.read(reader, room):
            text += more
        assert process.wait(30) == 0
    os.close(reader)
    lines = text.decode().splitlines()
    (missing,) = (line for line in lines if "missing" in line)
    assert missing.startswith("vhostblk: WARNING: ")
    assert missing.endswith(" lines are missing here: nobody read the log")
    lost = int(missing.split()[2])
    told = sum("front-end has" in line for line in lines)
    assert lost + told == 2 * connections
