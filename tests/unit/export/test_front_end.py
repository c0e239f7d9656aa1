"""What happens around a session's actions: at its start, and when one of them fails by a bug of ours."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.unit.block.fakes import ArrayNode
from tests.unit.export.test_python_path import NoEvents
from vhostblk.block.backend import BlockBackend
from vhostblk.errors import PeerError
from vhostblk.export import front_end
from vhostblk.export.blk_device import BlkDevice
from vhostblk.export.error_log import ErrorLog
from vhostblk.export.front_end import FrontEnd
from vhostblk.export.ownership import Ownership
from vhostblk.export.python_path import PythonDataPath
from vhostblk.export.stats_page import StatsPage
from vhostblk.vhost.connection import Connection
from vhostblk.vhost.dirty_log import DirtyLog
from vhostblk.vhost.frontend import Frontend
from vhostblk.vhost.inflight_region import create_file
from vhostblk.vhost.mem_table import MemTable
from vhostblk.vhost.message import ProtocolFeature
from vhostblk.vhost.payload import MemoryRegion
from vhostblk.virtio.features import Feature

PLANTED = RuntimeError("planted")
LOG = logging.LoggerAdapter(logging.getLogger(__name__))


class Path(PythonDataPath):
    """Fails when it is given memory."""

    def __init__(self, device: BlkDevice, failure: Exception) -> None:
        super().__init__(device, NoEvents(), StatsPage.private("test", 1))
        self.write_through: list[bool] = []
        self._failure = failure

    async def set_memory(self, memory: MemTable | None) -> None:
        if memory is not None:
            raise self._failure

    async def set_write_through(self, write_through: bool) -> None:
        self.write_through.append(write_through)


def ownership(device: BlkDevice) -> Ownership:
    """The image is ours."""
    return Ownership(device.backend, "test", LOG, lambda: False)


def make_device(backend: BlockBackend) -> BlkDevice:
    return BlkDevice(
        backend,
        serial="",
        num_queues=1,
        max_segments=1,
        logical_block_size=None,
        errors=ErrorLog(LOG),
    )


@pytest.fixture
def device() -> Iterator[BlkDevice]:
    backend = BlockBackend(ArrayNode(), "test", writable=True)
    yield make_device(backend)
    asyncio.run(backend.close())


def run(
    device: BlkDevice,
    data: bytes = b"",
    fds: tuple[int, ...] = (),
    failure: Exception = PLANTED,
    *,
    before: bytes = b"",
    after: bytes = b"",
) -> Path:
    """A front-end says this, and what comes without fds before and behind it, and leaves."""
    path = Path(device, failure)

    async def session() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            theirs.sendall(before)
            if data:
                socket.send_fds(theirs, [data], fds)
            theirs.sendall(after)
            theirs.shutdown(socket.SHUT_WR)
            served = FrontEnd(
                Connection(ours), device, path, 1, LOG, ErrorLog(LOG), ownership(device)
            )
            await served.run()

    asyncio.run(session())
    return path


def test_nothing_is_agreed_before_a_front_end_has_said_so(device: BlkDevice) -> None:
    device.set_features(Feature.VIRTIO_BLK_F_FLUSH)
    assert not device.write_through
    path = run(device)
    assert device.features == 0
    assert path.write_through == [True]


class Buffers(ArrayNode):
    """Notes the memory that was announced to it."""

    def __init__(self) -> None:
        super().__init__()
        self.announced: list[int] = []
        self.most = 0

    def driver_register_buf(self, host: int, size: int) -> None:
        self.announced.append(host)
        self.most = max(self.most, len(self.announced))

    def driver_unregister_buf(self, host: int) -> None:
        self.announced.remove(host)


@pytest.mark.parametrize("failure", [PLANTED, PeerError("no room")], ids=["a bug", "refused"])
def test_memory_that_the_data_path_refuses_is_forgotten(failure: Exception) -> None:
    """That it is unmapped and its fd closed is seen by the plugin."""
    node = Buffers()
    backend = BlockBackend(node, "test", writable=True)
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 65536)
    message = Frontend().set_mem_table([MemoryRegion(0, 65536, 1 << 40, 0)], [fd])
    with suppress(RuntimeError):
        run(make_device(backend), message.encode(), (fd,), failure)
    os.close(fd)
    asyncio.run(backend.close())
    assert node.most == 1
    assert node.announced == []


def test_bug_in_an_action_does_not_cost_the_fds_of_the_message(device: BlkDevice) -> None:
    """That they are closed is seen by the plugin, which counts them."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 65536)
    message = Frontend().set_mem_table([MemoryRegion(0, 65536, 1 << 40, 0)], [fd])
    with pytest.raises(RuntimeError, match="planted"):
        run(device, message.encode(), (fd,))
    os.close(fd)


def test_session_that_ends_while_an_in_flight_region_is_made_does_not_keep_its_fd(
    device: BlkDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it is closed is seen by the plugin, which counts them."""
    logs: list[DirtyLog] = []

    class Log(DirtyLog):
        def __init__(self, size: int, offset: int, fd: int) -> None:
            super().__init__(size, offset, fd)
            logs.append(self)

    def create(size: int) -> int:
        """An engine thread marks a page that is not in the log, just now."""
        logs[0].marks.mark(1 << 40, 1)
        assert logs[0].lost
        return create_file(size)

    monkeypatch.setattr(front_end, "DirtyLog", Log)
    monkeypatch.setattr(front_end, "create_file", create)
    protocol = ProtocolFeature.LOG_SHMFD | ProtocolFeature.INFLIGHT_SHMFD
    says, fd = Frontend(), os.memfd_create("log")
    says.protocol_offered = protocol
    os.ftruncate(fd, 4096)
    run(
        device,
        says.set_log_base(4096, 0, fd).encode(),
        (fd,),
        before=says.set_protocol_features(protocol).encode(),
        after=says.get_inflight_fd(1, 128).encode(),
    )
    os.close(fd)
    assert len(logs) == 1
