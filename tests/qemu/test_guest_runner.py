"""The guest runner itself, against QEMU's own storage daemon: is what it reports true?"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from vhostblk.testing.guest import Guest, GuestDisk, GuestRunError, run_guest
from vhostblk.testing.plugin import DaemonStarter
from vhostblk.testing.requirements import require

DISK_SIZE = 64 << 20


@pytest.fixture(autouse=True)
def _tools() -> None:
    require("qemu", "qemu-storage-daemon", "mkfs.ext4", "e2fsck")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(DISK_SIZE)
    return path


@pytest.fixture
def disk(daemon: DaemonStarter, image: Path, socket_directory: Path) -> GuestDisk:
    path = socket_directory / "disk"
    blockdev = f"driver=file,node-name=disk,filename={image}"
    export = f"type=vhost-user-blk,id=e,addr.type=unix,addr.path={path},node-name=disk,writable=on"
    daemon(
        *("--blockdev", blockdev, "--export", f"{export},num-queues=4"),
        command=["qemu-storage-daemon"],
        sockets=[path],
    )
    return GuestDisk(path)


def test_script_sees_the_disk_and_its_writes_reach_the_image(disk: GuestDisk, image: Path) -> None:
    result = run_guest(
        "set -e\n"
        "cat /sys/block/vda/size\n"
        "dd if=/dev/urandom of=/dev/vda bs=64k count=16 conv=fsync 2>/dev/null\n"
        "dd if=/dev/vda bs=64k count=16 iflag=direct 2>/dev/null | sha256sum\n",
        [disk],
    )
    size, checksum = result.output.splitlines()
    assert result.status == 0
    assert int(size) * 512 == DISK_SIZE
    with image.open("rb") as file:
        assert checksum.split()[0] == hashlib.sha256(file.read(1 << 20)).hexdigest()
    assert "Power down" in result.console


def test_guest_makes_a_file_system_with_the_hosts_program(disk: GuestDisk, image: Path) -> None:
    result = run_guest(
        "mkfs.ext4 -q /dev/vda && mount -t ext4 /dev/vda /mnt && umount /mnt", [disk]
    )
    assert (result.status, result.output) == (0, "")
    assert os.spawnvp(os.P_WAIT, "/sbin/e2fsck", ["e2fsck", "-fn", str(image)]) == 0


def test_failing_script_is_a_result_with_its_status() -> None:
    result = run_guest("echo said; echo complained >&2; exit 7")
    assert (result.status, result.output) == (7, "said\ncomplained\n")


def test_interactive_guest_answers_one_command_after_another(disk: GuestDisk) -> None:
    with Guest([GuestDisk(disk.socket, queues=2, options={"queue-size": "64"})], cpus=2) as guest:
        assert guest.check("ls /sys/block/vda/mq | wc -l").strip() == "2"
        assert guest.check("nproc").strip() == "2"
        assert guest.run("syntax ( error").status == 2
        long = guest.submit("read -t 1 nothing </dev/ttyS0; echo first")
        short = guest.submit("echo second")
        assert short.result().output == "second\n"
        assert long.result().output == "first\n"
        many = guest.check("seq 20000")
        assert many == "".join(f"{number}\n" for number in range(1, 20001))
        with pytest.raises(GuestRunError, match="ended with status 3: wrong"):
            guest.check("echo wrong; exit 3")
        guest.power_off()


def test_command_that_takes_too_long_is_an_error_and_qemu_is_gone() -> None:
    with Guest() as guest:
        pid = guest.pid
        with pytest.raises(GuestRunError, match=r"(?s)not done in 0\.5 s: 'echo begun.*'begun'"):
            guest.run("echo begun\nsleep 1000", 0.5)
        assert Path("/proc", str(pid)).exists()
    assert not Path("/proc", str(pid)).exists()


def test_panic_is_an_error_that_shows_the_console() -> None:
    with Guest() as guest, pytest.raises(GuestRunError, match="the guest ended during") as caught:
        guest.run("echo c >/proc/sysrq-trigger")
    assert "sysrq triggered crash" in caught.value.console


def test_wrong_option_is_an_error_with_qemus_words() -> None:
    began = time.monotonic()
    with pytest.raises(GuestRunError, match=r"(?s)ended before its shell.*no-such-device"):
        run_guest("true", extra_arguments=["-device", "no-such-device"])
    assert time.monotonic() - began < 30


def test_back_end_that_is_not_there_is_an_error(socket_directory: Path) -> None:
    with pytest.raises(GuestRunError, match=r"(?s)ended before its shell.*No such file"):
        run_guest("true", [GuestDisk(socket_directory / "nobody")])
