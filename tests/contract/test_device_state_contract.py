"""Device status and device state on a daemon, whatever moves the data."""

from __future__ import annotations

import pytest

from tests.daemons import ALL_PATHS, CAPACITY, Disks, eventually, finish, split_ring
from vhostblk.client.client import Client
from vhostblk.client.control import PROTOCOL_FEATURES
from vhostblk.errors import PeerError
from vhostblk.vhost.device_state import DeviceState
from vhostblk.vhost.device_status import NEEDS_RESET
from vhostblk.vhost.message import ProtocolFeature
from vhostblk.virtio.blk import RequestType

pytestmark = ALL_PATHS

DRIVER_OK = 15
NEWER = PROTOCOL_FEATURES | ProtocolFeature.STATUS | ProtocolFeature.DEVICE_STATE


def connect(disks: Disks, export: str = "disk") -> Client:
    return disks.connect(export, protocol_features=NEWER)


def is_working(client: Client) -> bool:
    """The disks have been used by others before."""
    client.write(0, b"w" * 512)
    return client.read(0, 512) == b"w" * 512


def test_status_tells_of_a_broken_queue_until_it_is_stopped(disks: Disks) -> None:
    with connect(disks) as client:
        client.control.ask(client.control.frontend.set_status(DRIVER_OK))
        assert client.control.status() == DRIVER_OK
        driver = split_ring(client)
        driver.write_avail_idx(driver.size + 1000)  # further ahead than the ring is long
        client.queues[0].kick()
        client.wait_broken()
        # The error fd is signalled by the thread that serves the queue, the status is the control loop's.
        needs_reset = DRIVER_OK | NEEDS_RESET
        eventually(lambda: client.control.status() == needs_reset, "it needs a reset")
        client.stop_queue(0)
        assert client.control.status() == DRIVER_OK


def test_status_zero_stops_the_queues_and_keeps_the_mode_that_the_driver_has_set(
    disks: Disks,
) -> None:
    with connect(disks) as client:
        features = client.control.features
        client.set_writeback(False)
        pending = client.submit(RequestType.IN, 0, room=512)
        finish(
            client, [pending]
        )  # what the queue has not taken yet when it is stopped stays in the ring
        control = client.control
        control.ask(control.frontend.set_status(0))
        client._started.clear()
        control.set_features(features)
        client.start_queue(0)
        assert client.read_config().writeback == 0
        assert is_working(client)


def test_mode_of_the_write_cache_goes_to_the_next_device(disks: Disks) -> None:
    with connect(disks) as client:
        client.set_writeback(False)
        client.stop_queue(0)
        state = client.control.save_device_state()
    with connect(disks, "direct") as client:
        assert client.read_config().writeback == 1
        client.stop_queue(0)
        client.control.load_device_state(state)
        client.start_queue(0)
        assert client.read_config().writeback == 0
        client.write(0, b"x" * 512)
        client.reset_device()
        assert client.read_config().writeback == 1
        client.make_queues(1, 128)
        client.start_queue(0, 0)


def test_write_through_that_a_driver_was_told_of_binds_a_device_that_was_made_with_a_cache(
    disks: Disks,
) -> None:
    with connect(disks, "write-through") as client:
        client.stop_queue(0)
        told = client.control.save_device_state()
    with connect(disks) as client:
        client.stop_queue(0)
        cached = client.control.save_device_state()
        client.control.load_device_state(told)
        assert client.read_config().writeback == 0
        client.reset_device()
        client.make_queues(1, 128)
        client.start_queue(0, 0)
    # And the other way round a driver that flushes may find a device that has nothing to flush.
    with connect(disks, "write-through") as client:
        client.stop_queue(0)
        client.control.load_device_state(cached)
        assert client.read_config().writeback == 0


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"nonsense" * 3,
        DeviceState(CAPACITY, True, False).pack()[:-1],
        DeviceState(CAPACITY, True, False).pack() + bytes(4096),
        DeviceState(CAPACITY + 512, True, False).pack(),  # of a larger disk
    ],
)
def test_state_that_makes_no_sense_is_refused_and_the_device_works_on(
    disks: Disks, state: bytes
) -> None:
    with connect(disks) as client:
        client.stop_queue(0)
        with pytest.raises(PeerError, match="CHECK_DEVICE_STATE"):
            client.control.load_device_state(state)
        client.start_queue(0)
        assert is_working(client)


def test_state_of_a_device_in_use_is_refused(disks: Disks) -> None:
    with connect(disks) as client:
        with pytest.raises(PeerError, match="0x101"):
            client.control.save_device_state()
        assert is_working(client)
