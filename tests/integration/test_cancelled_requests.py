"""A request whose task is cancelled is answered once, and lets go of its memory (row B25), on both data paths.

Nothing in the daemon cancels the task of a request; a job, a driver's timeout or a debugger may. The daemon runs on
this test's loop, the guest in a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.requirements import require
from vhostblk.block.keyval import parse_options
from vhostblk.client.client import Client
from vhostblk.daemon import Daemon, DaemonConfig
from vhostblk.export.export import Export
from vhostblk.export.native_path import NativeDataPath
from vhostblk.export.options import parse_export
from vhostblk.export.python_path import PythonDataPath
from vhostblk.testing.plugin import ExpectedLog
from vhostblk.virtio.blk import RequestType, Status

_REQUESTS = 60
KINDS = (RequestType.IN, RequestType.OUT, RequestType.FLUSH, RequestType.WRITE_ZEROES)


def cancel_all(export: Export) -> int:
    path = export._path
    tasks: set[asyncio.Task[None]] = set()
    if isinstance(path, NativeDataPath):
        for thread in path._threads.attached:
            tasks = tasks.union(*thread.tasks.values())
    else:
        assert isinstance(path, PythonDataPath)
        for queue in path._queues.values():
            tasks |= queue._tasks
    for task in tasks:
        task.cancel()
    return len(tasks)


def guest(socket: Path, stop: Callable[[Client], None]) -> list[int | None]:
    """Some requests of every kind, and then this; their statuses."""
    with Client.connect(socket, queues=2) as client:
        pending = []
        for number in range(_REQUESTS):
            kind = KINDS[number % len(KINDS)]
            out = {RequestType.OUT: bytes(4096), RequestType.WRITE_ZEROES: bytes(16)}.get(kind, b"")
            room = 4096 if kind is RequestType.IN else 0
            pending.append(client.submit(kind, 4096, out=out, room=room, queue=number % 2))
        stop(client)
        # The client's ring refuses a head that is given back twice.
        client.wait(pending)
        assert all(queue.driver.in_flight == 0 for queue in client.queues)
        return [p.status for p in pending]


def stop_queues(client: Client) -> None:
    for queue in (0, 1):
        client.start_queue(queue, client.stop_queue(queue))


@pytest.mark.parametrize("data_path", ["native", "python"])
@pytest.mark.parametrize("stop", [lambda _: None, stop_queues], ids=["running", "queues stop"])
def test_cancelled_requests_are_answered_once_and_let_go_of_their_memory(
    socket_directory: Path, data_path: str, stop: Callable[[Client], None], expect_log: ExpectedLog
) -> None:
    require("engine")
    expect_log.allow("Operation canceled", "timed out")
    socket = socket_directory / "e"
    config = DaemonConfig(
        blockdevs=[
            parse_options(
                "null-co,node-name=n,size=1M,latency-ns=20000000,read-zeroes=on", "driver"
            )
        ],
        exports=[
            parse_export(
                parse_options(
                    "vhost-user-blk,id=e,node-name=n,writable=on,num-queues=2,"
                    f"addr.type=unix,addr.path={socket}",
                    "type",
                )
            )
        ],
        data_path=data_path,
    )

    async def everything() -> None:
        ready = asyncio.Event()
        daemon = Daemon(config, ready.set)
        running = asyncio.create_task(daemon.run())
        await ready.wait()
        export = daemon.exports["e"]
        loop = asyncio.get_running_loop()
        client = loop.run_in_executor(None, guest, socket, stop)
        try:
            cancelled = 0
            while not client.done():
                cancelled += cancel_all(export)
                await asyncio.sleep(0.002)
            statuses = await client
            assert cancelled
            assert set(statuses) <= {Status.OK, Status.IOERR}
            assert Status.IOERR in statuses
            counted = export.statistics()
            assert counted.requests == _REQUESTS
            assert counted.in_flight == 0
            backend = export.device.backend
            assert backend.in_flight == backend.node.in_flight == 0
        finally:
            daemon.stop()
            await running

    asyncio.run(everything())
