"""Status and state of the device, as the session takes them."""

from __future__ import annotations

import pytest

from tests.unit.vhost.sessions import SessionPair
from vhostblk.errors import PeerError
from vhostblk.vhost.action import (
    CheckState,
    LoadState,
    SaveState,
    SetFeatures,
    SetLogging,
    StopVring,
)
from vhostblk.vhost.device_status import NEEDS_RESET
from vhostblk.vhost.message import U64, DeviceStateTransfer, Message, Request

NEED_REPLY = 9
DRIVER_OK = 4


@pytest.fixture
def pair() -> SessionPair:
    return SessionPair()


def status(pair: SessionPair) -> int:
    payload = pair.ask(pair.frontend.get_status())
    assert isinstance(payload, U64)
    return payload.value


def test_status_is_what_was_written_last(pair: SessionPair) -> None:
    assert status(pair) == 0
    for value in (1, 3, 11, 15):
        assert pair.tell(pair.frontend.set_status(value)) == []
        assert status(pair) == value


def test_status_of_more_than_eight_bits_is_refused_and_changes_nothing(pair: SessionPair) -> None:
    pair.tell(pair.frontend.set_status(DRIVER_OK))
    with pytest.raises(PeerError):
        pair.tell(pair.frontend.set_status(0x100))
    assert status(pair) == DRIVER_OK


def test_device_with_a_broken_queue_needs_a_reset_until_that_is_stopped(pair: SessionPair) -> None:
    pair.start(1)
    pair.tell(pair.frontend.set_status(DRIVER_OK))
    pair.session.vring_broke(1)
    assert status(pair) == DRIVER_OK | NEEDS_RESET
    # A driver that adds a bit to what it has read does not set this one.
    pair.tell(pair.frontend.set_status(DRIVER_OK | NEEDS_RESET | 128))
    pair.ask(pair.frontend.get_vring_base(1))
    assert status(pair) == DRIVER_OK | 128


def test_reset_device_resets_the_status(pair: SessionPair) -> None:
    pair.start()
    pair.tell(pair.frontend.set_status(DRIVER_OK))
    pair.session.vring_broke(0)
    pair.tell(pair.frontend.request(Request.RESET_DEVICE))
    assert status(pair) == 0


def test_status_zero_stops_what_runs_and_forgets_the_features(pair: SessionPair) -> None:
    pair.tell(pair.frontend.set_features(pair.session._agreed.offered))
    _, kick = pair.start(2)
    pair.session.vring_broke(2)
    actions = pair.tell(pair.frontend.set_status(0))
    assert actions == [StopVring(2), SetFeatures(0), SetLogging(False)]
    assert kick in pair.closed
    assert pair.session.features == 0
    assert not pair.session.vrings[2].is_started
    assert status(pair) == 0


def test_state_is_saved_to_a_borrowed_fd_and_loaded_from_one_that_is_given_away(
    pair: SessionPair,
) -> None:
    fd = pair.fd()
    assert pair.tell(pair.frontend.set_device_state_fd(fd, load=False)) == [SaveState(fd)]
    assert fd in pair.closed
    fd = pair.fd()
    assert pair.tell(pair.frontend.set_device_state_fd(fd, load=True)) == [LoadState(fd)]
    assert fd not in pair.closed
    assert pair.tell(pair.frontend.check_device_state()) == [CheckState()]


def test_reply_says_that_no_fd_comes_back(pair: SessionPair) -> None:
    message = pair.frontend.set_device_state_fd(pair.fd(), load=False)
    assert pair.ask(message) == U64(0x100)
    assert pair.ask(pair.frontend.check_device_state()) == U64(0)


@pytest.mark.parametrize("transfer", [DeviceStateTransfer(2, 0), DeviceStateTransfer(0, 1)])
def test_unknown_ways_and_phases_are_refused_by_a_reply(
    pair: SessionPair, transfer: DeviceStateTransfer
) -> None:
    message = Message(Request.SET_DEVICE_STATE_FD, 1, transfer, (pair.fd(),))
    assert pair.deliver(message) == message.reply(U64(0x101))
    assert pair.open_fds() == []


@pytest.mark.parametrize("load", [False, True])
def test_state_of_a_device_that_runs_is_refused(pair: SessionPair, load: bool) -> None:
    _, kick = pair.start()
    message = pair.frontend.set_device_state_fd(pair.fd(), load=load)
    assert pair.deliver(message) == message.reply(U64(0x101))
    assert pair.open_fds() == [kick]


def test_failed_transfer_is_told_in_the_reply_and_the_session_lives(pair: SessionPair) -> None:
    pair.failure = PeerError("no room")
    message = pair.frontend.set_device_state_fd(pair.fd(), load=False)
    assert pair.deliver(message) == message.reply(U64(0x101))
    pair.failure = PeerError("not whole")
    message = pair.frontend.check_device_state()
    assert pair.deliver(message) == message.reply(U64(1))
