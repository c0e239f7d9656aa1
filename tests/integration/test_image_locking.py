"""Daemons and QEMU's programs keep each other from writing one image, and from reading what another writes."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.locks import held_by_qemu, qemu_io, wait_until_unlocked
from vhostblk.client.client import Client
from vhostblk.testing.daemon_process import VHOSTBLK
from vhostblk.testing.plugin import DaemonStarter

HELD = 'Failed to get shared "write" lock: is another process using the image'
WRITES = 'Failed to get "write" lock'


def refusal(image: Path, socket: Path, *options: str) -> str:
    """What `vhostblk serve` says when it may not have the image."""
    done = subprocess.run(
        [*VHOSTBLK, "serve", str(image), "--socket", str(socket), "--lock-timeout=0", *options],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert not socket.exists()
    return done.stderr


def test_qemu_is_kept_out_until_the_daemon_ends(
    daemon: DaemonStarter, image: Path, socket_directory: Path
) -> None:
    sock = socket_directory / "s"
    process = daemon("serve", image, "--socket", sock, sockets=[sock])
    assert WRITES in qemu_io(image)
    assert qemu_io(image, "-r", "-U") == ""  # force-share looks on
    with Client.connect(sock) as client:  # with and without a client
        client.write(0, bytes(512))
        assert WRITES in qemu_io(image)
    assert process.stop() == 0
    assert qemu_io(image) == ""


def test_killed_daemon_holds_no_lock(
    daemon: DaemonStarter, image: Path, socket_directory: Path
) -> None:
    sock = socket_directory / "s"
    process = daemon("serve", image, "--socket", sock, sockets=[sock])
    process.kill()
    wait_until_unlocked(image)
    assert qemu_io(image) == ""


def test_read_only_daemon_lets_others_read(
    daemon: DaemonStarter, image: Path, socket_directory: Path
) -> None:
    one, two = socket_directory / "1", socket_directory / "2"
    daemon("serve", image, "--socket", one, "--read-only", sockets=[one])
    daemon("serve", image, "--socket", two, "--read-only", sockets=[two])
    assert qemu_io(image, "-r") == ""
    assert WRITES in qemu_io(image)
    assert WRITES in refusal(image, socket_directory / "3")


def test_two_daemons_do_not_write_one_image(
    daemon: DaemonStarter, image: Path, socket_directory: Path
) -> None:
    sock = socket_directory / "s"
    daemon("serve", image, "--socket", sock, sockets=[sock])
    for options in ((), ("--read-only",), ("--cache", "none"), ("--data-path", "python")):
        said = refusal(image, socket_directory / "t", *options)
        assert f"[{image}]" in said
        assert "is another process using the image" in said


def test_second_daemon_that_shares_with_everybody_may_look_on(
    daemon: DaemonStarter, storage_daemon: DaemonStarter, image: Path, socket_directory: Path
) -> None:
    one, two = socket_directory / "1", socket_directory / "2"
    daemon("serve", image, "--socket", one, sockets=[one])
    node = f"driver=file,node-name=d,filename={image},read-only=on,force-share=on"
    export = f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={two}"
    storage_daemon("--blockdev", node, "--export", export, sockets=[two])
    with Client.connect(one) as writer, Client.connect(two) as reader:
        writer.write(0, b"new!" * 128)
        assert reader.read(0, 512) == b"new!" * 128


def test_daemon_does_not_take_what_qemu_writes(image: Path, socket_directory: Path) -> None:
    with held_by_qemu(image):
        for options in ((), ("--read-only",)):
            assert HELD in refusal(image, socket_directory / "s", *options)


def test_daemon_reads_what_qemu_reads(
    daemon: DaemonStarter, image: Path, socket_directory: Path
) -> None:
    sock = socket_directory / "s"
    with held_by_qemu(image, "-r"):
        daemon("serve", image, "--socket", sock, "--read-only", sockets=[sock])
        with Client.connect(sock) as client:
            assert client.read(0, 512) == bytes(512)
        assert WRITES in refusal(image, socket_directory / "t")


def test_exports_that_share_a_node_share_it_with_nobody_else(
    storage_daemon: DaemonStarter, image: Path, socket_directory: Path
) -> None:
    words = ["--blockdev", f"file,node-name=d,filename={image}"]
    for name in ("a", "b"):
        words += [
            "--export",
            f"vhost-user-blk,id={name},node-name=d,writable=on,addr.type=unix,"
            f"addr.path={socket_directory / name}",
        ]
    process = storage_daemon(*words, sockets=[socket_directory / "a", socket_directory / "b"])
    assert WRITES in qemu_io(image)
    assert qemu_io(image, "-r", "-U") == ""
    for options in ((), ("--read-only",)):
        assert "is another process using" in refusal(image, socket_directory / "c", *options)
    assert process.stop() == 0
    assert qemu_io(image) == ""


def test_locking_off_takes_no_part(
    storage_daemon: DaemonStarter, image: Path, socket_directory: Path
) -> None:
    sock = socket_directory / "s"
    with held_by_qemu(image):
        storage_daemon(
            *["--blockdev", f"file,node-name=d,filename={image},locking=off", "--export"],
            f"vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={sock}",
            sockets=[sock],
        )
        with Client.connect(sock) as client:
            client.write(0, b"w" * 512)
