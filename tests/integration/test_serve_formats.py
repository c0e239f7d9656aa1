"""`vhostblk serve --format`: what is in an image, or its bytes; and nobody guesses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.qcow2_images import MIB, check, create, qemu_io
from vhostblk.client.client import Client
from vhostblk.testing.plugin import DaemonStarter

SIZE = 8 * MIB


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """Of a base in another folder, which it names relative to its own."""
    (tmp_path / "bases").mkdir()
    base = create(tmp_path / "bases" / "base.qcow2", SIZE)
    qemu_io(base, "write -P 1 0 4M")
    return create(tmp_path / "i.qcow2", SIZE, "-b", "bases/base.qcow2", "-F", "qcow2")


@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
@pytest.mark.parametrize("path", ["native", "python"])
def test_disk_in_a_qcow2_image_is_served_with_all_that_it_is_backed_by(
    path: str, cache: str, daemon: DaemonStarter, overlay: Path, socket_directory: Path
) -> None:
    base, sock = overlay.parent / "bases" / "base.qcow2", socket_directory / "s"
    before = base.read_bytes()
    words = ("serve", overlay, "--format", "qcow2", "--socket", sock, "--data-path", path)
    process = daemon(*words, "--cache", cache, sockets=[sock])
    with Client.connect(sock) as disk:
        assert disk.capacity == SIZE
        assert disk.read(MIB, 4096) == b"\x01" * 4096
        disk.write(MIB, b"\x02" * 4096)
        disk.discard((2 * MIB, MIB))
        assert disk.read(MIB - 4096, 3 * 4096) == b"".join(bytes([n]) * 4096 for n in (1, 2, 1))
    assert process.stop() == 0
    assert check(overlay) == ""
    qemu_io(
        overlay, "read -P 1 0 1M", f"read -P 2 {MIB} 4096", "read -P 0 2M 1M", "read -P 1 3M 1M"
    )
    assert base.read_bytes() == before


def test_qcow2_image_that_is_served_read_only_is_not_changed_and_is_shared(
    daemon: DaemonStarter, overlay: Path, socket_directory: Path
) -> None:
    before = overlay.read_bytes()
    sockets = [socket_directory / "a", socket_directory / "b"]
    for sock in sockets:
        words = ("serve", overlay, "--format", "qcow2", "--read-only", "--socket", sock)
        daemon(*words, sockets=[sock])
    for sock in sockets:
        with Client.connect(sock) as disk:
            assert disk.read(0, 4096) == b"\x01" * 4096
            assert disk.read(SIZE - 4096, 4096) == bytes(4096)
    assert overlay.read_bytes() == before


def test_bytes_of_an_image_are_served_only_if_that_is_what_was_asked_for(
    daemon: DaemonStarter, overlay: Path, socket_directory: Path
) -> None:
    sock = socket_directory / "s"
    words = (sys.executable, "-m", "vhostblk", "serve", overlay, "--socket", sock)
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "--format qcow2 serves the disk that is in it, --format raw" in done.stderr
    daemon("serve", overlay, "--format", "raw", "--read-only", "--socket", sock, sockets=[sock])
    with Client.connect(sock) as disk:
        assert disk.read(0, 512) == overlay.read_bytes()[:512]


def test_raw_disk_whose_guest_made_it_look_like_an_image_is_refused_the_next_time(
    daemon: DaemonStarter, overlay: Path, tmp_path: Path, socket_directory: Path
) -> None:
    raw, sock = tmp_path / "raw", socket_directory / "s"
    raw.write_bytes(bytes(MIB))
    process = daemon("serve", raw, "--socket", sock, sockets=[sock])
    with Client.connect(sock) as disk:
        disk.write(0, overlay.read_bytes()[: 64 << 10])
        assert disk.read(0, 512)[:4] == b"QFI\xfb"
    assert process.stop() == 0
    words = (sys.executable, "-m", "vhostblk", "serve", raw, "--socket", sock)
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "a guest may have made them look like that" in done.stderr
