"""A guest makes a file system on its disk, uses it and powers off; the host finds in the image what the guest wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.qemu.images import faults_of_ext4, fresh_image, sha256_of_files
from tests.requirements import require
from vhostblk.testing.guest import GuestDisk, run_guest
from vhostblk.testing.plugin import DaemonStarter

DISK_SIZE = 128 << 20
SCRIPT = """
set -e
ls /sys/block/vda/mq | wc -l
cat /sys/block/vda/queue/write_cache
cut -c35 /sys/block/vda/device/features  # VIRTIO_F_RING_PACKED
mkfs.ext4 -q /dev/vda
mount -t ext4 /dev/vda /mnt
for number in 1 2 3 4; do
    (dd if=/dev/urandom of=/mnt/random$number bs=64k count=24 conv=fsync 2>/dev/null) &
done
wait
mkdir /mnt/small
for number in $(seq 10); do
    echo "$number" | dd of=/mnt/small/$number conv=fsync 2>/dev/null
done
rm /mnt/small/10
cd /mnt
sha256sum random* small/* >/tmp/checksums
echo 3 >/proc/sys/vm/drop_caches
sha256sum -c -s /tmp/checksums
cat /tmp/checksums
cd /
umount /mnt
"""


@pytest.mark.parametrize(
    ("queues", "data_path", "packed"),
    [
        (1, "native", "off"),
        (4, "native", "off"),
        (4, "python", "off"),
        (1, "native", "on"),
        (4, "native", "on"),
    ],
    ids=lambda value: str(value),
)
def test_file_system_in_the_image_is_what_the_guest_made(
    queues: int,
    data_path: str,
    packed: str,
    daemon: DaemonStarter,
    socket_directory: Path,
    tmp_path: Path,
) -> None:
    require("qemu", "mkfs.ext4", "e2fsck", "debugfs")
    if data_path == "native":
        require("engine")
    image, socket = fresh_image(tmp_path / "disk.img", DISK_SIZE), socket_directory / "disk"
    served = daemon(
        *("serve", image, "--socket", socket, "--data-path", data_path, "--iothreads", "2"),
        sockets=[socket],
    )
    result = run_guest(SCRIPT, [GuestDisk(socket, options={"packed": packed})], cpus=queues)
    assert result.status == 0, result.output
    assert served.stop() == 0, served.output
    assert ("served by the engine alone 0," in served.output) == (data_path == "python")
    seen_queues, write_cache, ring, *lines = result.output.splitlines()
    assert (seen_queues, write_cache) == (str(queues), "write back")
    assert ring == str(int(packed == "on"))
    checksums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert len(checksums) == 4 + 9
    assert faults_of_ext4(image) == ""
    assert sha256_of_files(image, tmp_path / "files") == checksums
