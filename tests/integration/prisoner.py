"""A daemon that tries what its sandbox forbids, from several threads: `prisoner.py MODE IMAGE SOCKET`.

Prints, in JSON, for each thread what came of each attempt: an errno's name, or `done`; then waits for a line.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from vhostblk.daemon import Daemon, DaemonConfig
from vhostblk.export.options import ExportConfig
from vhostblk.sandbox.mode import SandboxMode
from vhostblk.sandbox.sandbox import Sandbox

# Numbers of x86-64; those that are newer than the first architectures are the same everywhere.
IO_URING_SETUP, IO_URING_REGISTER, CLONE3, BPF = 425, 427, 435, 321
IORING_REGISTER_EVENTFD = 4
_LIBC = ctypes.CDLL(None, use_errno=True)


def call(function: Callable[..., int], *arguments: object) -> None:
    if function(*arguments) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def read(path: Path) -> None:
    path.read_bytes()


def write(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"x")


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def instruct_rings() -> None:
    """Have the engine's rings do what the engine does not ask of them."""
    for fd in range(100):
        try:
            is_ring = os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[io_uring]"
        except FileNotFoundError:
            continue
        if is_ring:
            call(_LIBC.syscall, IO_URING_REGISTER, fd, IORING_REGISTER_EVENTFD, bytes(4), 1)


def attempts(image: Path, elsewhere: Path) -> dict[str, Callable[[], object]]:
    """What is tried. `elsewhere` is a folder with a file `secret`."""
    secret = elsewhere / "secret"
    return {
        "read the image": lambda: read(image),
        "write the image": lambda: write(image),
        "read another file": lambda: read(secret),
        "write another file": lambda: write(secret),
        "list a folder": lambda: os.listdir(elsewhere),
        "read /etc/passwd": lambda: read(Path("/etc/passwd")),
        "read somebody's memory": lambda: read(Path(f"/proc/{os.getppid()}/environ")),
        "make a file": lambda: (elsewhere / "new").touch(),
        "make a file where sockets are": lambda: (image.parent / "sockets" / "new").touch(),
        "remove a file": secret.unlink,
        "rename the image": lambda: image.rename(image.parent / "renamed"),
        "change permissions": lambda: image.chmod(0o777),
        "give the image away": lambda: os.chown(image, 1, 1),
        "make a folder": lambda: (elsewhere / "folder").mkdir(),
        "make a link": lambda: (elsewhere / "link").symlink_to("x"),
        "execute": lambda: os.execv("/bin/true", ["true"]),
        "start a program": lambda: subprocess.run(["/bin/true"], check=True),
        "fork": fork,
        "a thread": lambda: threading.Thread(target=str).start(),
        "an internet socket": lambda: socket.socket().close(),
        "a unix socket": lambda: socket.socket(socket.AF_UNIX).close(),
        "ptrace": lambda: call(_LIBC.ptrace, 0, 0, None, None),
        "mount": lambda: call(_LIBC.mount, b"none", b"/mnt", b"tmpfs", 0, None),
        "a namespace": lambda: call(_LIBC.unshare, 0x10000000),
        "become root": lambda: os.setuid(0),
        "kill": lambda: os.kill(os.getppid(), 0),
        "a limit": lambda: call(_LIBC.setrlimit, 7, struct.pack("QQ", 64, 64)),
        "a ring": lambda: call(_LIBC.syscall, IO_URING_SETUP, 1, bytes(120)),
        "the engine's rings": instruct_rings,
        "bpf": lambda: call(_LIBC.syscall, BPF, 0, None, 0),
        "new privileges": lambda: call(_LIBC.prctl, 38, 0, 0, 0, 0),
        "clone3": lambda: call(_LIBC.syscall, CLONE3, bytes(64), 64),
    }


def try_all(image: Path, elsewhere: Path) -> dict[str, str]:
    found = {}
    for name, attempt in attempts(image, elsewhere).items():
        try:
            attempt()
            found[name] = "done"
        except OSError as error:
            found[name] = errno.errorcode[error.errno or 0]
    return found


async def main(mode: SandboxMode, image: Path, sock: Path) -> None:
    ready = asyncio.Event()
    daemon = Daemon(
        DaemonConfig(
            blockdevs=[{"driver": "file", "node-name": "d", "filename": str(image)}],
            exports=[ExportConfig("e", "d", str(sock), writable=True)],
        ),
        on_ready=ready.set,
        sandbox=Sandbox(mode),
    )
    running = asyncio.create_task(daemon.run())
    await ready.wait()
    where = image, image.parent / "elsewhere"
    if mode is SandboxMode.KILL:
        os.execv("/bin/true", ["true"])
    found = {
        "loop": try_all(*where),
        "aside": await asyncio.to_thread(try_all, *where),
        "file I/O": await daemon.graph.host_io(None).call(try_all, *where),
    }
    print(json.dumps(found), flush=True)
    await asyncio.to_thread(sys.stdin.readline)  # until somebody has looked at us from outside
    daemon.stop()
    await running


if __name__ == "__main__":
    asyncio.run(main(SandboxMode(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])))
