"""A Linux guest sees by itself that a block device of the host has grown or shrunk below its disk, also while it works.

Nobody tells the daemon but the kernel. One disk is served by the engine, the other by Python; both tests are of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.probes import LoopDevice, loop_device
from tests.qemu.images import fresh_image, pattern, write_pattern
from tests.requirements import require
from vhostblk.testing.daemon_process import VHOSTBLK, DaemonProcess
from vhostblk.testing.guest import Guest, GuestDisk

MIB = 1 << 20
SIZE = 16 * MIB
# name in the guest: data path
DISKS = {"vda": "native", "vdb": "python"}


@dataclass(frozen=True)
class Machine:
    guest: Guest
    devices: dict[str, LoopDevice]

    def wait_for_size(self, disk: str, size: int) -> None:
        path = f"/sys/block/{disk}/size"
        self.guest.check(f"until [ $(cat {path}) = {size // 512} ]; do usleep 1000; done", 60)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    require("qemu", "engine")
    pytest.importorskip("pyroute2")
    folder = tmp_path_factory.mktemp("resize")
    devices: dict[str, LoopDevice] = {}
    with ExitStack() as stack:
        sockets = []
        for name, path in DISKS.items():
            image = fresh_image(folder / f"{name}.img", SIZE)
            devices[name] = stack.enter_context(loop_device(image))
            socket = folder / name
            words = ["serve", devices[name].path, "--socket", str(socket), "--data-path", path]
            stack.enter_context(DaemonProcess([*VHOSTBLK, *words], sockets=[socket]))
            sockets.append(socket)
        with Guest([GuestDisk(socket) for socket in sockets], cpus=2, programs=()) as guest:
            yield Machine(guest, devices)
            guest.power_off()


@pytest.mark.parametrize("disk", DISKS)
def test_guest_sees_the_new_capacity_and_uses_it(machine: Machine, disk: str) -> None:
    guest, device = machine.guest, machine.devices[disk]
    machine.wait_for_size(disk, SIZE)
    device.resize(2 * SIZE)
    machine.wait_for_size(disk, 2 * SIZE)
    said = guest.check("dmesg | grep 'new size' | tail -n 1")
    assert f"[{disk}] new size: {2 * SIZE // 512} 512-byte" in said
    guest.check(
        write_pattern(5, 65536, f"/dev/{disk}", offset=2 * SIZE - 65536, flags="oflag=direct")
    )
    guest.check("sync")
    with open(device.path, "rb") as host:
        host.seek(2 * SIZE - 65536)
        assert host.read(65536) == pattern(5, 65536)
    device.resize(SIZE)
    machine.wait_for_size(disk, SIZE)
    behind = guest.check(f"dd if=/dev/{disk} bs=4k skip={SIZE // 4096} count=1 2>/dev/null | wc -c")
    assert behind.strip() == "0"
    guest.check(
        f"dd if=/dev/{disk} of=/dev/null bs=4k skip={SIZE // 4096 - 1} count=1 iflag=direct"
    )


@pytest.mark.parametrize("disk", DISKS)
def test_guest_that_works_goes_on_whatever_size_its_disk_has(machine: Machine, disk: str) -> None:
    """What it writes inside of all sizes is there; nothing hangs."""
    guest, device = machine.guest, machine.devices[disk]
    guest.check(
        f"( n=0; while [ ! -e /tmp/over{disk} ]; do"
        f" dd if=/dev/urandom of=/tmp/data{disk} bs=64k count=8 2>/dev/null;"
        f" dd if=/tmp/data{disk} of=/dev/{disk} bs=64k conv=notrunc oflag=direct 2>/dev/null"
        f" && dd if=/dev/{disk} bs=64k count=8 iflag=direct 2>/dev/null | cmp - /tmp/data{disk}"
        f" || touch /tmp/bad{disk};"
        f" dd if=/dev/zero of=/dev/{disk} bs=1M seek=6 count=30 oflag=direct conv=notrunc 2>/dev/null;"
        f" n=$((n + 1)); echo $n >/tmp/rounds{disk}; done; touch /tmp/end{disk} ) >/dev/null 2>&1 &"
    )
    for size in (2 * SIZE, SIZE // 2, SIZE, 3 * SIZE, SIZE):
        device.resize(size)
        machine.wait_for_size(disk, size)
        guest.check(
            f"n=$(cat /tmp/rounds{disk} 2>/dev/null || echo 0);"
            f" until [ $(cat /tmp/rounds{disk} 2>/dev/null || echo 0) -gt $n ]; do usleep 1000; done",
            60,
        )
    guest.check(f"touch /tmp/over{disk}; until [ -e /tmp/end{disk} ]; do usleep 1000; done", 60)
    guest.check(f"[ ! -e /tmp/bad{disk} ]")
