"""`vhostblk stats` beside daemons that run, are killed, come again, or are many."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import eventually
from vhostblk.block.keyval import parse_options
from vhostblk.client.client import Client
from vhostblk.daemon import Daemon, DaemonConfig
from vhostblk.export.options import parse_export
from vhostblk.export.statistics import QueueStatistics
from vhostblk.export.stats_reader import page_names, pid_in, read_page
from vhostblk.testing.plugin import DaemonStarter
from vhostblk.virtio.blk import RequestType

STATS = (sys.executable, "-m", "vhostblk", "stats")
SHM = Path("/dev/shm")


def stats(*words: str, status: int = 0) -> str:
    done = subprocess.run([*STATS, *words], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr if not status else "") == (status, ""), done.stderr
    return done.stderr if status else done.stdout


def export_json(*words: str) -> dict[str, Any]:
    (export,) = json.loads(stats("--json", *words))["exports"]
    assert isinstance(export, dict)
    return export


def pages_of(pid: int) -> list[str]:
    return [name for name in page_names() if pid_in(name) == pid]


def requests_of(pid: int) -> int:
    """Of all exports of a process."""
    return sum(queue.requests for queue in queues_of(pid))


def queues_of(pid: int) -> list[QueueStatistics]:
    pages = [read_page(name) for name in pages_of(pid)]
    return [queue for page in pages for queue in page.queues.values()]


def null_export(name: str, socket: Path, *, queues: int = 2) -> list[str]:
    return [
        "--blockdev",
        f"null-co,node-name={name},size=1M,read-zeroes=on",
        "--export",
        f"vhost-user-blk,id={name},node-name={name},num-queues={queues},writable=on,"
        f"addr.type=unix,addr.path={socket}",
    ]


def test_disk_of_serve_is_called_what_its_command_line_says(
    daemon: DaemonStarter, tmp_path: Path, socket_directory: Path
) -> None:
    for name in ("vm1-root", "vm2-root"):
        image, socket = tmp_path / name, socket_directory / name
        image.write_bytes(bytes(4096))
        process = daemon("serve", image, "--socket", socket, "--name", name, sockets=[socket])
        assert f"INFO: export {name}: node 'disk'" in process.output
    assert stats("--export", "vm2-root").startswith(f"export vm2-root (process {process.pid}, ")


@pytest.mark.parametrize("data_path", ["native", "python"])
def test_figures_of_a_client_that_is_at_work(
    storage_daemon: DaemonStarter, socket_directory: Path, data_path: str
) -> None:
    socket = socket_directory / "s"
    words = [*null_export("busy", socket), "--data-path", data_path]
    daemon = storage_daemon(*words, sockets=[socket])
    chosen = ("--pid", str(daemon.pid), "--export", "busy")
    assert export_json(*chosen)["queues"] == []
    with Client.connect(socket, queues=2) as client:
        for n in range(30):
            client.write(n * 512, bytes(512), queue=n % 2)
        client.wait([client.submit(RequestType.IN, 0, room=4096) for _ in range(20)])
        eventually(lambda: requests_of(daemon.pid) == 50, "50 requests")
        eventually(lambda: not any(queue.in_flight for queue in queues_of(daemon.pid)), "their end")
        export = export_json(*chosen)
        table = stats(*chosen)
    assert (export["data_path"], export["sessions"], export["connected"]) == (data_path, 1, 1)
    first, second = (queue["operations"] for queue in export["queues"])
    assert (first["read"]["requests"], first["write"]["requests"]) == (20, 15)
    assert (second["read"]["requests"], second["write"]["bytes"]) == (0, 15 * 512)
    assert export["total"]["in_flight"] == 0
    assert re.search(r"^ +0 +read +20 ", table, re.MULTILINE)
    assert re.search(r"^ +all +read +20 ", table, re.MULTILINE)
    name = f"vhostblk-{daemon.pid}-busy"
    eventually(lambda: read_page(name).header.connected == 0, "the client has left")
    assert requests_of(daemon.pid) == 50
    pid = daemon.pid
    daemon.stop()
    assert pages_of(pid) == []
    assert stats(*chosen, status=1) == (
        f"vhostblk: no statistics of export busy in process {pid}\n"
    )


def test_watch_on_a_terminal_replaces_one_table_by_the_next(
    storage_daemon: DaemonStarter, socket_directory: Path
) -> None:
    socket = socket_directory / "s"
    daemon = storage_daemon(*null_export("e", socket), sockets=[socket])
    words = ("--pid", str(daemon.pid), "--watch", "0.05", "--count", "2")
    found: list[list[int]] = []

    def reads_in_both() -> bool:
        """Looks at two intervals; we, or the daemon, may have had no turn in one of them."""
        nothing, *tables = shown_while_reading(socket, words).split("\x1b[H\x1b[2J")
        assert (nothing, len(tables)) == ("", 2)
        for table in tables:
            assert table.startswith(f"export e (process {daemon.pid}, ")
        rows = [re.search(r" 0     read +(\d+) ", table) for table in tables]
        found.append([int(row[1]) if row else 0 for row in rows])
        return all(found[-1])

    eventually(reads_in_both, "two tables with reads", 60)
    # Of each interval: there were not so many in both together.
    assert sum(found[-1]) <= requests_of(daemon.pid)


def shown_while_reading(socket: Path, words: Sequence[str]) -> str:
    """What a terminal gets from `vhostblk stats`, while a client reads."""
    master, slave = pty.openpty()
    try:
        try:
            process = subprocess.Popen([*STATS, *words], stdout=slave, stderr=slave)
        finally:
            os.close(slave)
        with process, Client.connect(socket) as client:
            while process.poll() is None:
                client.read(0, 512)
        assert process.returncode == 0
        # What was written arrives a moment later, and a part at a time; the end of it all is an error.
        shown = b""
        with contextlib.suppress(OSError):
            while more := os.read(master, 1 << 16):
                shown += more
        return shown.decode()
    finally:
        os.close(master)


def test_watch_ends_with_its_reader_and_with_ctrl_c(
    storage_daemon: DaemonStarter, socket_directory: Path
) -> None:
    socket = socket_directory / "s"
    daemon = storage_daemon(*null_export("e", socket), sockets=[socket])
    words = [*STATS, "--json", "--pid", str(daemon.pid), "--watch", "0.02"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe) as gone:
        assert gone.stdout is not None
        assert gone.stderr is not None
        assert json.loads(gone.stdout.readline())["interval"] == 0.02
        gone.stdout.close()
        assert (gone.stderr.read(), gone.wait(10)) == (b"", 0)

    def hear() -> None:
        # Whoever runs us in the background may ignore it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(words, stdout=pipe, stderr=pipe, preexec_fn=hear) as interrupted:
        assert interrupted.stdout is not None
        interrupted.stdout.readline()
        interrupted.send_signal(signal.SIGINT)
        out, err = interrupted.communicate(timeout=10)
    assert (err, interrupted.returncode) == (b"", 0)
    assert all(json.loads(line)["exports"] for line in out.splitlines())


def test_page_of_a_killed_daemon_is_not_shown_and_the_next_one_removes_it(
    storage_daemon: DaemonStarter, socket_directory: Path
) -> None:
    sockets = [socket_directory / name for name in "abc"]
    living = storage_daemon(*null_export("lives", sockets[0]), sockets=sockets[:1])
    killed = storage_daemon(*null_export("e", sockets[1]), sockets=sockets[1:2])
    pid = killed.pid
    os.kill(pid, signal.SIGKILL)
    killed.expect_end(-signal.SIGKILL)
    # It is there until some daemon starts, which may be that of another test.
    assert pages_of(pid) in ([f"vhostblk-{pid}-e"], [])
    stats("--pid", str(pid), status=1)
    successor = storage_daemon(*null_export("e", sockets[2]), sockets=sockets[2:])
    assert pages_of(pid) == []
    assert export_json("--pid", str(successor.pid))["export"] == "e"
    assert export_json("--pid", str(living.pid))["export"] == "lives"


def test_many_exports_cost_a_page_each_until_they_are_used(
    storage_daemon: DaemonStarter, socket_directory: Path
) -> None:
    count = 128
    sockets = [socket_directory / str(number) for number in range(count)]
    words = ["--object", "iothread,id=io"]
    for number, socket in enumerate(sockets):
        words += null_export(f"e{number}", socket, queues=64)
        words[-1] += ",iothread=io"
    daemon = storage_daemon(*words, sockets=sockets)
    pid = daemon.pid
    assert len(pages_of(pid)) == count
    before = sum((SHM / name).stat().st_blocks for name in pages_of(pid)) * 512
    assert before <= count * 4096
    with Client.connect(sockets[77]) as client:
        client.read(0, 512)
        found = json.loads(stats("--json", "--pid", str(pid)))["exports"]
    assert len(found) == count
    served = {export["export"]: export["total"]["requests"] for export in found}
    assert {name for name, requests in served.items() if requests} == {"e77"}
    # One queue of one export came, and reading has allocated nothing.
    after = sum((SHM / name).stat().st_blocks for name in pages_of(pid)) * 512
    assert after - before <= 12288
    daemon.stop()
    assert pages_of(pid) == []


def test_daemons_of_one_process_with_the_same_names(socket_directory: Path) -> None:
    def configuration(number: int) -> DaemonConfig:
        path = socket_directory / str(number)
        export = f"vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={path}"
        return DaemonConfig(
            blockdevs=[parse_options("memory,node-name=d,size=1M", "driver")],
            exports=[parse_export(parse_options(export, "type"))],
        )

    def requests() -> list[int]:
        exports = json.loads(stats("--json", "--pid", str(os.getpid())))["exports"]
        assert [export["export"] for export in exports] == ["e"] * len(exports)
        return [export["total"]["requests"] for export in exports]

    def use(number: int) -> None:
        with Client.connect(socket_directory / str(number)) as client:
            client.read(0, 512)
            eventually(lambda: requests_of(os.getpid()) == 1, "one request")

    async def scenario() -> None:
        ready = [asyncio.Event() for _ in range(2)]
        daemons = [Daemon(configuration(number), ready[number].set) for number in range(2)]
        running = [asyncio.create_task(daemon.run()) for daemon in daemons]
        async with asyncio.timeout(20):
            for event in ready:
                await event.wait()
            await asyncio.to_thread(use, 1)
            assert sorted(await asyncio.to_thread(requests)) == [0, 1]
            daemons[0].stop()
            await running[0]
            assert await asyncio.to_thread(requests) == [1]
            daemons[1].stop()
            await running[1]
        assert pages_of(os.getpid()) == []

    asyncio.run(scenario())


@pytest.mark.parametrize("room", [0, 8192], ids=["none", "for the header"])
def test_without_room_in_dev_shm_a_daemon_serves_and_says_so(
    storage_daemon: DaemonStarter, socket_directory: Path, room: int
) -> None:
    """A /dev/shm of its own, of which only two pages are free: the folder takes none, the header one."""
    probe = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "x", "/dev/shm"],
        capture_output=True,
        check=False,
    )
    if probe.returncode:
        pytest.skip("mount namespaces are not to be had")
    fill = "head -c 16M /dev/zero >/dev/shm/rest 2>&1; " if not room else ""
    script = f'mount -t tmpfs -o size={room or 8192} none /dev/shm && {{ {fill}exec "$@"; }}'
    socket = socket_directory / "s"
    daemon = storage_daemon(
        *null_export("e", socket),
        sockets=[socket],
        command=[
            *("unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh"),
            *(sys.executable, "-m", "vhostblk", "storage-daemon"),
        ],
    )
    with Client.connect(socket) as client:
        for _ in range(10):
            client.read(0, 512)
    daemon.stop()
    said = daemon.output.splitlines()
    (warning,) = [line for line in said if "WARNING" in line]
    assert "export e: no shared memory for its statistics (No space left on device)" in warning
    assert any(re.search(r"export e: read +10 ", line) for line in said)
