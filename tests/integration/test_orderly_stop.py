"""A daemon that is asked to stop hangs up after it has drained: what a front-end then finds in the rings is final.

QEMU reads the used ring at that moment, and has the next back-end begin there. A request that completes later is done
twice, and the guest's driver finds used elements it does not know: "id 5 is not a head", and I/O errors.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.daemons import wait_until_taken
from vhostblk.client.client import Client
from vhostblk.testing.plugin import DaemonStarter
from vhostblk.virtio.blk import RequestType

LATENCY_NS = 300_000_000


@pytest.mark.parametrize("data_path", ["native", "python"])
def test_daemon_hangs_up_when_everything_in_flight_has_completed(
    storage_daemon: DaemonStarter, socket_directory: Path, data_path: str
) -> None:
    path = socket_directory / "slow"
    daemon = storage_daemon(
        *("--blockdev", f"driver=null-co,node-name=d,size=1M,latency-ns={LATENCY_NS}"),
        "--export",
        f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={path},num-queues=2",
        *("--data-path", data_path),
        sockets=[path],
    )
    with Client.connect(path, queues=2) as client:
        pending = [
            client.submit(RequestType.IN, number * 4096, room=4096, queue=number % 2)
            for number in range(8)
        ]
        wait_until_taken(daemon, 8)
        os.kill(daemon.pid, signal.SIGTERM)
        assert client.control.connection.receive() is None  # it hangs up, and says nothing before
        client.poll()
        done_by_hang_up = [request.is_done for request in pending]
        assert daemon.wait() == 0
        client.poll()
        assert [request.is_done for request in pending] == done_by_hang_up
        assert all(done_by_hang_up)
        client.abandon()
