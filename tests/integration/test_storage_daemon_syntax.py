"""qemu-storage-daemon's option syntax: what it accepts has the effect it has there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemons import terminate
from tests.requirements import require
from vhostblk.client.client import Client
from vhostblk.testing.daemon_process import DaemonProcess
from vhostblk.testing.plugin import DaemonStarter
from vhostblk.virtio.features import Feature

SIZE = 1 << 20


@pytest.fixture
def image(socket_directory: Path) -> Path:
    path = socket_directory / "disk.img"
    path.write_bytes(b"".join(bytes([n % 251]) * 512 for n in range(SIZE // 512)))
    return path


Start = Callable[..., Client]


@pytest.fixture
def start(storage_daemon: DaemonStarter, socket_directory: Path) -> Start:
    """Starts a daemon and connects to its one socket."""

    def run(*words: str) -> Client:
        storage_daemon(*words, sockets=[socket_directory / "s"])
        return Client.connect(socket_directory / "s")

    return run


def test_keyval_and_json_are_the_same(
    storage_daemon: DaemonStarter, image: Path, socket_directory: Path
) -> None:
    """Each option once in each syntax; the daemon tells no difference."""
    options = {
        "driver": "raw",
        "node-name": "d",
        "offset": 4096,
        "size": 65536,
        "file": {"driver": "file", "filename": str(image), "cache": {"direct": False}},
    }
    export = {
        "type": "vhost-user-blk",
        "id": "e",
        "node-name": "d",
        "writable": True,
        "addr": {"type": "unix", "path": str(socket_directory / "s")},
        "num-queues": 3,
        "logical-block-size": 1024,
        "iothread": "io",
        "serial": "a,b",
    }
    iothread = {"qom-type": "iothread", "id": "io", "poll-max-ns": 0}
    as_json = ["--object", json.dumps(iothread), "--blockdev", json.dumps(options)]
    as_json += ["--export", json.dumps(export)]
    as_keyval = ["--object", "iothread,id=io,poll-max-ns=0"]
    as_keyval += [
        "--blockdev",
        f"raw,node-name=d,offset=4k,size=64K,file.driver=file,file.filename={image},"
        "file.cache.direct=off",
    ]
    as_keyval += [
        "--export",
        "type=vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,"
        f"addr.path={socket_directory / 's'},num-queues=3,logical-block-size=1k,iothread=io,serial=a,,b",
    ]
    seen = []
    for words in (as_json, as_keyval):
        process = storage_daemon(*words, sockets=[socket_directory / "s"])
        with Client.connect(socket_directory / "s") as client:
            seen.append((client.config, client.offered, client.get_id(), client.read(0, 1024)))
        assert process.stop() == 0
    assert seen[0] == seen[1]
    config, _, serial, content = seen[0]
    assert (config.capacity, config.num_queues, config.blk_size) == (128, 3, 1024)
    assert serial == "a,b"
    assert content == bytes([8]) * 512 + bytes([9]) * 512


def test_nodes_may_be_named_and_used_by_name(
    start: Start, image: Path, socket_directory: Path
) -> None:
    with start(
        *["--blockdev", f"driver=file,node-name=base,filename={image},read-only=on"],
        *["--blockdev", "driver=raw,node-name=d,file=base,offset=512,read-only=on"],
        *[
            "--export",
            f"vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={socket_directory / 's'}",
        ],
    ) as client:
        assert client.capacity == SIZE - 512
        assert client.read(0, 512) == bytes([1]) * 512
        assert client.offered & Feature.VIRTIO_BLK_F_RO


@pytest.mark.parametrize(
    ("word", "writable"),
    [("on", True), ("yes", True), ("true", True), ("y", True), ("off", False), ("no", False)],
)
def test_booleans_have_qemus_words(
    start: Start, socket_directory: Path, word: str, writable: bool
) -> None:
    with start(
        *["--blockdev", "null-co,node-name=d,size=1M"],
        *[
            "--export",
            f"vhost-user-blk,id=e,node-name=d,writable={word},addr.type=unix"
            f",addr.path={socket_directory / 's'}",
        ],
    ) as client:
        assert bool(client.offered & Feature.VIRTIO_BLK_F_RO) is not writable


def test_file_names_with_commas_are_doubled(
    start: Start, image: Path, socket_directory: Path
) -> None:
    odd = image.rename(image.with_name("a,b=c,,d.img"))
    doubled = str(odd).replace(",", ",,")
    with start(
        *["--blockdev", f"file,node-name=d,filename={doubled}"],
        *[
            "--export",
            f"vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={socket_directory / 's'}",
        ],
    ) as client:
        assert client.capacity == SIZE


def test_the_last_of_equal_keys_counts(start: Start, socket_directory: Path) -> None:
    with start(
        *["--blockdev", "null-co,node-name=d,size=1M,size=2M"],
        *[
            "--export",
            f"vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path=/nowhere,"
            f"addr.path={socket_directory / 's'}",
        ],
    ) as client:
        assert client.capacity == 2 << 20


def test_options_stand_in_any_order_of_kinds(start: Start, socket_directory: Path) -> None:
    """Exports before the nodes they name: qemu-storage-daemon wants the nodes first, we do not mind."""
    with start(
        *[
            "--export",
            f"vhost-user-blk,id=e,node-name=d,iothread=io,addr.type=unix,addr.path={socket_directory / 's'}",
        ],
        *["--blockdev", "null-co,node-name=d,size=1M"],
        *["--object", "iothread,id=io"],
    ) as client:
        assert client.capacity == 1 << 20


def test_queues_run_on_the_iothreads_they_are_mapped_to(
    storage_daemon: DaemonStarter, image: Path, socket_directory: Path
) -> None:
    """Seen by which thread has used the processor: the other one sleeps."""
    require("engine")
    sock = socket_directory / "s"
    words = [
        *[
            "--object",
            "iothread,id=even,poll-max-ns=0",
            "--object",
            "iothread,id=odd,poll-max-ns=0",
        ],
        *["--blockdev", f"driver=file,node-name=d,filename={image}"],
        "--export",
        json.dumps(
            {
                "type": "vhost-user-blk",
                "id": "e",
                "node-name": "d",
                "addr": {"type": "unix", "path": str(sock)},
                "num-queues": 4,
                "iothread-vq-mapping": [
                    {"iothread": "even", "vqs": [0, 2]},
                    {"iothread": "odd", "vqs": [3, 1]},
                ],
            }
        ),
    ]
    process = storage_daemon(*words, sockets=[sock])
    with Client.connect(sock, queues=4) as client:
        for queue, name in enumerate(["even", "odd", "even", "odd"]):
            before = _switches(process.pid)
            for _ in range(50):
                assert client.read(0, 512, queue=queue)
            after = _switches(process.pid)
            woken = {thread for thread in after if after[thread] - before[thread] > 40}
            assert woken & {"even", "odd"} == {name}


def _switches(pid: int) -> dict[str, int]:
    """How often each thread has gone to sleep, by name."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        status = (task / "status").read_text()
        name, count = (
            re.findall(rf"(?m)^{key}:\s*(.*)$", status)[0]
            for key in ("Name", "voluntary_ctxt_switches")
        )
        found[name] = int(count)
    return found


@pytest.mark.parametrize("program", ["qemu-storage-daemon", "vhostblk"])
def test_one_command_line_for_both_programs(
    storage_daemon: DaemonStarter,
    image: Path,
    socket_directory: Path,
    program: str,
) -> None:
    """Only the name of the program changes."""
    sock, pid_file = socket_directory / "s", socket_directory / "pid"
    words = [
        *["--object", "iothread,id=io0"],
        *["--blockdev", f"driver=file,node-name=f,filename={image},discard=unmap,cache.direct=off,aio=threads"],
        *["--blockdev", "driver=raw,node-name=d,file=f"],
        "--export",
        f"type=vhost-user-blk,id=e0,addr.type=unix,addr.path={sock},node-name=d,writable=on,num-queues=2,"
        "logical-block-size=512,iothread=io0",
        *["--pidfile", str(pid_file), "--daemonize"],
    ]  # fmt: skip
    command = [require("qemu-storage-daemon", group="qemu")]
    process = DaemonProcess(command + words)
    if program == "vhostblk":
        process = storage_daemon(*words)
    else:
        process.start()
    assert process.wait() == 0
    process.close()
    pid = int(pid_file.read_text())
    try:
        with Client.connect(sock, queues=2) as client:
            client.write(0, b"w" * 512, queue=1)
            assert client.read(0, 1024) == b"w" * 512 + bytes([1]) * 512
            assert client.config.num_queues == 2
    finally:
        terminate(pid)
