"""`make demo`: serves a fresh disk, lets a Linux guest use it, and checks what is left on it.

The guest makes a file system, writes files with fsync, forgets its page cache, reads everything
back, gives freed blocks back and unmounts. Then the host checks the file system in the image and
compares each file with the checksum the guest printed. Where there is no QEMU, the built-in client
works on the same disk with random requests instead.

Exit status: 0 if everything was as it should be, 1 otherwise, with one line that says what.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vhostblk.client.client import Client
from vhostblk.client.workload import Workload
from vhostblk.errors import VhostBlkError
from vhostblk.testing.accelerator import choose_accelerator
from vhostblk.testing.daemon_process import VHOSTBLK, DaemonProcess
from vhostblk.testing.guest import GuestDisk, GuestRunError, missing_guest, run_guest

__all__ = ["main"]

FILES = 12

GUEST_SCRIPT = f"""
set -e
echo "Linux $(uname -r): /dev/vda has $(cat /sys/block/vda/size) sectors," \\
    "$(ls /sys/block/vda/mq | wc -l) queues, cache: $(cat /sys/block/vda/queue/write_cache)"
mkfs.ext4 -q /dev/vda
mount -t ext4 /dev/vda /mnt
for number in $(seq {FILES}); do
    dd if=/dev/urandom of=/mnt/file$number bs=64k count=$number conv=fsync 2>/dev/null
done
mkdir /mnt/small
for number in $(seq 20); do
    echo "$number" | dd of=/mnt/small/$number conv=fsync 2>/dev/null
done
cd /mnt
sha256sum file* small/* >/tmp/checksums
cat /tmp/checksums
echo 3 >/proc/sys/vm/drop_caches
sha256sum -c -s /tmp/checksums
cd /
rm /mnt/small/20
sync
fstrim /mnt
umount /mnt
"""
REMOVED = "small/20"


class _FailedError(VhostBlkError):
    """Something is not as it should be; the message is for people."""


def main(argv: list[str] | None = None) -> int:
    """Runs the demonstration.

    Args:
        argv: command line without the program's name.

    Returns:
        the exit status.
    """
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, metavar="MIB", help="default: 256")
    parser.add_argument("--cpus", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--client", action="store_true", help="use the client even if QEMU is here")
    args = parser.parse_args(argv)
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="vhostblk-demo-") as folder:
            _demonstrate(Path(folder), args.size << 20, args.cpus, args.client)
    except (VhostBlkError, OSError) as error:
        print(f"make demo: {error}", file=sys.stderr)
        return 1
    print(f"All good, in {time.monotonic() - began:.0f} s.")
    return 0


def serve(image: Path, socket: Path) -> DaemonProcess:
    """The daemon that serves `image` on `socket`, not yet started."""
    return DaemonProcess([*VHOSTBLK, "serve", image, "--socket", socket], sockets=[socket])


def _demonstrate(folder: Path, size: int, cpus: int, client_only: bool) -> None:
    image, socket = folder / "disk.img", folder / "disk.sock"
    with image.open("wb") as file:
        file.truncate(size)
    why = "as asked" if client_only else missing_guest()
    print(f"Serving a fresh disk of {size >> 20} MiB on {socket}")
    with serve(image, socket) as daemon:
        if why is None:
            checksums = _use_with_guest(socket, cpus)
        else:
            print(f"No guest ({why}): the built-in client takes its place.")
            _use_with_client(socket)
        status = daemon.stop()
        said = daemon.output
    if status != 0:
        raise _FailedError(f"the daemon ended with status {status}:\n{said}")
    if why is None:
        _check_file_system(image, checksums, folder / "files")
    print("What the daemon says:")
    for line in said.splitlines():
        print("  " + line)


def _use_with_guest(socket: Path, cpus: int) -> dict[str, str]:
    print(f"Booting Linux in QEMU ({choose_accelerator().name}) ...", flush=True)
    result = run_guest(GUEST_SCRIPT, [GuestDisk(socket)], cpus=cpus, timeout=240)
    lines = result.output.strip().splitlines()
    if result.status != 0:
        what = f"the guest's script ended with status {result.status}: {result.output}"
        raise GuestRunError(what, result.console)
    checksums = {}
    for line in lines:
        digest, _, name = line.partition("  ")
        if len(digest) == 64:
            checksums[name] = digest
        else:
            print("  guest: " + line)
    print(
        f"  guest: mkfs.ext4, mount, {len(checksums)} files written with fsync, page cache dropped, "
        f"checksums verified, fstrim, umount, power off: {result.seconds:.0f} s"
    )
    return checksums


def _use_with_client(socket: Path) -> None:
    with Client.connect(socket, queues=4) as client:
        workload = Workload(client, seed=int.from_bytes(os.urandom(4), "little"), depth=32)
        counts = workload.run(5000)
        workload.verify()
        client.flush()
    print(f"  client: {sum(counts.requests.values())} requests, ", end="")
    print(f"{counts.written} bytes written, {counts.compared} bytes compared, seed {workload.seed}")


def _check_file_system(image: Path, checksums: dict[str, str], folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}

    def run(*command: str | Path) -> None:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode != 0:
            raise _FailedError(
                f"{command[0]}: status {done.returncode}\n{done.stdout}{done.stderr}"
            )

    run("e2fsck", "-fn", image)
    folder.mkdir()
    run("debugfs", "-R", f"rdump / {folder}", image)
    if (folder / REMOVED).exists():
        raise _FailedError(f"{REMOVED} is in the image although the guest removed it")
    wanted = {name: digest for name, digest in checksums.items() if name != REMOVED}
    for name, digest in wanted.items():
        if not (folder / name).is_file():
            raise _FailedError(f"{name} is not in the image")
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise _FailedError(f"{name} in the image is not what the guest wrote")
    allocated = image.stat().st_blocks * 512
    print(
        f"  host:  e2fsck finds no fault; {len(wanted)} files have the guest's checksums; "
        f"the image takes {allocated >> 10} KiB of {image.stat().st_size >> 10}"
    )


if __name__ == "__main__":
    sys.exit(main())
