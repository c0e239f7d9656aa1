"""What is in contrib/ works: options exist, units are sound, the script leaves nothing behind."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import socket
import subprocess
import sysconfig
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.docs.documents import ROOT, table
from vhostblk.cli import main
from vhostblk.client.client import Client
from vhostblk.testing.daemon_process import VHOSTBLK, DaemonProcess
from vhostblk.testing.plugin import require

CONTRIB = ROOT / "contrib"


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((CONTRIB / name).read_text())
    return parser


def exec_start(image: str) -> list[str]:
    """The service's command, without the program and the options of a configuration file."""
    words = unit("vhostblk@.service")["Service"]["ExecStart"].split()
    assert words.pop(0) == "vhostblk"
    words.remove("$VHOSTBLK_OPTIONS")
    return [image if word == "/var/lib/vhostblk/%i.img" else word for word in words]


def test_readme_lists_what_is_there() -> None:
    listed = re.findall(
        r"[\w@.-]+",
        " ".join(row["file"] for row in table((CONTRIB / "README.md").read_text(), "contrib")),
    )
    assert sorted([*listed, "README.md"]) == sorted(path.name for path in CONTRIB.iterdir())


def test_command_of_the_service_is_understood() -> None:
    args = main.build_parser().parse_args(exec_start("x.img"))
    assert (args.image, args.socket, args.fd) == ("x.img", None, None)


def test_service_and_socket_belong_together() -> None:
    service, sock = unit("vhostblk@.service"), unit("vhostblk@.socket")
    assert service["Unit"]["Requires"] == service["Unit"]["After"] == "vhostblk@%i.socket"
    assert service["Service"]["ReadWritePaths"] == "/var/lib/vhostblk"
    assert sock["Socket"]["ListenStream"] == "/run/vhostblk/%i.sock"


def test_service_serves_the_socket_that_systemd_opens(socket_directory: Path) -> None:
    image, path = socket_directory / "disk.img", socket_directory / "sock"
    image.write_bytes(bytes(1 << 20))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        # systemd passes descriptor 3 and the process id, which the daemon keeps through exec.
        script = 'exec 3<&"$1"; shift; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
        command = ["bash", "-c", script, "systemd", str(listener.fileno())]
        command += [*VHOSTBLK, *exec_start(str(image))]
        with (
            DaemonProcess(command, sockets=[path], pass_fds=[listener.fileno()]) as daemon,
            Client.connect(path) as client,
        ):
            client.write(0, b"x" * 512)
            client.flush()
            assert daemon.status is None
        assert path.exists()  # systemd's to remove
    assert image.read_bytes()[:512] == b"x" * 512


@pytest.mark.parametrize("name", ["vhostblk@.service", "vhostblk@.socket"])
def test_systemd_finds_nothing_wrong(name: str, tmp_path: Path) -> None:
    analyze = require("systemd-analyze")
    for path in CONTRIB.glob("vhostblk@.*"):
        shutil.copy(path, tmp_path)
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(tmp_path / name)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    # The program is not installed where systemd looks.
    complaints = [line for line in done.stderr.splitlines() if "is not executable" not in line]
    assert complaints == []


def test_libvirt_disk_is_on_the_socket_of_the_unit() -> None:
    domain = ElementTree.parse(CONTRIB / "libvirt-disk.xml").getroot()
    disk = domain.find("devices/disk")
    source = domain.find("devices/disk/source")
    access = domain.find("memoryBacking/access")
    assert disk is not None
    assert source is not None
    assert access is not None
    assert disk.get("type") == "vhostuser"
    assert access.get("mode") == "shared"
    stream = unit("vhostblk@.socket")["Socket"]["ListenStream"]
    assert source.get("path") == stream.replace("%i", "guest1")


def test_qemu_example_serves_while_qemu_runs_and_leaves_nothing(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    qemu = tmp_path / "qemu"
    qemu.write_text(
        '#!/bin/sh\necho "$@"\nfor word; do case $word in *path=*) path=${word#*path=};; esac; done\n'
        'test -S "${path%%,*}"\n'
    )
    qemu.chmod(0o755)
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    path = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    done = subprocess.run(
        [CONTRIB / "qemu-example.sh", image, "-snapshot"],
        env={**os.environ, "QEMU": str(qemu), "PATH": path, "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("-device vhost-user-blk-pci,chardev=disk -snapshot\n")
    assert "INFO: stopping" in done.stderr
    assert list(scratch.iterdir()) == []
