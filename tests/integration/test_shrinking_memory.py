"""Files that a front-end shares, and shrinks while its memory map changes: SIGBUS at the worst of times.

Guest memory, the log of dirty memory and the in-flight region; regions come and go meanwhile, with requests in flight.
It costs the session. The fixture `disks` checks the daemon after every test.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from tests.daemons import BOTH_PATHS, Disks, eventually
from tests.integration.test_hostile_memory import is_over, leave, next_client_is_served, shrinking
from vhostblk.client.client import FEATURES, Client
from vhostblk.errors import PeerError, SessionError
from vhostblk.virtio.blk import RequestType
from vhostblk.virtio.driver import Buffer
from vhostblk.virtio.features import Feature

pytestmark = BOTH_PATHS

FORMATS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


@pytest.fixture
def fd() -> Iterator[int]:
    """A file that is large enough for a log, or an in-flight region."""
    fd = os.memfd_create("shrinks")
    os.ftruncate(fd, 1 << 20)
    yield fd
    os.close(fd)


def connect(disks: Disks, export: str, packed: bool) -> Client:
    return shrinking(
        disks, export, features=FEATURES | (Feature.VIRTIO_F_RING_PACKED if packed else 0)
    )


def make_requests(client: Client) -> None:
    for i in range(16):
        client.submit(RequestType.IN, i * 65536, room=65536, notify=False)


def notify(client: Client) -> None:
    client.queues[0].driver.publish()
    client.queues[0].kick()


def shrink_rings(client: Client, _fd: int) -> None:
    make_requests(client)
    client.queues[0].driver.publish()
    client.memory.regions[0].truncate(0)
    client.queues[0].kick()


def shrink_data(client: Client, _fd: int) -> None:
    make_requests(client)
    client.memory.regions[1].truncate(0)
    notify(client)


def shrink_log(client: Client, fd: int) -> None:
    client.control.ask(client.control.frontend.set_log_base(1 << 20, 0, fd))
    client.control.set_features(client.control.features | Feature.VHOST_F_LOG_ALL)
    make_requests(client)
    os.ftruncate(fd, 0)
    notify(client)


def shrink_inflight(client: Client, fd: int) -> None:
    assert client.inflight is not None
    for index in (0, 1):
        client.stop_queue(index)
    description = client.inflight.description
    client.control.ask(client.control.frontend.set_inflight_fd(description, fd))
    for index in (0, 1):
        client.start_queue(index)
    make_requests(client)
    os.ftruncate(fd, 0)
    notify(client)


FILES: dict[str, Callable[[Client, int], None]] = {
    "rings": shrink_rings,
    "data": shrink_data,
    "log": shrink_log,
    "in-flight region": shrink_inflight,
}


@FORMATS
@pytest.mark.parametrize("export", ["disk", "pinned", "slow"])
@pytest.mark.parametrize("file", FILES)
def test_file_that_shrinks_while_memory_comes_and_goes_costs_the_session(
    disks: Disks, fd: int, file: str, export: str, packed: bool
) -> None:
    with disks.connect("memory") as other:
        client = connect(disks, export, packed)
        try:
            FILES[file](client, fd)
            for _ in range(4):
                region = client.add_memory(1 << 16)
                client.control.remove_region(region)
        except (SessionError, PeerError):
            pass  # sooner or later
        eventually(lambda: is_over(client), "the end of the session")
        assert len(other.read(0, 4096)) == 4096
        leave(client)
        next_client_is_served(disks, export)
        assert len(other.read(0, 4096)) == 4096


@FORMATS
@pytest.mark.parametrize("export", ["slow", "pinned"])
def test_region_that_shrinks_while_it_is_removed_costs_the_session_at_most(
    disks: Disks, export: str, packed: bool
) -> None:
    """The answer waits for requests in flight, which write to what is not there any more."""
    client = connect(disks, export, packed)
    make_requests(client)
    notify(client)
    region = client.memory.regions[1]
    client.control.connection.send(client.control.frontend.rem_mem_reg(region.description))
    region.truncate(0)
    try:
        client.control.frontend.receive(client.control.receive())
        client.control.get_config(0, 8)
    except (SessionError, PeerError):
        pass
    leave(client)
    next_client_is_served(disks, export)


@FORMATS
def test_region_that_has_shrunk_can_be_replaced(disks: Disks, packed: bool) -> None:
    """Nobody has touched what is lost: taking the region away, and giving a new one in its place, is all right."""
    client = connect(disks, "disk", packed)
    region = client.memory.regions[1]
    region.truncate(0)
    client.control.remove_region(region)
    region.truncate(region.size)
    client.control.add_region(region)
    client.memory.write(region.gpa, b"#" * 4096)
    assert client.memory.read(Buffer(region.gpa, 4096)) == b"#" * 4096
    assert len(client.read(0, 65536)) == 65536
    client.close()
