"""The daemons that are measured, their files, and fio."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from tests.bench.rows import Disk, Fio

__all__ = [
    "BOTH",
    "OURS",
    "QEMU",
    "Daemon",
    "Files",
    "Server",
    "command_of",
    "fio",
    "fio_command",
    "fs_type",
    "give_up",
    "qcow2_command",
    "qemu_version",
    "run_daemon",
    "serving",
    "warm",
]

_MIB = 1 << 20
_PAGE = 4096
_CHUNK = 1 << 20
_FILE_OF: Mapping[Disk, tuple[str, int]] = {
    "tmpfs": ("tmpfs", _CHUNK),
    "folios": ("folios", _CHUNK),
}
"""Which file a disk has, if it has one of its own, and how many bytes at a time it is written. That decides how the
page cache holds it: page by page as a guest's own writes of 4 KiB leave it, or in large folios."""


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
        self.folder = folder
        self._made: dict[Path, None] = {}

    def path(self, disk: Disk) -> Path:
        """The image of a kind of disk."""
        name, piece = _FILE_OF.get(disk, ("disk", _PAGE))
        folder = Path("/dev/shm") if disk == "tmpfs" else self.folder
        path = folder / f"vhostblk-bench-{os.getpid()}-{name}.img"
        if path not in self._made:
            self._made[path] = None
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = os.urandom(_CHUNK)
            with path.open("wb", buffering=0) as file:
                for at in range(0, self.size, piece):
                    file.write(noise[at % _CHUNK :][:piece])
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


@dataclass(frozen=True)
class Server:
    """A daemon that is measured."""

    program: Literal["ours", "qemu"]
    iothreads: int = 1
    """Only ours can have several for one disk."""
    queues: int = 0
    """That are offered; 0: the program's default."""


@dataclass(frozen=True)
class Daemon:
    """A daemon that runs."""

    socket: Path
    pid: int


OURS, QEMU = Server("ours"), Server("qemu")
BOTH = {"ours": OURS, "qemu": QEMU}


def command_of(server: Server, disk: Disk, files: Files, socket: Path, *, aio: str) -> list[str]:
    """The command line of a daemon: the same for both but for the program, and for what only we have."""
    direct = disk == "direct"
    if disk == "null":
        blockdevs = [f"driver=null-co,node-name=d,size={1 << 30}"]
    else:
        blockdevs = [_file_node(server, "d", files.path(disk), direct=direct, aio=aio)]
    return _command(server, blockdevs, socket, pins=direct)


def qcow2_command(
    server: Server, image: Path, socket: Path, *, direct: bool, aio: str
) -> list[str]:
    """The same for a qcow2 image."""
    file = _file_node(server, "f", image, direct=direct, aio=aio)
    direct_or_not = f"cache.direct={'on' if direct else 'off'}"
    blockdevs = [file, f"driver=qcow2,node-name=d,file=f,{direct_or_not}"]
    return _command(server, blockdevs, socket, pins=direct)


def _file_node(server: Server, name: str, path: Path, *, direct: bool, aio: str) -> str:
    node = f"driver=file,node-name={name},filename={path},locking=off"
    node += f",cache.direct={'on' if direct else 'off'}"
    return f"{node},aio={aio}" if server.program == "qemu" or aio != "io_uring" else node


def _command(server: Server, blockdevs: list[str], socket: Path, *, pins: bool) -> list[str]:
    """A daemon's command line.

    Args:
        blockdevs: the last one is node `d`.
        pins: ours may pin guest memory.
    """
    if server.program == "ours":
        program = [sys.executable, "-m", "vhostblk", "--log-level", "warning", "storage-daemon"]
    else:
        program = [
            shutil.which("qemu-storage-daemon") or give_up("qemu-storage-daemon is not installed")
        ]
    export = f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={socket},writable=on"
    names = ["t"] if server.iothreads == 1 else [f"t{n}" for n in range(server.iothreads)]
    if server.iothreads == 1:
        export += ",iothread=t"
    else:
        for number, name in enumerate(names):
            export += f",iothread-vq-mapping.{number}.iothread={name}"
    if server.queues:
        export += f",num-queues={server.queues}"
    if server.program == "ours" and pins:
        export += ",pin-memory=on"
    return [
        *program,
        *(word for name in names for word in ("--object", f"iothread,id={name},poll-max-ns=32768")),
        *(word for node in blockdevs for word in ("--blockdev", node)),
        *("--export", export),
        *("--pidfile", f"{socket}.pid"),
    ]


@contextmanager
def serving(
    disk: Disk,
    files: Files,
    folder: Path,
    servers: Mapping[str, Server],
    *,
    aio: str,
) -> Iterator[dict[str, Daemon]]:
    """Run daemons that serve the same disk; their names are those of `servers`."""
    with ExitStack() as stack, tempfile.TemporaryDirectory(dir=folder) as place:
        daemons = {}
        for who, server in servers.items():
            socket = Path(place) / f"{who}.sock"
            command = command_of(server, disk, files, socket, aio=aio)
            daemons[who] = Daemon(socket, stack.enter_context(run_daemon(command, socket)))
        yield daemons


@contextmanager
def run_daemon(command: list[str], socket: Path) -> Iterator[int]:
    """Run a program that writes SOCKET.pid when it is ready; gives its process."""
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 20
        # Written when everything else is done.
        while not Path(f"{socket}.pid").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                give_up(f"cannot start: {' '.join(command)}")
            time.sleep(0.02)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def qemu_version() -> str:
    """Its name and version."""
    done = subprocess.run(
        ["qemu-storage-daemon", "--version"], capture_output=True, text=True, check=True
    )
    return "qemu-storage-daemon " + done.stdout.split("version ")[-1].split()[0]


def fio_command(job: Fio, path: Path, size: int, ramp: float, duration: float) -> list[str]:
    """The command line of fio."""
    if job.engine == "io_uring":
        engine = ["--direct=1", "--registerfiles", "--fixedbufs", f"--iodepth={job.depth}"]
    else:
        # What is in the page cache stays there. Into what malloc() gives for 1 MiB, not aligned to pages, some
        # processors copy at a third of their speed.
        engine = ["--direct=0", "--invalidate=0", "--fallocate=none", "--iomem=mmap"]
    return [
        *("fio", "--name=x", f"--filename={path}", f"--size={size}", f"--rw={job.pattern}"),
        *(f"--bs={job.block}", f"--ioengine={job.engine}", *engine),
        *("--time_based", f"--runtime={duration}s", f"--ramp_time={ramp}s"),
        *("--norandommap", "--randrepeat=0", "--output-format=json"),
    ]


def fio(job: Fio, path: Path, size: int, ramp: float, duration: float) -> dict[str, float | None]:
    """Run fio; gives `iops` and `bytes_per_second`."""
    command = fio_command(job, path, size, ramp, duration)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)["jobs"][0]["write" if job.pattern == "write" else "read"]
    return {"iops": float(found["iops"]), "bytes_per_second": float(found["bw_bytes"])}
