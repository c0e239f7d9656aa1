"""A block device is removed under exports of it, on both data paths.

No device that a test can make may be removed while it is open. So a loop device plays the part: its size becomes 0,
as that of a device that is removed, the kernel sends the message, and the daemon, which runs on this test's loop, finds
no such device in sysfs any more.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.probes import LoopDevice, watched_device
from vhostblk.block.drivers import host_file
from vhostblk.block.keyval import parse_options
from vhostblk.client.client import Client
from vhostblk.daemon import Daemon, DaemonConfig
from vhostblk.errors import BlockError
from vhostblk.export.error_policy import Action
from vhostblk.export.events import BlockIOError, ExportEvent
from vhostblk.export.options import parse_export
from vhostblk.testing.plugin import ExpectedLog
from vhostblk.virtio.blk import RequestType, Status

SIZE = 4 << 20
REMOVED = "the device has been removed"
BOTH = pytest.mark.parametrize("path", ["native", "python"])


@pytest.fixture
def device(tmp_path: Path) -> Iterator[LoopDevice]:
    with watched_device(tmp_path, SIZE) as found:
        yield found


class Served:
    """A daemon with the export `e` of the device, and `o` of a file."""

    def __init__(self, device: LoopDevice, folder: Path, path: str, policy: str) -> None:
        self._device = device
        self.folder = folder
        (folder / "other").write_bytes(b"o" * SIZE)
        self.events: list[ExportEvent] = []
        nodes = [
            f"host_device,node-name=d,filename={device.path}",
            f"file,node-name=f,filename={folder / 'other'}",
        ]
        exports = [
            f"vhost-user-blk,id={name},node-name={node},writable=on,addr.type=unix,"
            f"addr.path={folder / name},{policy}"
            for name, node in (("e", "d"), ("o", "f"))
        ]
        self.config = DaemonConfig(
            blockdevs=[parse_options(node, "driver") for node in nodes],
            exports=[parse_export(parse_options(export, "type")) for export in exports],
            data_path=path,
        )
        self.daemon: Daemon

    def run(self, guest: Callable[[Served], None]) -> None:
        """The guest, in a thread, beside the daemon."""

        async def everything() -> None:
            ready = asyncio.Event()
            self.daemon = Daemon(self.config, ready.set, self.events.append)
            running = asyncio.create_task(self.daemon.run())
            await ready.wait()
            self.loop = asyncio.get_running_loop()
            try:
                with ThreadPoolExecutor(1) as pool:
                    await self.loop.run_in_executor(pool, guest, self)
            finally:
                self.daemon.stop()
                with pytest.raises(BlockError, match="what was written last may be lost"):
                    await running

        asyncio.run(everything())

    def remove(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As del_gendisk(): nobody has it any more when the message comes."""
        monkeypatch.setattr(
            host_file, "is_there", lambda fd: not stat.S_ISBLK(os.fstat(fd).st_mode)
        )
        self._device.resize(0)
        self._device.announce("remove")

    def look_again(self) -> None:
        self.loop.call_soon_threadsafe(self.daemon.look_again)


def statuses(client: Client, *requests: tuple[RequestType, dict[str, Any]]) -> list[int | None]:
    pending = [client.submit(kind, 4096, **data) for kind, data in requests]
    client.wait(pending, timeout=60)
    return [one.status for one in pending]


ALL = (
    (RequestType.IN, {"room": 4096}),
    (RequestType.OUT, {"out": bytes(4096)}),
)


@BOTH
def test_requests_fail_once_it_is_gone_and_nobody_else_notices(
    device: LoopDevice,
    socket_directory: Path,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
    expect_log: ExpectedLog,
) -> None:
    expect_log.expect(f"d: {REMOVED}", "flush at close failed")
    expect_log.allow("failed: ")
    served = Served(device, socket_directory, path, "rerror=report,werror=enospc")

    def guest(served: Served) -> None:
        with (
            Client.connect(served.folder / "e", strict=False) as client,
            Client.connect(served.folder / "o") as other,
        ):
            assert statuses(client, *ALL) == [Status.OK] * 2
            served.remove(monkeypatch)
            # The kernel says ENOSPC to writes now, which would pause the guest: nobody has to know that.
            while statuses(client, *ALL) != [Status.IOERR] * 2:
                pass
            for _ in range(3):
                served.look_again()
                assert statuses(client, *ALL) == [Status.IOERR] * 2
            flush = client.submit(RequestType.FLUSH)
            client.wait([flush], timeout=60)
            assert flush.status == Status.IOERR
            # It has not become shorter: it has failed.
            assert client.read_config().capacity * 512 == SIZE
            other.write(0, b"w" * 512)
            assert other.read(0, 512) == b"w" * 512

    served.run(guest)
    assert (
        sum("from now on" in message and REMOVED in message for message in expect_log.messages) == 1
    )
    failures = [event for event in served.events if isinstance(event, BlockIOError)]
    assert failures
    assert {event.export for event in failures} == {"e"}
    assert {event.action for event in failures} == {Action.REPORT}


@BOTH
def test_policy_that_stops_pauses_its_guest(
    device: LoopDevice,
    socket_directory: Path,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
    expect_log: ExpectedLog,
) -> None:
    """Until the daemon ends, which reports what waits; a resume tries in vain, and pauses anew."""
    expect_log.expect(f"d: {REMOVED}", "flush at close failed", "its queues are paused")
    expect_log.allow("failed: ")
    served = Served(device, socket_directory, path, "rerror=stop,werror=stop")

    def pauses() -> int:
        return sum("its queues are paused" in message for message in expect_log.messages)

    def guest(served: Served) -> None:
        with Client.connect(served.folder / "e", strict=False) as client:
            assert statuses(client, *ALL) == [Status.OK] * 2
            served.remove(monkeypatch)
            waiting = client.submit(RequestType.OUT, 0, out=bytes(512))
            for number in range(1, 3):
                while pauses() < number:
                    pass
                served.look_again()
            client.poll()
            assert not waiting.is_done
            client.stop_queue(0)
            client.wait([waiting], timeout=60)
            assert waiting.status == Status.IOERR

    served.run(guest)
