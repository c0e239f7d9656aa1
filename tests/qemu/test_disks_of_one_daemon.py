"""One daemon, one guest, a disk for every purpose: what the guest sees of each, and what its requests do to it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.qemu.images import allocated, faults_of_ext4, fresh_image, pattern, same, write_pattern
from tests.requirements import require
from vhostblk.testing.daemon_process import VHOSTBLK, DaemonProcess
from vhostblk.testing.guest import Guest, GuestDisk

MIB = 1 << 20
SIZE = 64 * MIB
SERIAL = "serial of twenty byt"
"""As long as a serial may be."""

BLKDISCARD = "/bin/blkdiscard"
"""The real one: busybox's shell prefers its own, which does not know -z."""

# name: (options of the file, options of the export); in this order they are vda, vdb, ...
DISKS = {
    "plain": ("", f"writable=on,num-queues=4,serial={SERIAL}"),
    "read-only": (",read-only=on", "num-queues=1"),
    "big-blocks": ("", "writable=on,logical-block-size=4096"),
    "direct": (",cache.direct=on,discard=unmap", "writable=on,max-segments=16"),
    "write-through": (",discard=ignore", "writable=on,writethrough=on"),
}


@dataclass(frozen=True)
class Machine:
    """The daemon, its images and the guest that uses them."""

    folder: Path
    daemon: DaemonProcess
    guest: Guest

    def image(self, name: str) -> Path:
        return self.folder / f"{name}.img"

    def device(self, name: str) -> str:
        """Its path in the guest."""
        return f"/dev/vd{'abcde'[list(DISKS).index(name)]}"

    def sysfs(self, name: str, attribute: str) -> str:
        """What the guest's kernel says of a disk."""
        block = self.device(name).removeprefix("/dev/")
        return self.guest.check(f"cat /sys/block/{block}/{attribute}").strip()

    def number(self, name: str, attribute: str) -> int:
        return int(self.sysfs(name, attribute))


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    require("qemu", "mkfs.ext4", "blkdiscard", "qemu-img")
    folder = tmp_path_factory.mktemp("disks")
    words: list[str] = ["--object", "iothread,id=io0"]
    for name, (file, export) in DISKS.items():
        image = fresh_image(folder / f"{name}.img", SIZE)
        if name == "read-only":
            image.write_bytes(pattern(7, SIZE))
        words += ["--blockdev", f"driver=file,node-name={name},filename={image}{file}"]
        words += [
            "--export",
            f"type=vhost-user-blk,id={name},node-name={name},iothread=io0,addr.type=unix,"
            f"addr.path={folder / name},{export}",
        ]
    sockets = [folder / name for name in DISKS]
    with DaemonProcess([*VHOSTBLK, "storage-daemon", *words], sockets=sockets) as daemon:
        guest = Guest(
            [GuestDisk(path, queues=2 if path.name == "plain" else 1) for path in sockets],
            cpus=2,
            programs=("mkfs.ext4", "blkdiscard"),
        )
        with guest:
            yield Machine(folder, daemon, guest)
            guest.power_off()


def test_disk_has_the_queues_of_the_front_end(machine: Machine) -> None:
    queues = [machine.guest.check(f"ls /sys/block/{disk}/mq | wc -l") for disk in ("vda", "vdd")]
    assert [int(count) for count in queues] == [2, 1]


def test_serial_is_that_of_the_command_line(machine: Machine) -> None:
    assert machine.sysfs("plain", "serial") == SERIAL
    assert machine.sysfs("direct", "serial") == "vhostblk"


def test_block_sizes_are_those_of_the_file_or_as_told(machine: Machine) -> None:
    file_block = machine.image("plain").stat().st_blksize
    for name, logical in (("plain", 512), ("big-blocks", 4096)):
        assert machine.number(name, "queue/logical_block_size") == logical
        assert machine.number(name, "queue/physical_block_size") in (logical, file_block)
        assert machine.number(name, "queue/minimum_io_size") >= logical
        assert machine.number(name, "size") * 512 == SIZE


def test_disk_with_big_blocks_holds_what_is_written(machine: Machine) -> None:
    device, reference = machine.device("big-blocks"), machine.folder / "reference"
    machine.guest.check(write_pattern(1000, MIB, device, offset=3 * MIB, flags="oflag=direct"))
    reference.write_bytes(bytes(3 * MIB) + pattern(1000, MIB) + bytes(SIZE - 4 * MIB))
    assert same(machine.image("big-blocks"), reference)


def test_read_only_disk_is_read_and_never_written(machine: Machine) -> None:
    before, device = machine.image("read-only").stat().st_mtime_ns, machine.device("read-only")
    assert machine.sysfs("read-only", "ro") == "1"
    assert machine.sysfs("plain", "ro") == "0"
    failed = machine.guest.run(f"dd if=/dev/zero of={device} bs=4k count=1 conv=fsync")
    assert failed.status != 0
    assert "Operation not permitted" in failed.output
    machine.guest.check(f"seq 7 100000 | head -c 65536 >/tmp/ro; cmp -n 65536 {device} /tmp/ro")
    assert machine.image("read-only").stat().st_mtime_ns == before


def test_two_disks_written_at_once_keep_apart(machine: Machine) -> None:
    """One through the page cache, one around it; both images are what the guest wrote."""
    jobs = [
        write_pattern(10_000_000, 2 * MIB, machine.device("plain"), offset=MIB),
        write_pattern(20_000_000, 2 * MIB, machine.device("direct"), offset=2 * MIB),
    ]
    script = "; ".join(f"( {job}; echo $? >>/tmp/ended ) &" for job in jobs).replace("&;", "&")
    machine.guest.check(f"{script} wait; [ $(grep -c '^0$' /tmp/ended) = 2 ]")
    for name, first, offset in (("plain", 10_000_000, MIB), ("direct", 20_000_000, 2 * MIB)):
        reference = machine.folder / "reference"
        rest = SIZE - offset - 2 * MIB
        reference.write_bytes(bytes(offset) + pattern(first, 2 * MIB) + bytes(rest))
        assert same(machine.image(name), reference), name


def test_write_cache_is_as_on_the_command_line(machine: Machine) -> None:
    assert machine.sysfs("plain", "queue/write_cache") == "write back"
    assert machine.sysfs("write-through", "queue/write_cache") == "write through"


def test_blkdiscard_gives_blocks_back_to_the_host(machine: Machine) -> None:
    image, device = machine.image("direct"), machine.device("direct")
    machine.guest.check(write_pattern(1, 4 * MIB, device))
    before = allocated(image)
    assert before >= 4 * MIB
    machine.guest.check(f"{BLKDISCARD} -o {MIB} -l {2 * MIB} {device}")
    assert before - allocated(image) == 2 * MIB
    contents = image.read_bytes()[: 4 * MIB]
    written = pattern(1, 4 * MIB)
    assert contents == written[:MIB] + bytes(2 * MIB) + written[3 * MIB :]
    machine.guest.check(f"{BLKDISCARD} {device}")
    assert allocated(image) < 64 << 10


def test_blkdiscard_z_makes_zeroes_and_keeps_the_blocks(machine: Machine) -> None:
    image, device = machine.image("direct"), machine.device("direct")
    machine.guest.check(f"{BLKDISCARD} {device}")
    machine.guest.check(write_pattern(5, 3 * MIB, device))
    before = allocated(image)
    assert before >= 3 * MIB
    machine.guest.check(f"{BLKDISCARD} -z -o {MIB} -l {MIB} {device}")
    written = pattern(5, 3 * MIB)
    assert image.read_bytes()[: 3 * MIB] == written[:MIB] + bytes(MIB) + written[2 * MIB :]
    assert allocated(image) == before
    machine.guest.check(
        f"dd if={device} bs=1M skip=1 count=1 iflag=direct | cmp -n {MIB} - /dev/zero"
    )


def test_mkfs_and_fstrim_give_blocks_back_to_the_host(machine: Machine) -> None:
    require("e2fsck")
    image, device = machine.image("direct"), machine.device("direct")
    machine.guest.check(f"dd if=/dev/zero of={device} bs=1M seek=32 count=16 conv=fsync")
    assert allocated(image) >= 16 * MIB
    machine.guest.check(f"mkfs.ext4 -q -F -E discard {device} && mount -t ext4 {device} /mnt")
    made = allocated(image)
    assert made < 16 * MIB
    machine.guest.check("dd if=/dev/zero of=/mnt/file bs=1M count=12 conv=fsync 2>/dev/null")
    written = allocated(image)
    assert written >= made + 12 * MIB
    machine.guest.check("rm /mnt/file && sync && fstrim /mnt")
    assert allocated(image) <= written - 12 * MIB
    machine.guest.check("umount /mnt")
    assert faults_of_ext4(image) == ""


def test_disk_without_discard_offers_none(machine: Machine) -> None:
    assert machine.number("direct", "queue/discard_max_bytes") > 0
    assert machine.number("write-through", "queue/discard_max_bytes") == 0
    assert (
        "not supported"
        in machine.guest.run(f"{BLKDISCARD} {machine.device('write-through')}").output
    )


def test_disk_grows_under_the_guest(machine: Machine) -> None:
    image, device = machine.image("big-blocks"), machine.device("big-blocks")
    grown = SIZE + 8 * MIB
    assert machine.number("big-blocks", "size") * 512 == SIZE
    os.truncate(image, grown)
    os.kill(machine.daemon.pid, signal.SIGHUP)
    size = f"/sys/block/{device.removeprefix('/dev/')}/size"
    machine.guest.check(f"until [ $(cat {size}) = {grown // 512} ]; do usleep 1000; done", 30)
    machine.guest.check(write_pattern(77, MIB, device, offset=grown - MIB))
    with image.open("rb") as file:
        file.seek(grown - MIB)
        assert file.read() == pattern(77, MIB)
    # The other disks have the size they had.
    assert machine.number("plain", "size") * 512 == SIZE
