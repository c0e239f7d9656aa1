"""Guests' file systems on qcow2 overlays of one base; QEMU and daemons are killed while they sync."""

from __future__ import annotations

import hashlib
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.qcow2_images import MIB, check, create, export, no_worse_than_leaks, qemu_img
from tests.qemu.images import allocated, faults_of_ext4, fresh_image, pattern
from tests.requirements import require
from vhostblk.testing.guest import Guest, GuestDisk
from vhostblk.testing.plugin import DaemonStarter

SIZE = 128 * MIB
INSTALLED = MIB  # of the file that the base has
LARGE = 16 * MIB  # of a file that is trimmed
STORM = """
mount -t ext4 -o discard /dev/vda /mnt
number=$(ls /mnt | wc -l)
while true; do
    number=$((number + 1))
    seq $number $((number + {first})) | dd of=/mnt/$number conv=fsync bs=64k 2>/dev/null || break
    echo "safe $number" >/dev/console
    [ $((number % 4)) = 0 ] && rm /mnt/$((number - 2))
done
"""
ENOUGH = 8  # files that are safe


@dataclass
class Machine:
    """A guest's disk, and what it was told is on it.

    Attributes: first: files end with this number behind their own, so guests have different ones.
    """

    image: Path
    socket: Path
    first: int
    safe: set[int] = field(default_factory=set)

    def storm(self, guest: Guest) -> None:
        """Let it write and sync without end, until enough is safe."""
        guest.submit(STORM.format(first=self.first))

    def kept(self) -> list[int]:
        """Files that must be there: synced, and not removed since."""
        last = max(self.safe)
        return [number for number in self.safe if number % 4 != 2 or number > last - 2]


def installed_base(folder: Path) -> Path:
    """An image with an ext4 that has a file."""
    content = folder / "content"
    content.mkdir()
    (content / "installed").write_bytes(pattern(7, INSTALLED))
    plain, base = fresh_image(folder / "plain", SIZE), folder / "base.qcow2"
    subprocess.run(["mkfs.ext4", "-q", "-d", content, plain], check=True, timeout=60)
    qemu_img("convert", "-O", "qcow2", plain, base)
    base.chmod(0o444)
    return base


@pytest.mark.timeout(300)
def test_two_guests_on_overlays_of_one_base_keep_what_they_synced_when_qemu_and_a_daemon_are_killed(
    daemon: DaemonStarter, socket_directory: Path, tmp_path: Path
) -> None:
    require("qemu", "mkfs.ext4", "e2fsck", "qemu-img")
    base = installed_base(tmp_path)
    before = base.read_bytes()
    machines = []
    for name, first in (("one", 5000), ("two", 6000)):
        image = create(tmp_path / f"{name}.qcow2", SIZE, "-b", base, "-F", "qcow2")
        machines.append(Machine(image, socket_directory / name, first))
    one, two = machines

    processes = [export(daemon, machine.image, machine.socket) for machine in machines]
    with Guest([GuestDisk(one.socket)]) as guest, Guest([GuestDisk(two.socket)]) as other:
        for machine, running in ((one, guest), (two, other)):
            machine.storm(running)
        for running in (guest, other):
            running.wait_for_console(f"safe {ENOUGH}")
        guest.kill()
        processes[1].kill()
        for machine, running in ((one, guest), (two, other)):
            machine.safe = {int(number) for number in re.findall(r"safe (\d+)", running.console)}
    assert processes[0].stop() == 0
    for machine in machines:
        no_worse_than_leaks(machine.image)
        qemu_img("check", "-q", "-r", "leaks", machine.image)

    processes = [export(daemon, machine.image, machine.socket) for machine in machines]
    with Guest([GuestDisk(one.socket)]) as guest, Guest([GuestDisk(two.socket)]) as other:
        for machine, running in ((one, guest), (two, other)):
            running.check("mount -t ext4 /dev/vda /mnt")
            for number in machine.kept():
                running.check(f"seq {number} {number + machine.first} | cmp - /mnt/{number}")
        trimmed_room_goes_back_to_the_host(guest, one.image)
        # Whatever the first one did:
        assert hashlib.sha256(pattern(7, INSTALLED)).hexdigest() in other.check(
            "sha256sum /mnt/installed"
        )
        for running in (guest, other):
            running.check("umount /mnt")
            running.power_off()
    for machine, process in zip(machines, processes, strict=True):
        assert process.stop() == 0
        assert_sound(machine.image, tmp_path / "plain")
    assert base.read_bytes() == before


def trimmed_room_goes_back_to_the_host(guest: Guest, image: Path) -> None:
    """What the overlay has is freed; what the base has is hidden without taking room."""
    # Zeroes are data like any other.
    guest.check(f"dd if=/dev/zero of=/mnt/large bs=1M count={LARGE // MIB} conv=fsync 2>/dev/null")
    full = allocated(image)
    guest.check("rm /mnt/large /mnt/installed && sync && fstrim /mnt && sync")
    assert allocated(image) < full - LARGE * 3 // 4


def assert_sound(image: Path, plain: Path) -> None:
    """Nothing is wrong with the image, nor with the file system in it."""
    assert check(image) == ""
    qemu_img("convert", "-O", "raw", image, plain)
    assert faults_of_ext4(plain) == ""
