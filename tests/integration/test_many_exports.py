"""Exports that name no iothread have a thread each, up to a number; the others share those."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.daemons import eventually
from tests.requirements import require
from vhostblk.client.client import Client
from vhostblk.daemon import MAX_OWN_THREADS
from vhostblk.testing.plugin import DaemonStarter
from vhostblk.testing.resources import Resources

_MORE = 5


def engine_threads(pid: int) -> Counter[str]:
    threads = Resources.of(pid).threads
    return Counter(
        {name: threads[name] for name in threads if name.endswith("/0") or name == "own"}
    )


def test_exports_beyond_a_number_share_engine_threads(
    storage_daemon: DaemonStarter, socket_directory: Path
) -> None:
    require("engine")
    count = MAX_OWN_THREADS + _MORE
    sockets = [socket_directory / f"{number}" for number in range(count)]
    words = ["--object", "iothread,id=own", "--blockdev", "memory,node-name=named,size=1M"]
    for number, path in enumerate(sockets):
        words += ["--blockdev", f"memory,node-name=d{number},size=1M", "--export"]
        words += [
            f"vhost-user-blk,id=e{number},node-name=d{number},writable=on,"
            f"addr.type=unix,addr.path={path}"
        ]
    named = socket_directory / "named"
    words += ["--export", "vhost-user-blk,id=named,node-name=named,iothread=own,"]
    words[-1] += f"writable=on,addr.type=unix,addr.path={named}"
    daemon = storage_daemon(*words, sockets=[*sockets, named])
    expected = Counter([f"e{n}/0" for n in range(MAX_OWN_THREADS)] + ["own"])
    # Threads name themselves when they begin.
    eventually(lambda: engine_threads(daemon.pid) == expected, "a thread each, up to a number")
    said = f"export e{MAX_OWN_THREADS} and later ones share {MAX_OWN_THREADS} engine threads"
    assert daemon.output.count(said) == 1

    # Two of one thread, the last one, and the one with an iothread of its name: each its own disk.
    used = [sockets[0], sockets[MAX_OWN_THREADS], sockets[-1], named]
    clients = [Client.connect(path) for path in used]
    try:
        for number, client in enumerate(clients):
            client.write(0, bytes([number + 1]) * 512)
        for number, client in enumerate(clients):
            assert client.read(0, 512) == bytes([number + 1]) * 512
    finally:
        for client in clients:
            client.close()
