"""A guest's file system on a qcow2 overlay of a shared base; QEMU and the daemon are killed while it syncs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.qcow2_images import MIB, create, qemu_img
from tests.qemu.images import faults_of_ext4
from tests.requirements import require
from vhostblk.testing.daemon_process import DaemonProcess
from vhostblk.testing.guest import Guest, GuestDisk
from vhostblk.testing.plugin import DaemonStarter

STORM = """
mount -t ext4 -o discard /dev/vda /mnt
number=$(ls /mnt | wc -l)
while true; do
    number=$((number + 1))
    seq $number $((number + 5000)) | dd of=/mnt/$number conv=fsync bs=64k 2>/dev/null || break
    echo "safe $number" >/dev/console
    [ $((number % 4)) = 0 ] && rm /mnt/$((number - 2))
done
"""
ENOUGH = 12  # files that are safe


@pytest.mark.parametrize("killed", ["guest", "daemon"])
def test_file_system_on_an_overlay_survives_a_kill_during_an_fsync_storm(
    killed: str, daemon: DaemonStarter, socket_directory: Path, tmp_path: Path
) -> None:
    require("qemu", "mkfs.ext4", "e2fsck", "qemu-img")
    plain = tmp_path / "plain"
    with plain.open("wb") as file:
        file.truncate(128 * MIB)
    base = tmp_path / "base.qcow2"
    subprocess.run(["mkfs.ext4", "-q", plain], check=True, timeout=60)
    qemu_img("convert", "-O", "qcow2", plain, base)
    before = base.read_bytes()
    image = create(tmp_path / "i.qcow2", 128 * MIB, "-b", base, "-F", "qcow2")

    def serve(turn: int) -> tuple[Path, DaemonProcess]:
        socket = socket_directory / f"s{turn}"
        process = daemon(
            *("storage-daemon", "--blockdev"),
            f"qcow2,node-name=d,discard=unmap,file.driver=file,file.filename={image}",
            "--export",
            f"vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={socket}",
            sockets=[socket],
        )
        return socket, process

    socket, process = serve(0)
    with Guest([GuestDisk(socket)]) as guest:
        guest.submit(STORM)
        guest.wait_for_console(f"safe {ENOUGH}\n".strip())
        if killed == "guest":
            guest.kill()
        else:
            process.kill()
        safe = {int(number) for number in re.findall(r"safe (\d+)", guest.console)}
    if killed == "guest":
        assert process.stop() == 0
    done = subprocess.run(
        ["qemu-img", "check", image], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode in (0, 3), done.stdout + done.stderr  # 3: leaks
    last = max(safe)
    kept = [number for number in safe if number % 4 != 2 or number > last - 2]
    socket, process = serve(1)
    with Guest([GuestDisk(socket)]) as guest:
        guest.check("mount -t ext4 /dev/vda /mnt")
        for number in kept:
            guest.check(f"seq {number} {number + 5000} | cmp - /mnt/{number}")
        guest.check("fstrim /mnt || true; umount /mnt")
        guest.power_off()
    assert process.stop() == 0
    qemu_img("check", "-q", "-r", "leaks", image)
    qemu_img("convert", "-O", "raw", image, plain)
    assert faults_of_ext4(plain) == ""
    assert base.read_bytes() == before
