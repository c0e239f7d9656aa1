"""The daemons that are measured, their files, and fio."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from tests.bench.rows import Disk

__all__ = ["Files", "command_of", "fio_iops", "fs_type", "give_up", "serving", "warm"]

_MIB = 1 << 20
_CHUNK = 1 << 20


def give_up(why: str) -> NoReturn:
    """End the program with one line."""
    print(f"bench: {why}", file=sys.stderr)
    raise SystemExit(1)


def fs_type(path: Path) -> str:
    """Name of the file system that a path is on."""
    done = subprocess.run(
        ["stat", "-f", "-c", "%T", path], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


class Files:
    """Images, made when they are needed and removed at the end.

    Args:
        folder: for the files that shall be on a disk.
        mebibytes: of each.
    """

    def __init__(self, folder: Path, mebibytes: int) -> None:
        self.size = mebibytes * _MIB
        self._folders = {"tmpfs": Path("/dev/shm"), "cached": folder, "direct": folder}
        self._made: dict[Path, None] = {}

    def path(self, disk: Disk) -> Path:
        """The image of a kind of disk."""
        name = "tmpfs" if disk == "tmpfs" else "disk"
        path = self._folders[disk] / f"vhostblk-bench-{os.getpid()}-{name}.img"
        if path not in self._made:
            self._made[path] = None
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = os.urandom(_CHUNK)
            with path.open("wb") as file:
                for _ in range(self.size // _CHUNK):
                    file.write(noise)
                file.flush()
                os.fdatasync(file.fileno())
        return path

    def close(self) -> None:
        """Remove them."""
        for path in self._made:
            path.unlink(missing_ok=True)


def warm(path: Path) -> None:
    """Bring a file into the state that every run begins with: all of it in the page cache, and clean."""
    buffer = bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        os.fdatasync(file.fileno())
        while file.readinto(buffer):
            pass


def command_of(who: str, disk: Disk, files: Files, socket: Path, aio: str) -> list[str]:
    """The command line of a daemon: the same for both but for the program, and for what only we have."""
    if who == "ours":
        program = [sys.executable, "-m", "vhostblk", "--log-level", "warning", "storage-daemon"]
    else:
        program = [
            shutil.which("qemu-storage-daemon") or give_up("qemu-storage-daemon is not installed")
        ]
    export = f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={socket},writable=on,iothread=t"
    if disk == "null":
        blockdev = f"driver=null-co,node-name=d,size={1 << 30}"
    else:
        direct = "on" if disk == "direct" else "off"
        blockdev = (
            f"driver=file,node-name=d,filename={files.path(disk)},locking=off,cache.direct={direct}"
        )
        if who == "qemu" or aio != "io_uring":
            blockdev += f",aio={aio}"
        if who == "ours" and disk == "direct":
            export += ",pin-memory=on"
    return [
        *program,
        *("--object", "iothread,id=t,poll-max-ns=32768"),
        *("--blockdev", blockdev),
        *("--export", export),
        *("--pidfile", f"{socket}.pid"),
    ]


@contextmanager
def serving(disk: Disk, files: Files, folder: Path, aio: str) -> Iterator[dict[str, Path]]:
    """Run both daemons; gives their sockets."""
    sockets = {who: folder / f"{who}.sock" for who in ("ours", "qemu")}
    with ExitStack() as stack:
        for who, socket in sockets.items():
            stack.enter_context(_daemon(command_of(who, disk, files, socket, aio), socket))
        yield sockets


@contextmanager
def _daemon(command: list[str], socket: Path) -> Iterator[None]:
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 20
        # Written when everything else is done.
        while not Path(f"{socket}.pid").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                give_up(f"cannot start: {' '.join(command)}")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def fio_iops(path: Path, size: int, depth: int, ramp: float, duration: float) -> float:
    """Random reads of 4 KiB with O_DIRECT by fio's io_uring with registered files and fixed buffers."""
    done = subprocess.run(
        [
            *(
                "fio",
                "--name=x",
                f"--filename={path}",
                f"--size={size}",
                "--rw=randread",
                "--bs=4k",
            ),
            *("--direct=1", "--ioengine=io_uring", "--registerfiles", "--fixedbufs"),
            *(
                f"--iodepth={depth}",
                "--time_based",
                f"--runtime={duration}s",
                f"--ramp_time={ramp}s",
            ),
            *("--norandommap", "--randrepeat=0", "--output-format=json"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(json.loads(done.stdout)["jobs"][0]["read"]["iops"])
