"""A daemon whose image is still another process's waits for it: that of a killed daemon is held by its last I/O."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.daemons import eventually
from tests.locks import held_by_qemu
from tests.requirements import require
from vhostblk.client.client import Client
from vhostblk.testing.daemon_process import VHOSTBLK, DaemonProcess, is_listening

WAITING = "waiting for at most"


@pytest.fixture(params=["raw", "qcow2", "read-only"])
def words(request: pytest.FixtureRequest, image: Path) -> list[str]:
    """What is served."""
    if request.param == "read-only":
        return [str(image), "--read-only"]
    if request.param == "qcow2":
        command = [require("qemu-img", group="qemu"), "create", "-qf", "qcow2", str(image), "64k"]
        subprocess.run(command, check=True)
    return [str(image), "--format", request.param]


def starting(words: list[str], socket: Path, *options: str) -> DaemonProcess:
    """A daemon that nobody waits for."""
    return DaemonProcess([*VHOSTBLK, "serve", *words, "--socket", str(socket), *options])


def test_daemon_serves_as_soon_as_the_image_is_free(
    words: list[str], image: Path, socket_directory: Path
) -> None:
    sock = socket_directory / "s"
    with ExitStack() as stack:
        daemon = starting(words, sock, "--lock-timeout", "60")
        with held_by_qemu(image):
            stack.enter_context(daemon)
            eventually(lambda: WAITING in daemon.output, "it waits", 30)
            assert daemon.status is None
            assert not sock.exists()
        eventually(lambda: is_listening(sock), "it listens", 30)
        with Client.connect(sock) as client:
            client.read(0, 512)
        assert f"[{image}]" in daemon.output
        assert daemon.stop() == 0


def test_daemon_gives_up_in_the_end(image: Path, socket_directory: Path) -> None:
    sock = socket_directory / "s"
    with held_by_qemu(image):
        done = subprocess.run(
            [*VHOSTBLK, "serve", str(image), "--socket", str(sock), "--lock-timeout", "1"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    *_, said = done.stderr.splitlines()
    assert said.endswith(f"is another process using the image [{image}]? (waited 1 s for it)")
    assert not sock.exists()


def test_daemon_that_waits_can_be_stopped(image: Path, socket_directory: Path) -> None:
    sock = socket_directory / "s"
    pid_file = socket_directory / "pid"
    words = [str(image), "--pidfile", str(pid_file)]
    with held_by_qemu(image), starting(words, sock, "--lock-timeout", "600") as daemon:
        eventually(lambda: WAITING in daemon.output, "it waits", 30)
        os.kill(daemon.pid, signal.SIGTERM)
        daemon.expect_end(0)
    assert not sock.exists()
    assert not pid_file.exists()


def test_storage_daemon_waits_for_its_images_together(image: Path, socket_directory: Path) -> None:
    """One option for all of them: two images that are held cost the time of one."""
    other = image.with_name("other.img")
    other.write_bytes(bytes(65536))
    words = [*VHOSTBLK, "storage-daemon", "--lock-timeout", "60"]
    for name, path in (("a", image), ("b", other)):
        words += ["--blockdev", f"file,node-name={name},filename={path}"]
        words += [
            "--export",
            f"vhost-user-blk,id={name},node-name={name},writable=on,addr.type=unix,"
            f"addr.path={socket_directory / name}",
        ]
    with DaemonProcess(words) as daemon:
        with held_by_qemu(image), held_by_qemu(other):
            eventually(lambda: WAITING in daemon.output, "it waits", 30)
        eventually(lambda: all(is_listening(socket_directory / n) for n in "ab"), "both listen", 30)
