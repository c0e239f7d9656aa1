"""How a daemon starts, stops and comes back: signals, sockets and pid files, the background."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
from functools import partial
from pathlib import Path

import pytest

from tests.daemons import eventually, terminate, wait_until_taken
from tests.probes import Trace
from vhostblk.client.client import Client
from vhostblk.errors import SessionError
from vhostblk.testing.daemon_process import VHOSTBLK, DaemonProcess, is_listening
from vhostblk.testing.plugin import DaemonStarter
from vhostblk.virtio.blk import RequestType

SIZE = 4 << 20
PATHS = pytest.mark.parametrize("path", ["native", "python"])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def slow_disk(sock: Path, latency_ns: int, *more: str) -> list[str]:
    """Words for a disk whose requests take this long."""
    export = f"vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={sock}"
    return [
        *["--blockdev", f"null-co,node-name=d,size=1G,read-zeroes=on,latency-ns={latency_ns}"],
        *["--export", export, *more],
    ]


# ---------------------------------------------------------------- the end


@PATHS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_an_idle_daemon_and_nothing_is_left(
    daemon: DaemonStarter, image: Path, socket_directory: Path, path: str, number: signal.Signals
) -> None:
    sock, pid_file = socket_directory / "s", socket_directory / "pid"
    process = daemon(
        *("serve", image, "--socket", sock, "--pidfile", pid_file, "--data-path", path),
        sockets=[sock],
    )
    eventually(lambda: pid_file.read_text() == f"{process.pid}\n", "the pid file")
    assert process.stop(number=number) == 0
    assert os.listdir(socket_directory) == []
    assert process.output.endswith("INFO: stopping\n")


@PATHS
def test_sigterm_hangs_up_on_an_idle_client(
    daemon: DaemonStarter, image: Path, socket_directory: Path, path: str
) -> None:
    sock = socket_directory / "s"
    process = daemon("serve", image, "--socket", sock, "--data-path", path, sockets=[sock])
    with Client.connect(sock, queues=4) as client:
        client.write(0, b"w" * 4096)
        assert process.stop() == 0
        with pytest.raises(SessionError):
            client.wait_until(lambda: False, 5)
        assert not sock.exists()
        client.abandon()
    assert image.read_bytes()[:4096] == b"w" * 4096
    assert "operation" in process.output  # what was served


@PATHS
def test_sigterm_waits_for_what_is_in_flight(
    storage_daemon: DaemonStarter, socket_directory: Path, path: str
) -> None:
    sock = socket_directory / "s"
    process = storage_daemon("--data-path", path, *slow_disk(sock, 300_000_000), sockets=[sock])
    with Client.connect(sock, queues=2) as client:
        pending = [
            client.submit(RequestType.OUT, 4096 * n, out=b"w" * 4096, queue=n % 2) for n in range(8)
        ]
        wait_until_taken(process, 8)
        assert process.stop() == 0
        client.poll()
        assert [p.status for p in pending] == [0] * 8
        client.abandon()


@PATHS
def test_client_that_leaves_with_requests_in_flight_does_not_hold_up_the_end(
    storage_daemon: DaemonStarter, socket_directory: Path, path: str
) -> None:
    sock = socket_directory / "s"
    process = storage_daemon("--data-path", path, *slow_disk(sock, 200_000_000), sockets=[sock])
    with Client.connect(sock) as client:
        for n in range(8):
            client.submit(RequestType.OUT, 4096 * n, out=b"w" * 4096)
        wait_until_taken(process, 8)
        client.abandon()
    assert process.stop() == 0


@PATHS
def test_several_signals_are_one_stop(
    storage_daemon: DaemonStarter, socket_directory: Path, path: str
) -> None:
    sock = socket_directory / "s"
    process = storage_daemon("--data-path", path, *slow_disk(sock, 300_000_000), sockets=[sock])
    with Client.connect(sock) as client:
        client.submit(RequestType.OUT, 0, out=b"w" * 4096)
        wait_until_taken(process, 1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            os.kill(process.pid, number)
        assert process.wait() == 0
        client.abandon()


def test_half_a_message_does_not_hold_up_the_end(
    daemon: DaemonStarter, image: Path, socket_directory: Path
) -> None:
    sock = socket_directory / "s"
    process = daemon("serve", image, "--socket", sock, sockets=[sock])
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(sock))
        client.send(b"\1\0\0\0\1\0\0\0\0\0\0\0\1\0\0\0\1")
        eventually(lambda: "has connected" in process.output, "the daemon sees its client")
        assert process.stop() == 0


@PATHS
def test_stop_flushes_after_the_last_write(
    daemon: DaemonStarter, image: Path, socket_directory: Path, tmp_path: Path, path: str
) -> None:
    """strace: behind the last write there is an fdatasync, and the locks' fd is closed after it."""
    sock = socket_directory / "s"
    calls = ("pwritev2", "pwritev", "pwrite64", "fdatasync", "fsync")
    trace = Trace(tmp_path / "trace", *calls, io_uring=False)
    process = daemon(
        *("serve", image, "--socket", sock, "--data-path", path),
        sockets=[sock],
        command=[*trace.command, *VHOSTBLK],
    )
    with Client.connect(sock) as client:
        for n in range(8):
            client.submit(RequestType.OUT, 65536 * n, out=b"w" * 65536)
        wait_until_taken(process, 8)
        assert process.stop() == 0
        client.abandon()
    lines = [line for line in trace.text().splitlines() if "io_uring" not in line]
    assert any("pwrite" in line for line in lines)
    assert "fdatasync" in lines[-1]
    assert image.read_bytes()[: 8 * 65536] == b"w" * (8 * 65536)


# ---------------------------------------------------------------- and the beginning after it


@PATHS
def test_daemon_that_was_killed_starts_again_in_the_same_place(
    daemon: DaemonStarter, image: Path, socket_directory: Path, path: str
) -> None:
    sock, pid_file = socket_directory / "s", socket_directory / "pid"
    words = ["serve", str(image), "--socket", str(sock), "--pidfile", str(pid_file)]
    words += ["--data-path", path]
    first = daemon(*words, sockets=[sock])
    with Client.connect(sock) as client:
        client.write(0, b"w" * 4096)
        eventually(lambda: pid_file.read_text() != "", "the pid file")
        first.kill()
        assert sock.exists()
        assert pid_file.read_text() == f"{first.pid}\n"
        client.abandon()
    second = daemon(*words, sockets=[sock])
    with Client.connect(sock) as client:
        assert client.read(0, 4096) == b"w" * 4096
    eventually(lambda: pid_file.read_text() == f"{second.pid}\n", "the new pid")
    assert second.stop() == 0
    assert os.listdir(socket_directory) == []


def test_socket_of_a_running_daemon_is_not_taken(
    daemon: DaemonStarter, image: Path, tmp_path: Path, socket_directory: Path
) -> None:
    sock = socket_directory / "s"
    daemon("serve", image, "--socket", sock, sockets=[sock])
    other = tmp_path / "other.img"
    other.write_bytes(bytes(SIZE))
    said = daemon("serve", other, "--socket", sock).expect_end(1)
    assert said == f"vhostblk: --socket: socket path {sock}: somebody listens there\n"
    with Client.connect(sock) as client:  # and its owner has not suffered
        client.write(0, b"w" * 512)
    assert image.read_bytes()[:512] == b"w" * 512


def test_stop_leaves_a_socket_that_somebody_else_has_put_there(
    daemon: DaemonStarter, image: Path, socket_directory: Path
) -> None:
    sock = socket_directory / "s"
    process = daemon("serve", image, "--socket", sock, sockets=[sock])
    sock.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(os.fspath(sock))
        other.listen()
        assert process.stop() == 0
        assert is_listening(sock)


@PATHS
def test_export_listens_again_when_its_client_has_left(
    daemon: DaemonStarter, image: Path, socket_directory: Path, path: str
) -> None:
    sock = socket_directory / "s"
    daemon("serve", image, "--socket", sock, "--data-path", path, sockets=[sock])
    for n in range(20):
        with Client.connect(sock) as client:
            client.write(512 * n, bytes([n]) * 512)
            if n % 2:
                client.submit(RequestType.OUT, 1 << 20, out=b"x" * 65536)
                client.abandon()
    assert image.read_bytes()[: 512 * 20] == b"".join(bytes([n]) * 512 for n in range(20))


def test_second_client_is_refused_while_the_first_is_served(
    daemon: DaemonStarter, image: Path, socket_directory: Path
) -> None:
    sock = socket_directory / "s"
    process = daemon("serve", image, "--socket", sock, sockets=[sock])
    with Client.connect(sock) as client:
        for _ in range(3):
            with pytest.raises(SessionError):
                Client.connect(sock)
        client.write(0, b"w" * 512)
    with Client.connect(sock) as client:
        assert client.read(0, 512) == b"w" * 512
    assert process.output.count("refused a second front-end") <= 3
    assert "refused a second front-end" in process.output


# ---------------------------------------------------------------- pid files


def test_pid_file_of_a_running_daemon_is_not_taken(
    daemon: DaemonStarter, image: Path, tmp_path: Path, socket_directory: Path
) -> None:
    sock, pid_file = socket_directory / "s", socket_directory / "pid"
    first = daemon("serve", image, "--socket", sock, "--pidfile", pid_file, sockets=[sock])
    eventually(lambda: pid_file.read_text() != "", "the pid file")
    other = tmp_path / "other.img"
    other.write_bytes(bytes(SIZE))
    second = daemon("serve", other, "--socket", socket_directory / "t", "--pidfile", pid_file)
    assert second.expect_end(1) == (
        f"vhostblk: --pidfile {pid_file}: belongs to a daemon that runs\n"
    )
    assert pid_file.read_text() == f"{first.pid}\n"
    assert sorted(os.listdir(socket_directory)) == ["pid", "s"]


def test_pid_file_that_was_there_before_is_written_anew(
    daemon: DaemonStarter, image: Path, socket_directory: Path
) -> None:
    sock, pid_file = socket_directory / "s", socket_directory / "pid"
    pid_file.write_text("a line that is longer than any process id\n" * 3)
    process = daemon("serve", image, "--socket", sock, "--pidfile", pid_file, sockets=[sock])
    eventually(lambda: pid_file.read_text() == f"{process.pid}\n", "the pid file")
    pid_file.unlink()
    pid_file.write_text("1\n")  # somebody else's now
    assert process.stop() == 0
    assert pid_file.read_text() == "1\n"


# ---------------------------------------------------------------- the background


@PATHS
def test_daemonize_returns_when_everything_listens_and_relative_paths_go_on_working(
    image: Path, socket_directory: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (socket_directory / "disk.img").symlink_to(image)
    words = ["--daemonize", "--pidfile", "pid", "--data-path", path]
    words += ["--blockdev", "file,node-name=d,filename=disk.img"]
    for name in ("a", "b"):
        words += [
            "--export",
            f"vhost-user-blk,id={name},node-name=d,addr.type=unix,addr.path={name}",
        ]
    done = subprocess.run(
        [*VHOSTBLK, "storage-daemon", *words],
        cwd=socket_directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,  # waits for the end of everybody who has our pipes
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0
    assert is_listening("a")
    assert is_listening("b")
    pid = int((socket_directory / "pid").read_text())
    try:
        assert os.getsid(pid) == pid
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        for fd in (0, 1, 2):
            assert os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/null"
        monkeypatch.chdir(socket_directory)
        with Client.connect("a") as client:
            assert client.read(0, 4096) == bytes(4096)
    finally:
        terminate(pid)
    assert os.listdir(socket_directory) == ["disk.img"]


@pytest.mark.parametrize(
    ("blockdev", "addr", "message"),
    [
        ("file,node-name=d,filename=missing", "s", "--blockdev: Could not open 'missing'"),
        ("null-co,node-name=d,size=1M", "nowhere/s", "--export id=e: socket path nowhere/s: "),
    ],
)
def test_daemonize_fails_in_the_foreground(
    socket_directory: Path, blockdev: str, addr: str, message: str
) -> None:
    words = ["--daemonize", "--pidfile", "pid", "--blockdev", blockdev, "--export"]
    words += [f"vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={addr}"]
    done = subprocess.run(
        [*VHOSTBLK, "storage-daemon", *words],
        cwd=socket_directory,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"vhostblk: {message}")
    assert done.stderr.count("\n") == 1
    assert os.listdir(socket_directory) == []


@PATHS
def test_two_hundred_exports_start_and_stop(
    storage_daemon: DaemonStarter, socket_directory: Path, path: str
) -> None:
    words = ["--data-path", path]
    sockets = [socket_directory / str(n) for n in range(200)]
    for n, sock in enumerate(sockets):
        words += ["--blockdev", f"null-co,node-name=n{n},size=1M"]
        words += ["--export", f"vhost-user-blk,id=e{n},node-name=n{n},addr.type=unix"]
        words[-1] += f",addr.path={sock}"

    # What most systems give a process: 1024 fds, and far more when it asks.
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, limit[1]), limit[1]))
    try:
        process = storage_daemon(*words, sockets=sockets[-1:])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    eventually(lambda: all(map(is_listening, sockets[::50])), "all exports listen")
    for sock in sockets[::40]:
        with Client.connect(sock) as client:
            client.read(0, 4096)
    assert process.stop() == 0
    assert os.listdir(socket_directory) == []


def test_exports_share_a_node_and_an_iothread(
    storage_daemon: DaemonStarter, image: Path, socket_directory: Path
) -> None:
    words = ["--object", "iothread,id=io", "--blockdev", f"file,node-name=d,filename={image}"]
    sockets = [socket_directory / name for name in ("a", "b", "c")]
    for sock in sockets:
        words += [
            "--export",
            f"vhost-user-blk,id={sock.name},node-name=d,iothread=io,addr.type=unix,"
            f"addr.path={sock},serial={sock.name}",
        ]
    storage_daemon(*words, sockets=sockets)
    with Client.connect(sockets[0]) as one, Client.connect(sockets[1]) as two:
        assert (one.get_id(), two.get_id()) == ("a", "b")
        assert one.read(0, 4096) == two.read(0, 4096)
    with Client.connect(sockets[2]) as client:
        assert client.get_id() == "c"


@PATHS
def test_sighup_tells_the_guest_of_a_new_size(
    daemon: DaemonStarter, image: Path, socket_directory: Path, path: str
) -> None:
    sock = socket_directory / "s"
    process = daemon("serve", image, "--socket", sock, "--data-path", path, sockets=[sock])
    with Client.connect(sock) as client:
        assert client.capacity == SIZE
        os.truncate(image, 2 * SIZE)
        os.kill(process.pid, signal.SIGHUP)
        client.wait_config_change()
        assert client.capacity == 2 * SIZE
        client.write(2 * SIZE - 4096, b"n" * 4096)
        os.truncate(image, SIZE)
        os.kill(process.pid, signal.SIGHUP)
        client.wait_config_change()
        assert client.capacity == SIZE
        os.kill(process.pid, signal.SIGHUP)  # nothing new: nothing is said
        with pytest.raises(TimeoutError):
            client.wait_config_change(0.2)
        client.read(0, 512)
    os.truncate(image, 3 * SIZE)
    os.kill(process.pid, signal.SIGHUP)  # with nobody there
    eventually(lambda: f"the disk has {3 * SIZE} bytes now" in process.output, "the new size")
    with Client.connect(sock) as client:
        assert client.capacity == 3 * SIZE


# ---------------------------------------------------------------- in the middle of the start


def test_sigterm_while_it_starts_ends_it_well(image: Path, socket_directory: Path) -> None:
    """Before the handlers are there the signal simply ends the process; afterwards it is a stop. Never a traceback."""
    words = [*VHOSTBLK, "serve", str(image), "--socket", str(socket_directory / "s")]
    statuses = set()
    for step in range(8):
        process = DaemonProcess(words)
        process.start()
        # Later and later into the start: the sum of the pages it has mapped is a clock of sorts.
        eventually(partial(has_mapped, process.pid, step * 700), "a start")
        os.kill(process.pid, signal.SIGTERM)
        statuses.add(process.wait())
        assert "Traceback" not in process.output
        process.close(check=False)
    assert statuses <= {0, -signal.SIGTERM}


def has_mapped(pid: int, pages: int) -> bool:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) >= pages
