"""A daemon with a disk that may stop to answer, and another one that goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.daemons import eventually
from vhostblk.client.client import Client
from vhostblk.export.stats_reader import page_names, pid_in
from vhostblk.testing.daemon_process import VHOSTBLK, DaemonProcess

SIZE = 1 << 20
DEADLINE = 60.0
NO_ANSWER = "export stuck: the disk does not answer"
AGAIN = "export stuck: the disk answers again"
SHUTDOWN_SECONDS = (0.2, 2.0, 20.0)
"""Of `--shutdown-timeout`, to be tried in turn: on a busy machine the other disk needs some time to end, too."""


class StuckDaemon(DaemonProcess):
    """Serves `stuck`, and `other` from a file.

    Args:
        folder: for their sockets and that file.
        blockdev: of the disk that may stop to answer, without its name.
        go_on: has that answer again.
        export: more options of both exports.
        other: more options of the other disk.
    """

    def __init__(
        self,
        folder: Path,
        data_path: str,
        blockdev: str,
        go_on: Callable[[], None],
        *words: str,
        export: str,
        other: str = "",
    ) -> None:
        self.stuck, self.other = folder / "stuck", folder / "other"
        image = folder / "image"
        image.write_bytes(bytes(SIZE))
        disks = {self.stuck: blockdev, self.other: f"driver=file,filename={image}{other}"}
        command = [*VHOSTBLK, "storage-daemon", "--data-path", data_path, *words]
        for path, options in disks.items():
            command += ["--blockdev", f"{options},node-name={path.name}"]
            command += [
                "--export",
                f"type=vhost-user-blk,id={path.name},node-name={path.name},addr.type=unix,"
                f"addr.path={path},num-queues=2,writable=on{export}",
            ]
        super().__init__(command, sockets=[self.stuck, self.other])
        self._go_on = go_on

    def close(self, *, check: bool = True) -> None:
        """Also after a failure nothing hangs."""
        self._go_on()
        super().close(check=check)


def in_time(condition: Callable[[], object], what: str) -> None:
    """Wait until it is so."""
    eventually(lambda: bool(condition()), what, DEADLINE)


def given_up(daemon: DaemonProcess, pid_file: Path) -> str:
    """The end of a daemon that gives up a disk, and leaves nothing behind; what it said."""
    pid = daemon.pid
    said = daemon.expect_end(1, DEADLINE)
    assert not pid_file.exists()
    assert not any(pid_in(name) == pid for name in page_names())
    return said


def end_in_time(end: Callable[[float], str]) -> str:
    """What is said by a daemon that ends with one disk stuck, and gives up nothing but that one.

    Args:
        end: has one end, with this time-out, and returns what it has said.
    """
    for seconds in SHUTDOWN_SECONDS:
        said = end(seconds)
        assert f"vhostblk: given up after {seconds:g} s" in said
        assert "ERROR: export stuck: given up: " in said
        if "export other: given up" not in said:
            return said
    raise AssertionError(f"the other one does not end:\n{said}")


def is_served(path: Path) -> None:
    """The disk writes, flushes and reads, on two queues."""
    with Client.connect(path, queues=2, timeout=DEADLINE) as client:
        client.write(4096, b"x" * 512)
        client.flush()
        assert client.read(4096, 512, queue=1) == b"x" * 512
