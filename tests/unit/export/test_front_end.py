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
from vhostblk.block.backend import BlockBackend
from vhostblk.errors import PeerError
from vhostblk.export.blk_device import BlkDevice
from vhostblk.export.error_log import ErrorLog
from vhostblk.export.front_end import FrontEnd
from vhostblk.export.ownership import Ownership
from vhostblk.export.python_path import PythonDataPath
from vhostblk.export.stats_page import StatsPage
from vhostblk.vhost.connection import Connection
from vhostblk.vhost.frontend import Frontend
from vhostblk.vhost.mem_table import MemTable
from vhostblk.vhost.payload import MemoryRegion
from vhostblk.virtio.features import Feature

PLANTED = RuntimeError("planted")
LOG = logging.LoggerAdapter(logging.getLogger(__name__))


class Path(PythonDataPath):
    """Fails when it is given memory."""

    def __init__(self, device: BlkDevice, failure: Exception) -> None:
        super().__init__(device, self, StatsPage.private("test", 1))
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
) -> Path:
    """A front-end says this and leaves."""
    path = Path(device, failure)

    async def session() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            if data:
                socket.send_fds(theirs, [data], fds)
        front_end = FrontEnd(
            Connection(ours), device, path, 1, LOG, ErrorLog(LOG), ownership(device)
        )
        await front_end.run()

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
