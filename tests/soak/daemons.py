"""The daemons of a soak: two that live as long as it does, and one that ends again and again.

What a daemon holds is looked at while it has no front-end; pools of threads grow with the load and are bounded by
themselves, so that they are counted, but not compared.

Knows nothing of guests.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.restarts import ForkServer
from vhostblk.testing.daemon_process import TRACEBACK, VHOSTBLK, DaemonProcess, is_listening
from vhostblk.testing.resources import Resources

__all__ = ["BAD_SECTORS", "Daemon", "Disk", "Held", "LongLived", "ShortLived", "at_rest", "settled"]

QUEUES = 4
SIZE = 32 << 20
BAD_SECTORS = (1000, 7001)
"""Of the disk `faulty`: the first can neither be read nor written, the second not written."""

_CLUSTER = "4096"  # there are always new ones
_POOLS = ("vhostblk-io", "python", "python3")
_LOCK_SECONDS = 60
# Longer than a daemon may wait for what a killed one has left.
_GONE_SECONDS = _LOCK_SECONDS + 30.0
_REST_SECONDS = 0.5
_END_SECONDS = 60.0


@dataclass(frozen=True)
class Disk:
    """An export and its image."""

    name: str
    kind: str
    """raw, direct, qcow2, faulty or memory."""
    folder: Path

    @property
    def image(self) -> Path:
        return self.folder / f"{self.name}.img"

    @property
    def socket(self) -> Path:
        return self.folder / f"{self.name}.s"

    def create(self) -> None:
        """Make the image."""
        if self.kind == "qcow2":
            words = ["img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={_CLUSTER}"]
            subprocess.run([*VHOSTBLK, *words, self.image, str(SIZE)], check=True)
        elif self.kind != "memory":
            with self.image.open("wb") as file:
                file.truncate(SIZE)

    def words(self, thread: str) -> list[str]:
        """The storage daemon's options."""
        file = f"driver=file,filename={self.image},discard=unmap"
        below = file.replace("driver=file", "file.driver=file").replace("filename", "file.filename")
        below = below.replace("discard", "file.discard")
        node = {
            "raw": file,
            "direct": f"{file},cache.direct=on",
            "qcow2": f"driver=qcow2,discard=unmap,{below}",
            "memory": f"driver=memory,size={SIZE},discard=unmap",
            "faulty": f"driver=blkdebug,discard=unmap,{_FAULTS},"
            + file.replace("driver", "image.driver")
            .replace("filename", "image.filename")
            .replace("discard", "image.discard"),
        }[self.kind]
        # A full disk would be waited for, which nobody makes larger.
        export = (
            f"type=vhost-user-blk,id={self.name},node-name={self.name},writable=on,werror=report"
        )
        export += f",addr.type=unix,addr.path={self.socket},num-queues={QUEUES},max-segments=8"
        return [
            *("--blockdev", f"node-name={self.name},{node}"),
            *("--export", f"{export},iothread={thread}"),
        ]

    def check(self, *, may_leak: bool) -> str:
        """What the image checker makes of it, once nobody has it any more; empty: it is no qcow2 image.

        Args:
            may_leak: whoever was killed leaves clusters that nobody uses.
        """
        if self.kind != "qcow2":
            return ""
        words = [*VHOSTBLK, "img", "check", "-f", "qcow2", os.fspath(self.image)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        allowed = (0, 3) if may_leak else (0,)
        assert done.returncode in allowed, f"{self.image}: {done.stdout[-2000:]}{done.stderr}"
        leaked = sum(line.startswith("Leaked cluster") for line in done.stdout.splitlines())
        return f"{leaked} leaked clusters" if leaked else "clean"


_FAULTS = ",".join(
    (
        f"inject-error.0.event=none,inject-error.0.sector={BAD_SECTORS[0]},inject-error.0.errno=5",
        "inject-error.1.event=none,inject-error.1.iotype=write,inject-error.1.errno=28",
        f"inject-error.1.sector={BAD_SECTORS[1]}",
    )
)


@dataclass(frozen=True)
class Held:
    """What a daemon holds at a moment at which it has no front-end."""

    resources: Resources
    """Without the threads of pools."""
    pool: int
    """Threads of pools."""
    memory: int
    """Bytes that are its own (RssAnon)."""

    @classmethod
    def by(cls, pid: int) -> Held:
        resources = Resources.of(pid)
        pool = sum(resources.threads.pop(name, 0) for name in _POOLS)
        status = Path(f"/proc/{pid}/status").read_text().split()
        return cls(resources, pool, int(status[status.index("RssAnon:") + 1]) * 1024)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Descriptors, shared mappings, threads."""
        now = self.resources
        return now.descriptors.total(), now.mappings.total(), now.threads.total() + self.pool


class Daemon(Protocol):
    """What guests see of a daemon."""

    disks: Sequence[Disk]

    @property
    def pid(self) -> int: ...

    @property
    def output(self) -> str: ...

    def has_ended(self) -> bool: ...


def _words(disks: Sequence[Disk], data_path: str) -> list[str]:
    words = ["--log-level", "warning", "storage-daemon", "--data-path", data_path]
    words += ["--lock-timeout", str(_LOCK_SECONDS)]
    words += ["--object", "iothread,id=t0", "--object", "iothread,id=t1"]
    for number, disk in enumerate(disks):
        words += disk.words(f"t{number % 2}")
    return words


class LongLived:
    """A daemon that nobody ends, and that must hold in the end what it held at first.

    Owns: the process.
    """

    def __init__(self, disks: Sequence[Disk], data_path: str) -> None:
        self.disks = disks
        for disk in disks:
            disk.create()
        sockets = [disk.socket for disk in disks]
        self._process = DaemonProcess([*VHOSTBLK, *_words(disks, data_path)], sockets=sockets)
        self._process.start(_GONE_SECONDS)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return self._process.output

    def has_ended(self) -> bool:
        return self._process.status is not None

    def resize(self, disk: Disk, size: int) -> None:
        """Give an image another size, and say so."""
        os.truncate(disk.image, size)
        os.kill(self.pid, signal.SIGHUP)

    def stop(self) -> None:
        """End it in order."""
        assert self._process.stop(_END_SECONDS) == 0, self.output[-4000:]
        assert TRACEBACK not in self.output
        self._process.close()

    def give_up(self) -> None:
        """End it somehow."""
        self._process.close(check=False)


class ShortLived:
    """Daemons on the same disks, one after the other, with the engine or without.

    Owns: the processes.
    """

    def __init__(self, disks: Sequence[Disk]) -> None:
        self.disks = disks
        for disk in disks:
            disk.create()
        self.server = ForkServer(())
        self.data_path = "native"
        self.server.words = _words(disks, self.data_path)
        self.server.start()

    @property
    def pid(self) -> int:
        return self.server.pid

    @property
    def output(self) -> str:
        return self.server.output

    def has_ended(self) -> bool:
        """Never by itself: its guests would not come back."""
        return False

    def replace(self, data_path: str, *, orderly: bool) -> None:
        """End the one there is, and start the next."""
        if orderly:
            self.wait_until_it_listens()  # before, SIGTERM is as good as SIGKILL
            status = self.server.stop()
            assert status == 0, (status, self.output)
        else:
            self.server.kill()
        assert TRACEBACK not in self.output, self.output
        self.data_path = data_path
        self.server.words = _words(self.disks, data_path)
        self.server.start()

    def wait_until_it_listens(self) -> None:
        """On all its sockets."""
        deadline = time.monotonic() + _GONE_SECONDS
        while not all(is_listening(disk.socket) for disk in self.disks):
            assert time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def close(self, *, check: bool) -> None:
        """End the last one."""
        try:
            if check:
                status = self.server.stop()
                assert status == 0, (status, self.output)
            elif self.pid:
                self.server.kill()
        finally:
            self.server.close()


def at_rest(pid: int) -> Held:
    """What a daemon holds when that has not changed for a while."""
    deadline = time.monotonic() + _GONE_SECONDS
    before, since = Held.by(pid), time.monotonic()
    while time.monotonic() < since + _REST_SECONDS:
        time.sleep(0.02)
        now = Held.by(pid)
        if now.resources != before.resources:
            assert time.monotonic() < deadline, now
            before, since = now, time.monotonic()
    return before


def settled(pid: int, allowed: Callable[[Held], list[str]]) -> tuple[Held, list[str]]:
    """Wait until nothing is held that is not allowed; what is held then, and what should not be."""
    deadline = time.monotonic() + _GONE_SECONDS
    while True:
        held = Held.by(pid)
        complaints = allowed(held)
        if not complaints or time.monotonic() > deadline:
            return held, complaints
        time.sleep(0.02)
