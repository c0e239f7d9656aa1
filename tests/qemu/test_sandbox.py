"""A guest whose daemon is in a sandbox notices nothing of that."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.qcow2_images import check, contents, create
from vhostblk.testing.guest import GuestDisk, run_guest
from vhostblk.testing.plugin import DaemonStarter
from vhostblk.testing.requirements import require

SIZE = 64 << 20
SCRIPT = """set -e
mkfs.ext4 -q /dev/vda && mount -t ext4 -o discard /dev/vda /mnt
dd if=/dev/urandom of=/mnt/file bs=64k count=64 conv=fsync 2>/dev/null
dd if=/dev/urandom of=/mnt/other bs=64k count=64 conv=fsync 2>/dev/null
rm /mnt/other && fstrim /mnt && umount /mnt
dd if=/dev/vda bs=1M iflag=direct 2>/dev/null | sha256sum
"""


def test_guest_uses_a_qcow2_image_of_a_daemon_in_a_sandbox(
    daemon: DaemonStarter, socket_directory: Path, tmp_path: Path
) -> None:
    require("qemu", "qemu-img", "mkfs.ext4", "sandbox")
    image, sock = create(tmp_path / "disk.qcow2", SIZE), socket_directory / "s"
    process = daemon(
        *("serve", image, "--format", "qcow2", "--socket", sock, "--sandbox", "kill"),
        *("--iothreads", "2"),
        sockets=[sock],
    )
    result = run_guest(SCRIPT, [GuestDisk(sock, queues=2)])
    assert result.status == 0, result.output
    assert process.stop() == 0
    assert check(image) == ""
    seen = hashlib.sha256(contents(image, tmp_path)).hexdigest()
    assert result.output.split()[0] == seen
