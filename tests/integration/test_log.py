"""What the log says of an export is the same on both data paths."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemons import eventually
from vhostblk.client.client import Client
from vhostblk.errors import BlockError
from vhostblk.testing.daemon_process import DaemonProcess
from vhostblk.testing.plugin import DaemonStarter
from vhostblk.testing.requirements import require
from vhostblk.virtio.driver import Buffer

PATHS = pytest.mark.parametrize("path", ["native", "python"])

Serve = Callable[..., tuple[DaemonProcess, Path]]


@pytest.fixture
def serve(daemon: DaemonStarter, tmp_path: Path, socket_directory: Path) -> Serve:
    def start(*options: str) -> tuple[DaemonProcess, Path]:
        image, sock = tmp_path / "disk.img", socket_directory / "s"
        image.write_bytes(bytes(65536))
        return daemon("serve", image, "--socket", sock, *options, sockets=[sock]), sock

    return start


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data-path", "python"], "Python data path"),
        (["--aio", "threads"], "1 engine thread with threads"),
        (["--iothreads", "2"], r"2 engine threads with (io_uring|threads)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_first_line_tells_how_data_is_moved(
    serve: Serve, options: list[str], expected: str
) -> None:
    if "python" not in options:
        require("engine")
    process, sock = serve(*options)
    line = f"export disk: node 'disk', 65536 bytes, writable, {expected}, listening on {sock}"
    # It listens a moment before it says so.
    eventually(lambda: bool(re.search(f"INFO: {line}\n", process.output)), "the line")


@PATHS
def test_write_to_a_read_only_disk_is_logged_alike(serve: Serve, path: str) -> None:
    if path == "native":
        require("engine")
    process, sock = serve("--data-path", path, "--read-only")
    with Client.connect(sock, strict=False) as client:
        for _ in range(3):
            with pytest.raises(BlockError):
                client.write(0, bytes(512))
    assert process.stop() == 0
    kind = "export disk: write failed: Invalid argument (EINVAL)"
    first, last = (line for line in process.output.splitlines() if kind in line)
    assert first.endswith(" (logged once, counted from now on)")
    assert last.endswith(": 3 times in all")


@PATHS
def test_request_without_a_whole_header_is_of_no_type(serve: Serve, path: str) -> None:
    if path == "native":
        require("engine")
    process, sock = serve("--data-path", path)
    with Client.connect(sock) as client:
        room = client.memory.allocate(4096)
        client.memory.write(room.gpa, bytes(100) + b"\xff")
        status = Buffer(room.gpa + 100, 1)
        client.queues[0].driver.add([Buffer(room.gpa, 15)], [status])
        client.queues[0].notify()
        eventually(lambda: client.memory.read(status) != b"\xff", "the status")
    assert process.stop() == 0
    assert "a request without a header failed: Invalid argument (EINVAL)" in process.output
    rows = re.findall(r"(?m)^vhostblk: INFO: export disk: (\w+) +(\d+) +\d+ +(\d+)", process.output)
    assert rows == [("other", "1", "1")]
