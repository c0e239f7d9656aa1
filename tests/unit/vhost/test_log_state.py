"""The log of dirty memory in a session: what is said when, and what that makes its caller do."""

from __future__ import annotations

import pytest

from tests.unit.vhost.sessions import FEATURES, PROTOCOL_BIT, SessionPair
from vhostblk.errors import PeerError, SessionError
from vhostblk.vhost.action import (
    CloseFds,
    ResetDevice,
    SetFeatures,
    SetLogArea,
    SetLogFd,
    SetLogging,
    SetVringLog,
    StartVring,
    StopVring,
)
from vhostblk.vhost.message import (
    U64,
    LogArea,
    Message,
    ProtocolFeature,
    Request,
    VringAddress,
)
from vhostblk.vhost.session import PROTOCOL_FEATURES
from vhostblk.vhost.vring import VringFd
from vhostblk.virtio.features import Feature

LOG = ProtocolFeature.LOG_SHMFD
LOG_ALL = int(Feature.VHOST_F_LOG_ALL)
NEED_REPLY = 9
RING = {"desc": 0x10000, "avail": 0x20000, "used": 0x30000}


@pytest.fixture
def pair() -> SessionPair:
    return SessionPair()


def test_log_is_offered_with_its_feature_bit_or_not_at_all() -> None:
    for features in (PROTOCOL_FEATURES, PROTOCOL_FEATURES & ~LOG):
        pair = SessionPair(protocol_features=features, negotiate=features)
        offered = pair.ask(pair.frontend.get_features())
        assert isinstance(offered, U64)
        assert bool(offered.value & LOG_ALL) == bool(features & LOG)


def test_log_goes_to_the_caller_and_is_answered_once_it_is_in_use(pair: SessionPair) -> None:
    fd = pair.fd()
    message = pair.frontend.set_log_base(0x2000, 0x1000, fd)
    assert pair.tell(message) == [SetLogArea(0x2000, 0x1000, fd)]
    assert pair.open_fds() == []
    # One answer, whether or not an acknowledgement was asked for besides.
    reply = pair.deliver(Message(Request.SET_LOG_BASE, NEED_REPLY, message.payload, (pair.fd(),)))
    assert reply is not None
    assert reply.payload == U64(0)


def test_log_that_cannot_be_used_ends_the_session_because_the_answer_cannot_say_no(
    pair: SessionPair,
) -> None:
    pair.failure = PeerError("too short")
    with pytest.raises(SessionError, match="too short"):
        pair.tell(pair.frontend.set_log_base(1, 0, pair.fd()))
    assert pair.open_fds() == []


@pytest.mark.parametrize("count", [0, 2])
def test_session_refuses_logs_without_their_one_fd(pair: SessionPair, count: int) -> None:
    reply = pair.deliver(Message(Request.SET_LOG_FD, NEED_REPLY, fds=pair.fds(count)))
    assert reply is not None
    assert reply.payload == U64(1)
    message = Message(Request.SET_LOG_BASE, NEED_REPLY, LogArea(4096, 0), pair.fds(count))
    with pytest.raises(SessionError, match="fds where 1 belong"):
        pair.deliver(message)
    assert pair.open_fds() == []


def test_logging_is_turned_on_and_off_while_rings_run(pair: SessionPair) -> None:
    features = FEATURES | PROTOCOL_BIT
    assert pair.tell(pair.frontend.set_features(features)) == [SetFeatures(FEATURES)]
    pair.start()
    for enabled in (True, False, True):
        wanted = features | (LOG_ALL if enabled else 0)
        for expected in ([SetLogging(enabled)], []):
            actions = pair.tell(pair.frontend.set_features(wanted))
            assert actions == [SetFeatures(FEATURES), *expected]
    assert pair.session.features == FEATURES  # it is nothing that the device hears of


def test_used_ring_of_a_running_vring_is_logged_and_not_logged(pair: SessionPair) -> None:
    pair.start()
    for log in (0x40000, 0x50000, 0, None, 0x40000):
        for expected in ([SetVringLog(0, log)], []):
            assert pair.tell(pair.frontend.set_vring_addr(0, **RING, log=log)) == expected


def test_used_ring_that_is_logged_from_the_start_comes_with_it(pair: SessionPair) -> None:
    pair.describe()
    assert pair.tell(pair.frontend.set_vring_addr(0, **RING, log=0x40000)) == []
    (action,) = pair.tell(pair.frontend.set_vring_fd(0, VringFd.KICK, pair.fd()))
    assert isinstance(action, StartVring)
    assert action.vring.log_gpa == 0x40000


@pytest.mark.parametrize("flags", [2, 3, 1 << 31])
def test_session_refuses_unknown_flags_of_vring_addresses(pair: SessionPair, flags: int) -> None:
    address = VringAddress(0, flags, 0x10000, 0x30000, 0x20000, 0)
    reply = pair.deliver(Message(Request.SET_VRING_ADDR, NEED_REPLY, address))
    assert reply is not None
    assert reply.payload == U64(1)


def test_session_refuses_a_used_ring_at_the_end_of_all_addresses(pair: SessionPair) -> None:
    with pytest.raises(PeerError):
        pair.tell(pair.frontend.set_vring_addr(0, **RING, log=2**64 - 16))


def test_session_refuses_everything_about_a_log_that_was_not_agreed_on() -> None:
    features = PROTOCOL_FEATURES & ~LOG
    pair = SessionPair(protocol_features=features, negotiate=features, strict=False)
    with pytest.raises(PeerError):
        pair.tell(pair.frontend.set_vring_addr(0, **RING, log=0x40000))
    with pytest.raises(PeerError):
        pair.tell(pair.frontend.set_log_fd(pair.fd()))
    with pytest.raises(PeerError):
        pair.tell(pair.frontend.set_features(FEATURES | PROTOCOL_BIT | LOG_ALL))
    with pytest.raises(SessionError):
        pair.tell(pair.frontend.set_log_base(1, 0, pair.fd()))
    assert pair.open_fds() == []


def test_eventfd_of_the_log_is_closed_when_it_is_out_of_use(pair: SessionPair) -> None:
    first, second = pair.fd(), pair.fd()
    assert pair.tell(pair.frontend.set_log_fd(first)) == [SetLogFd(first)]
    assert pair.open_fds() == [first, second]
    assert pair.tell(pair.frontend.set_log_fd(second)) == [SetLogFd(second)]
    assert pair.open_fds() == [second]
    _, kick = pair.start()
    assert pair.session.close() == (
        StopVring(0),
        CloseFds((kick,)),
        SetLogFd(None),
        CloseFds((second,)),
    )


def test_reset_ends_logging(pair: SessionPair) -> None:
    pair.tell(pair.frontend.set_features(FEATURES | PROTOCOL_BIT | LOG_ALL))
    actions = pair.tell(pair.frontend.request(Request.RESET_DEVICE))
    assert actions == [ResetDevice(), SetLogging(False)]
