"""Daemons in a sandbox: they serve, and can do little else, in any thread."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemons import terminate
from tests.qcow2_images import check, create, qemu_io
from tests.requirements import require
from vhostblk.client.client import Client
from vhostblk.testing.daemon_process import VHOSTBLK
from vhostblk.testing.plugin import DaemonStarter
from vhostblk.testing.requirements import missing

SIZE = 8 << 20
SANDBOXED = {"VHOSTBLK_SANDBOX": "kill"}

EXPECTED = {
    "read the image": "done",
    "write the image": "done",
    "read another file": "EACCES",
    "write another file": "EACCES",
    "list a folder": "EACCES",
    "read /etc/passwd": "EACCES",
    "read somebody's memory": "EACCES",
    "make a file": "EPERM",
    "make a file where sockets are": "EPERM",
    "remove a file": "EACCES",
    "rename the image": "EPERM",
    "change permissions": "EPERM",
    "give the image away": "EPERM",
    "make a folder": "EPERM",
    "make a link": "EPERM",
    "execute": "EPERM",
    "start a program": "EPERM",
    "fork": "EPERM",
    "a thread": "done",
    "an internet socket": "EPERM",
    "a unix socket": "EPERM",
    "ptrace": "EPERM",
    "mount": "EPERM",
    "a namespace": "EPERM",
    "become root": "EPERM",
    "kill": "EPERM",
    "a limit": "EPERM",
    "a ring": "EPERM",
    "the engine's rings": "EACCES",
    "bpf": "EPERM",
    "new privileges": "EPERM",
    "clone3": "ENOSYS",
}


@pytest.fixture
def image(socket_directory: Path) -> Path:
    require("sandbox")
    path = socket_directory / "disk.img"
    path.write_bytes(b"d" * SIZE)
    return path


@pytest.fixture
def sock(socket_directory: Path) -> Path:
    """In a folder of its own: a daemon may remove files of the folder its socket is in."""
    folder = socket_directory / "sockets"
    folder.mkdir()
    return folder / "s"


# ---------------------------------------------------------------- what they cannot do


def prisoner(mode: str, image: Path, sock: Path) -> subprocess.Popen[str]:
    (image.parent / "elsewhere").mkdir()
    (image.parent / "elsewhere" / "secret").write_text("secret")
    return subprocess.Popen(
        [sys.executable, "-m", "tests.integration.prisoner", mode, str(image), str(sock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_what_is_forbidden_fails_in_every_thread(image: Path, sock: Path) -> None:
    rings = {"the engine's rings": "done"} if missing("io_uring") else {}  # there are none
    with prisoner("on", image, sock) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        found = json.loads(process.stdout.readline())
        assert found == dict.fromkeys(("loop", "aside", "file I/O"), EXPECTED | rings)
        threads = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/status")]
        process.stdin.write("\n")
    # The loop's, that of the engine, those that were asked above: each of them has lost the same.
    assert len(threads) >= 4
    assert any("Name:\te/0" in status.splitlines() for status in threads)
    for status in threads:
        lines = status.splitlines()
        assert {"Seccomp:\t2", "Seccomp_filters:\t2", "NoNewPrivs:\t1"} <= set(lines)
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb", *["CapBnd"] * (os.geteuid() == 0)):
            assert f"{name}:\t{0:016x}" in lines
    assert process.returncode == 0
    assert not (image.parent / "sockets" / "new").exists()


def test_forbidden_system_call_ends_the_process_if_so_wanted(image: Path, sock: Path) -> None:
    with prisoner("kill", image, sock) as process:
        assert process.wait(30) == -signal.SIGSYS


# ---------------------------------------------------------------- what they can


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--cache", "none", "--pin-memory", "--iothreads", "2"],
        ["--aio", "threads"],
        ["--data-path", "python", "--cache", "writethrough"],
        ["--snapshot"],
    ],
    ids=lambda words: " ".join(words) or "default",
)
def test_disk_is_served_grows_and_is_served_again(
    words: list[str], daemon: DaemonStarter, image: Path, sock: Path, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    process = daemon(
        *("serve", image, "--socket", sock, "--pidfile", pid_file),
        *words,
        sockets=[sock],
        environment=SANDBOXED,
    )
    with Client.connect(sock, queues=2) as client:
        client.write(0, b"w" * 65536)
        client.discard((1 << 20, 65536))
        client.write_zeroes((2 << 20, 65536), queue=1)
        client.flush()
        assert client.read(0, 131072, queue=1) == b"w" * 65536 + b"d" * 65536
        os.truncate(image, 2 * SIZE)
        process_is_asked = process.pid
        os.kill(process_is_asked, signal.SIGHUP)
        if "--snapshot" not in words:
            client.wait_config_change()
            assert client.capacity == 2 * SIZE
            client.write(2 * SIZE - 4096, b"e" * 4096)
    with Client.connect(sock) as client:
        assert client.read(2 << 20, 4096) == bytes(4096)
        listed = subprocess.run(
            [*VHOSTBLK, "stats"], capture_output=True, text=True, timeout=30, check=True
        )
        assert str(process.pid) in listed.stdout
    assert process.stop() == 0
    assert not sock.exists()
    assert not pid_file.exists()
    assert not list(Path("/dev/shm").glob(f"vhostblk-{process_is_asked}-*"))
    content = image.read_bytes()
    assert content[:4096] == (b"d" if "--snapshot" in words else b"w") * 4096


@pytest.mark.parametrize("path", ["native", "python"])
def test_chain_of_images_is_served(
    path: str, daemon: DaemonStarter, image: Path, sock: Path, tmp_path: Path
) -> None:
    base = create(tmp_path / "base.qcow2", SIZE, "-b", image, "-F", "raw")
    qemu_io(base, "write -P 1 0 64k")
    top = create(tmp_path / "top.qcow2", SIZE, "-b", base, "-F", "qcow2")
    process = daemon(
        *("serve", top, "--format", "qcow2", "--socket", sock, "--data-path", path),
        *("--sandbox", "kill"),
        sockets=[sock],
    )
    with Client.connect(sock) as client:
        assert client.read(0, 131072) == b"\x01" * 65536 + b"d" * 65536
        client.write(32768, b"\x02" * 65536)
        client.discard((1 << 20, 1 << 20))
        client.flush()
        assert client.read(0, 131072) == b"\x01" * 32768 + b"\x02" * 65536 + b"d" * 32768
    assert process.stop() == 0
    assert check(top) == ""


def test_image_changes_hands_between_daemons_in_sandboxes(
    daemon: DaemonStarter, image: Path, sock: Path
) -> None:
    """Which needs to open it once more."""
    socks = [sock.with_name("1"), sock.with_name("2")]
    for path in socks:
        words = ("serve", image, "--socket", path, "--allow-inactive", "--sandbox", "kill")
        daemon(*words, sockets=[path])
    for number in (1, 2, 3, 4):
        with Client.connect(socks[number % 2]) as client:
            client.write(number * 512, bytes([number]) * 512)
            assert client.read(512, number * 512) == b"".join(
                bytes([before]) * 512 for before in range(1, number + 1)
            )


def test_killed_daemons_place_is_taken_by_another(
    daemon: DaemonStarter, image: Path, sock: Path
) -> None:
    for _ in range(2):
        process = daemon(
            *("serve", image, "--socket", sock, "--sandbox", "kill", "--socket-mode", "0600"),
            *("--socket-owner", str(os.getuid())),
            sockets=[sock],
        )
        with Client.connect(sock) as client:
            client.write(0, b"x" * 512)
        process.kill()


def test_background_daemon_is_in_its_sandbox_before_it_is_said_to_be_ready(
    image: Path, sock: Path, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    words = ["--blockdev", f"file,node-name=d,filename={image}", "--pidfile", str(pid_file)]
    export = f"vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={sock}"
    done = subprocess.run(
        [*VHOSTBLK, "storage-daemon", "--daemonize", *words, "--export", export, "--sandbox=kill"],
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pid = int(pid_file.read_text())
    try:
        assert "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text().splitlines()
    finally:
        terminate(pid)
    assert not sock.exists()


# ---------------------------------------------------------------- complaints


def test_folder_that_is_not_there_is_told_of_as_ever(
    daemon: DaemonStarter, image: Path, tmp_path: Path
) -> None:
    where = tmp_path / "nowhere" / "s"
    process = daemon("serve", image, "--socket", where, "--sandbox", "on")
    assert process.expect_end(1) == (
        f"vhostblk: --socket: socket path {where}: No such file or directory\n"
    )
    assert not list(Path("/dev/shm").glob(f"vhostblk-{os.getpid()}-*"))


def test_environment_that_says_nonsense_is_told_of(
    daemon: DaemonStarter, image: Path, sock: Path
) -> None:
    process = daemon("serve", image, "--socket", sock, environment={"VHOSTBLK_SANDBOX": "maybe"})
    assert process.expect_end(1) == (
        "vhostblk: VHOSTBLK_SANDBOX=maybe: must be off, on, kill or log\n"
    )
