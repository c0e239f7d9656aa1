"""The front-end role: which requests are answered, and what answers it takes."""

from __future__ import annotations

import pytest

from vhostblk.errors import PeerError, SessionError, StateError
from vhostblk.vhost.frontend import Frontend
from vhostblk.vhost.message import (
    U64,
    ConfigSpace,
    Decoder,
    Empty,
    Malformed,
    Message,
    ProtocolFeature,
    Raw,
    Request,
    VringState,
)
from vhostblk.vhost.vring import VringFd

ALL = ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG | ProtocolFeature.MQ


@pytest.fixture
def frontend() -> Frontend:
    frontend = Frontend()
    frontend.set_protocol_features(ALL)
    return frontend


def test_acknowledgements_are_asked_for_once_they_are_negotiated() -> None:
    frontend = Frontend()
    assert not frontend.set_vring_num(0, 8).needs_reply
    assert not frontend.expects_reply
    assert not frontend.set_protocol_features(ALL).needs_reply
    assert not frontend.expects_reply
    assert frontend.set_vring_num(0, 8).needs_reply
    assert frontend.expects_reply


def test_answers_are_taken_in_the_order_of_the_requests(frontend: Frontend) -> None:
    first, second = frontend.get_features(), frontend.set_vring_num(0, 8)
    assert frontend.receive(first.reply(U64(7))) == U64(7)
    assert frontend.features_offered == 7
    assert frontend.receive(second.reply(U64(0))) == U64(0)
    with pytest.raises(StateError, match="nothing was asked"):
        frontend.receive(second.reply(U64(0)))


def test_offered_protocol_features_are_learnt(frontend: Frontend) -> None:
    frontend.receive(frontend.get_protocol_features().reply(U64(8)))
    assert frontend.protocol_offered is ProtocolFeature.REPLY_ACK


def test_non_zero_acknowledgement_is_a_refusal(frontend: Frontend) -> None:
    message = frontend.set_vring_enable(0, True)
    with pytest.raises(PeerError, match="SET_VRING_ENABLE was refused"):
        frontend.receive(message.reply(U64(1)))


def test_refusal_of_a_request_without_a_row_is_understood() -> None:
    frontend = Frontend(strict=False)
    frontend.set_protocol_features(ALL)
    message = frontend.request(Request.SET_STATUS, U64(1))
    (reply,) = Decoder().feed(message.reply(U64(1)).encode())
    with pytest.raises(PeerError, match="SET_STATUS was refused"):
        frontend.receive(reply)


@pytest.mark.parametrize(
    "reply",
    [
        Message(Request.GET_VRING_BASE, 5, U64(0)),
        Message(Request.GET_FEATURES, 1, U64(0)),
        Message(Request.GET_FEATURES, 5, U64(0), (10,)),
        Message(Request.GET_FEATURES, 5, Malformed("too short")),
    ],
)
def test_anything_but_the_answer_ends_the_session(frontend: Frontend, reply: Message) -> None:
    frontend.get_features()
    with pytest.raises(SessionError):
        frontend.receive(reply)


@pytest.mark.parametrize(
    "config",
    [ConfigSpace(0, 4, 0, b"abcd"), ConfigSpace(8, 3, 0, b"abc"), ConfigSpace(8, 4, 0, b"")],
)
def test_configuration_of_another_size_or_place_ends_the_session(
    frontend: Frontend, config: ConfigSpace
) -> None:
    message = frontend.get_config(8, 4)
    with pytest.raises(SessionError, match="GET_CONFIG"):
        frontend.receive(message.reply(config))


def test_empty_configuration_is_a_refusal(frontend: Frontend) -> None:
    with pytest.raises(PeerError, match="refused"):
        frontend.receive(frontend.get_config(0, 4).reply(Empty()))


def test_strict_front_end_does_not_misbehave(frontend: Frontend) -> None:
    with pytest.raises(StateError, match="no row"):
        frontend.request(Request.IOTLB_MSG)
    with pytest.raises(StateError, match="wrong payload"):
        frontend.request(Request.SET_FEATURES, VringState(0, 0))
    with pytest.raises(StateError, match="0 fds where 1"):
        frontend.request(Request.SET_BACKEND_REQ_FD)
    with pytest.raises(StateError, match="RESET_DEVICE"):
        frontend.request(Request.RESET_DEVICE)
    assert not frontend.expects_reply


def test_other_front_ends_send_what_they_are_told_to() -> None:
    frontend = Frontend(strict=False)
    assert frontend.request(Request.SET_FEATURES, VringState(0, 0), [10]).fds == (10,)
    assert frontend.raw(99, 0xFF, b"abc", [11]) == Message(99, 0xFF, Raw(b"abc"), (11,))


def test_vring_fd_is_passed_or_declared_missing(frontend: Frontend) -> None:
    assert frontend.set_vring_fd(1, VringFd.CALL, 10).fds == (10,)
    polled = frontend.set_vring_fd(1, VringFd.KICK, None)
    assert (polled.fds, polled.payload.pack()[:2]) == ((), b"\x01\x01")
