"""The back-end's state machine: what each message makes it do, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.vhost.sessions import CONFIG, FEATURES, PROTOCOL_BIT, SessionPair
from vhostblk.errors import PeerError, SessionError, StateError
from vhostblk.vhost import session as session_module
from vhostblk.vhost.action import (
    AddRegion,
    CloseFds,
    EnableVring,
    MapMemory,
    ReadConfig,
    RemoveRegion,
    ResetDevice,
    SetBackendChannel,
    SetFeatures,
    SetVringFd,
    StartVring,
    StopVring,
    WriteConfig,
)
from vhostblk.vhost.inflight import part_size
from vhostblk.vhost.message import (
    FRONTEND_TABLE,
    U64,
    BackendRequest,
    ConfigSpace,
    DeviceStateTransfer,
    Empty,
    Gate,
    InflightDescription,
    LogArea,
    MemoryRegion,
    MemoryTable,
    Message,
    Payload,
    ProtocolFeature,
    Raw,
    Request,
    Row,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
)
from vhostblk.vhost.session import PROTOCOL_FEATURES, Session
from vhostblk.vhost.vring import VringFd, VringSnapshot
from vhostblk.virtio.features import Feature

REGION = MemoryRegion(gpa=0, size=0x1000, uva=0x7000_0000, mmap_offset=0)
NEED_REPLY = 9
_BOTH_WAYS = ProtocolFeature.GET_VRING_BASE_INFLIGHT | ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN
ROWS = list(FRONTEND_TABLE.values())


def payload_of(row: Row) -> Payload:
    """One that the request may have."""
    return {
        Empty: Empty(),
        U64: U64(int(PROTOCOL_FEATURES) if row.request is Request.SET_PROTOCOL_FEATURES else 0),
        MemoryTable: MemoryTable((REGION,)),
        SingleRegion: SingleRegion(REGION),
        LogArea: LogArea(4096, 0),
        VringState: VringState(1, 1),
        VringAddress: VringAddress(1, 0, 16, 16, 16, 0),
        VringFile: VringFile(1, has_fd=row.fds[0] > 0),
        DeviceStateTransfer: DeviceStateTransfer(0, 0),
        ConfigSpace: ConfigSpace(32, 1, 0, b"\1"),
        InflightDescription: InflightDescription(part_size(8, packed=False), 0, 1, 8),
    }[row.payload]


def refuses(pair: SessionPair, row: Row, payload: Payload, fds: int, match: str) -> None:
    """In the way that the request has for it, and nothing of it stays open."""
    message = Message(row.request, NEED_REPLY, payload, pair.fds(fds))
    if row.reply is None:
        assert is_nack(pair.deliver(message))
    elif row.reply is ConfigSpace:
        assert pair.deliver(message) == message.reply(Empty())
    elif row.refusal is not None:
        assert pair.deliver(message) == message.reply(U64(row.refusal))
    elif isinstance(payload, InflightDescription):
        assert pair.deliver(message) == message.reply(replace(payload, mmap_size=0))
    else:
        with pytest.raises(SessionError, match=match):
            pair.deliver(message)
    assert pair.open_fds() == []


def named(row: Row) -> str:
    """A test by its request."""
    return row.request.name


@pytest.fixture
def pair() -> SessionPair:
    return SessionPair()


def is_nack(reply: Message | None) -> bool:
    return reply is not None and reply.is_reply and reply.payload.pack() == U64(1).pack()


# ---------------------------------------------------------------------- the table


def test_every_row_of_the_table_has_a_handler_and_no_handler_lacks_a_row() -> None:
    assert set(session_module._HANDLERS) == set(FRONTEND_TABLE)


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_session_refuses_every_request_with_more_fds_than_its_row_allows(
    pair: SessionPair, row: Row
) -> None:
    refuses(pair, row, payload_of(row), row.fds[1] + 1, "fds where")


@pytest.mark.parametrize("row", [row for row in ROWS if row.fds[0]], ids=named)
def test_session_refuses_every_request_that_lacks_its_fd(pair: SessionPair, row: Row) -> None:
    refuses(pair, row, payload_of(row), 0, "0 fds where")


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_session_refuses_every_request_with_a_payload_of_the_wrong_size(
    pair: SessionPair, row: Row
) -> None:
    refuses(pair, row, Raw(b"12345"), 1, "5 bytes")


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.feature and row.gate is Gate.NEGOTIATED], ids=named
)
def test_session_refuses_requests_whose_feature_is_not_negotiated(row: Row) -> None:
    pair = SessionPair(negotiate=ProtocolFeature.REPLY_ACK, strict=False)
    refuses(pair, row, payload_of(row), row.fds[0], "not negotiated")


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.feature and row.gate is Gate.OFFERED], ids=named
)
def test_requests_whose_feature_need_only_be_offered_are_served_before_negotiation(
    row: Row,
) -> None:
    pair = SessionPair(negotiate=None)
    reply = pair.deliver(Message(row.request, 1, Empty(), pair.fds(row.fds[0])))
    assert (reply is not None) == (row.reply is not None)


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_a_reply_in_the_place_of_any_request_ends_the_session(row: Row) -> None:
    pair = SessionPair()
    fd = pair.fd()
    with pytest.raises(SessionError, match="reply where a request"):
        pair.deliver(Message(row.request, 5 | 8, Raw(bytes(8)), (fd,)))
    assert pair.open_fds() == []


@pytest.mark.parametrize(
    "request_number",
    [int(r) for r in Request if r not in FRONTEND_TABLE] + [0, 46, 2**32 - 1],
)
def test_unknown_and_unserved_requests_are_refused_and_the_session_lives(
    pair: SessionPair, request_number: int
) -> None:
    message = Message(request_number, NEED_REPLY, Raw(b"?" * 24), (pair.fd(), pair.fd()))
    assert is_nack(pair.deliver(message))
    assert pair.open_fds() == []
    log_all = int(Feature.VHOST_F_LOG_ALL)
    assert pair.ask(pair.frontend.get_features()) == U64(FEATURES | PROTOCOL_BIT | log_all)


def test_unknown_request_that_asks_for_no_acknowledgement_ends_the_session(
    pair: SessionPair,
) -> None:
    with pytest.raises(SessionError, match="not supported"):
        pair.deliver(Message(999, 1, Raw(b""), (pair.fd(),)))
    assert pair.open_fds() == []
    with pytest.raises(StateError, match="over"):
        pair.session.receive(Message(Request.GET_FEATURES))


# ---------------------------------------------------------------------- order and acknowledgements


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_acknowledgement_comes_if_asked_for_and_never_beside_another_reply(row: Row) -> None:
    acked, silent = SessionPair(), SessionPair()
    for pair, flags in ((acked, NEED_REPLY), (silent, 1)):
        if row.request is Request.SET_VRING_KICK:
            pair.describe(1)
        message = Message(row.request, flags, payload_of(row), pair.fds(row.fds[0]))
        reply = pair.deliver(message)
        if row.reply is not None:
            assert reply is not None
            assert isinstance(reply.payload, row.reply)
        elif flags == NEED_REPLY:
            assert reply == Message(row.request, 5, U64(0))
        else:
            assert reply is None


def test_acknowledgement_is_not_sent_unless_it_was_negotiated() -> None:
    pair = SessionPair(negotiate=ProtocolFeature.MQ)
    assert pair.deliver(Message(Request.SET_OWNER, NEED_REPLY)) is None


def test_message_that_negotiates_acknowledgements_can_ask_for_one() -> None:
    pair = SessionPair(negotiate=None)
    features = U64(int(ProtocolFeature.REPLY_ACK))
    reply = pair.deliver(Message(Request.SET_PROTOCOL_FEATURES, NEED_REPLY, features))
    assert reply is not None
    assert reply.payload == U64(0)


def test_failed_action_is_told_to_the_front_end(pair: SessionPair) -> None:
    pair.failure = PeerError("no such memory")
    with pytest.raises(PeerError, match="SET_MEM_TABLE was refused"):
        pair.tell(pair.frontend.set_mem_table([REGION], [pair.fd()]))
    assert pair.open_fds() == []


def test_failed_action_that_cannot_be_told_ends_the_session() -> None:
    pair = SessionPair(negotiate=ProtocolFeature.MQ)
    pair.failure = PeerError("no such memory")
    with pytest.raises(SessionError, match="no such memory"):
        pair.tell(pair.frontend.set_mem_table([REGION], [pair.fd()]))
    assert pair.open_fds() == []


def test_failed_get_config_is_answered_by_an_empty_payload(pair: SessionPair) -> None:
    pair.failure = PeerError("gone")
    with pytest.raises(PeerError, match="GET_CONFIG was refused"):
        pair.ask(pair.frontend.get_config(0, 4))


def test_next_message_waits_for_the_one_before(pair: SessionPair) -> None:
    pair.session.receive(Message(Request.SET_OWNER))
    with pytest.raises(StateError, match="SET_OWNER is not complete"):
        pair.session.receive(Message(Request.SET_OWNER))
    assert pair.session.complete() is None
    with pytest.raises(StateError):
        pair.session.complete()


def test_refusal_is_there_for_the_log(pair: SessionPair) -> None:
    assert pair.session.receive(Message(999, NEED_REPLY, Raw(b""))) == ()
    assert "request 999" in str(pair.session.refusal)
    pair.session.complete()
    assert pair.session.refusal is None


# ---------------------------------------------------------------------- negotiation


def test_features_are_offered_with_the_protocol_bit(pair: SessionPair) -> None:
    log_all = int(Feature.VHOST_F_LOG_ALL)
    assert pair.ask(pair.frontend.get_features()) == U64(FEATURES | PROTOCOL_BIT | log_all)
    assert pair.ask(pair.frontend.get_protocol_features()) == U64(int(PROTOCOL_FEATURES))


def test_constants_are_answered(pair: SessionPair) -> None:
    assert pair.ask(pair.frontend.request(Request.GET_QUEUE_NUM)) == U64(4)
    assert pair.ask(pair.frontend.request(Request.GET_MAX_MEM_SLOTS)) == U64(40)


def test_default_number_of_memory_slots_is_generous() -> None:
    assert session_module.MAX_MEM_SLOTS >= 32


def test_set_features_tells_the_device_virtio_s_bits_only(pair: SessionPair) -> None:
    bits = FEATURES | PROTOCOL_BIT
    assert pair.tell(pair.frontend.set_features(bits)) == [SetFeatures(FEATURES)]
    assert pair.session.features == FEATURES


def test_set_features_may_be_repeated(pair: SessionPair) -> None:
    for _ in range(3):
        assert pair.tell(pair.frontend.set_features(PROTOCOL_BIT)) == [SetFeatures(0)]


@pytest.mark.parametrize("bit", [0, 25, 34, 63])
def test_session_refuses_features_that_were_not_offered(pair: SessionPair, bit: int) -> None:
    with pytest.raises(PeerError):
        pair.tell(pair.frontend.set_features(FEATURES | 1 << bit))
    assert pair.session.features == 0


def test_any_layout_is_tolerated_since_qemu_passes_it_on_unasked(pair: SessionPair) -> None:
    bits = FEATURES | PROTOCOL_BIT | int(Feature.VIRTIO_F_ANY_LAYOUT)
    assert pair.tell(pair.frontend.set_features(bits)) == [SetFeatures(FEATURES)]


def test_session_refuses_other_features_while_a_vring_is_started(pair: SessionPair) -> None:
    pair.tell(pair.frontend.set_features(FEATURES | PROTOCOL_BIT))
    pair.start()
    assert pair.tell(pair.frontend.set_features(FEATURES | PROTOCOL_BIT)) == [SetFeatures(FEATURES)]
    with pytest.raises(PeerError):
        pair.tell(pair.frontend.set_features(PROTOCOL_BIT))
    assert pair.session.features == FEATURES


@pytest.mark.parametrize("bit", [2, 4, 8, 14, 17, 21, 22, 40])
def test_session_refuses_protocol_features_that_were_not_offered(bit: int) -> None:
    pair = SessionPair()
    with pytest.raises(PeerError):
        pair.ask(
            pair.frontend.request(
                Request.SET_PROTOCOL_FEATURES, U64(int(PROTOCOL_FEATURES) | 1 << bit)
            )
        )
    assert pair.session.protocol_features == PROTOCOL_FEATURES


@pytest.mark.parametrize(
    ("agreed", "skip_drain", "suspends"),
    [
        (ProtocolFeature.NONE, False, False),
        (ProtocolFeature.GET_VRING_BASE_INFLIGHT, False, True),
        (_BOTH_WAYS, False, False),
        (_BOTH_WAYS, True, True),
    ],
)
def test_session_lets_requests_stay_in_flight_when_the_front_end_says_so(
    pair: SessionPair, agreed: ProtocolFeature, skip_drain: bool, suspends: bool
) -> None:
    protocol = (PROTOCOL_FEATURES & ~_BOTH_WAYS) | agreed
    pair.tell(pair.frontend.set_protocol_features(protocol))
    pair.start(0)
    assert pair.tell(pair.frontend.get_vring_base(0, skip_drain=skip_drain)) == [
        StopVring(0, suspends)
    ]


def test_session_refuses_to_skip_a_drain_that_was_not_negotiated(pair: SessionPair) -> None:
    pair.tell(pair.frontend.set_protocol_features(PROTOCOL_FEATURES & ~_BOTH_WAYS))
    with pytest.raises(SessionError):
        pair.tell(pair.frontend.get_vring_base(0, skip_drain=True))


@pytest.mark.parametrize("count", [0, 257])
def test_impossible_numbers_of_vrings_are_our_own_mistake(count: int) -> None:
    with pytest.raises(ValueError, match="vrings"):
        Session(device_features=0, num_queues=count, config_size=0)


def test_protocol_features_that_are_not_served_cannot_be_offered() -> None:
    with pytest.raises(ValueError, match="not all served"):
        Session(
            device_features=0,
            num_queues=1,
            config_size=0,
            protocol_features=ProtocolFeature.PAGEFAULT,
        )


# ---------------------------------------------------------------------- memory


def test_memory_table_goes_to_the_caller_and_its_fds_are_closed(pair: SessionPair) -> None:
    fds = (pair.fd(), pair.fd())
    actions = pair.tell(pair.frontend.set_mem_table([REGION, REGION], fds))
    assert actions == [MapMemory((REGION, REGION), fds)]
    assert pair.open_fds() == []


@pytest.mark.parametrize(("regions", "fds"), [(2, 1), (1, 2), (0, 1), (0, 0), (8, 7)])
def test_session_refuses_mem_table_with_fewer_or_more_fds_than_regions(
    pair: SessionPair, regions: int, fds: int
) -> None:
    table = MemoryTable((REGION,) * regions)
    message = Message(Request.SET_MEM_TABLE, NEED_REPLY, table, pair.fds(fds))
    assert is_nack(pair.deliver(message))
    assert pair.open_fds() == []


def test_single_regions_are_added_and_removed(pair: SessionPair) -> None:
    fd = pair.fd()
    assert pair.tell(pair.frontend.add_mem_reg(REGION, fd)) == [AddRegion(REGION, fd)]
    assert pair.tell(pair.frontend.rem_mem_reg(REGION)) == [RemoveRegion(REGION)]
    assert pair.open_fds() == []


def test_fd_that_comes_with_rem_mem_reg_is_closed(pair: SessionPair) -> None:
    message = Message(Request.REM_MEM_REG, NEED_REPLY, SingleRegion(REGION), (pair.fd(),))
    reply = pair.deliver(message)
    assert reply is not None
    assert reply.payload == U64(0)
    assert pair.open_fds() == []


# ---------------------------------------------------------------------- vrings


def test_vring_starts_with_its_kick_fd_and_knows_all_that_came_before(pair: SessionPair) -> None:
    call, err = pair.fd(), pair.fd()
    assert pair.tell(pair.frontend.set_vring_fd(2, VringFd.CALL, call)) == []
    assert pair.tell(pair.frontend.set_vring_fd(2, VringFd.ERR, err)) == []
    actions, kick = pair.start(2)
    snapshot = VringSnapshot(
        index=2,
        size=256,
        base=7,
        desc=0x10000,
        avail=0x20000,
        used=0x30000,
        kick_fd=kick,
        call_fd=call,
        err_fd=err,
        enabled=False,
    )
    assert actions == [StartVring(2, snapshot)]
    assert pair.session.vrings[2].is_started
    assert pair.open_fds() == sorted([call, err, kick])


def test_vring_without_kick_fd_starts_and_is_polled(pair: SessionPair) -> None:
    pair.describe()
    (action,) = pair.tell(pair.frontend.set_vring_fd(0, VringFd.KICK, None))
    assert isinstance(action, StartVring)
    assert action.vring.kick_fd is None


def test_vring_that_was_enabled_before_starts_enabled(pair: SessionPair) -> None:
    assert pair.tell(pair.frontend.set_vring_enable(0, True)) == []
    (action,), _ = pair.start()
    assert isinstance(action, StartVring)
    assert action.vring.enabled


def test_vring_is_enabled_and_disabled_once_each(pair: SessionPair) -> None:
    pair.start()
    for enabled in (True, False):
        expected = [EnableVring(0, enabled)]
        assert pair.tell(pair.frontend.set_vring_enable(0, enabled)) == expected
        assert pair.tell(pair.frontend.set_vring_enable(0, enabled)) == []
        assert pair.session.vrings[0].is_enabled is enabled


def test_vrings_are_enabled_at_once_without_protocol_features() -> None:
    pair = SessionPair(negotiate=None)
    pair.start(1)
    assert pair.tell(pair.frontend.set_features(0)) == [SetFeatures(0), EnableVring(1, True)]
    (action,), _ = pair.start(2)
    assert isinstance(action, StartVring)
    assert action.vring.enabled


def test_session_refuses_enable_with_anything_but_zero_and_one(pair: SessionPair) -> None:
    message = Message(Request.SET_VRING_ENABLE, NEED_REPLY, VringState(0, 2))
    assert is_nack(pair.deliver(message))


def test_session_refuses_kick_for_a_vring_whose_addresses_were_never_set(
    pair: SessionPair,
) -> None:
    pair.tell(pair.frontend.set_vring_num(0, 8))
    with pytest.raises(PeerError):
        pair.tell(pair.frontend.set_vring_fd(0, VringFd.KICK, pair.fd()))
    assert pair.open_fds() == []
    assert not pair.session.vrings[0].is_started


def test_vring_that_failed_to_start_can_be_started_again(pair: SessionPair) -> None:
    pair.failure = PeerError("outside guest memory")
    with pytest.raises(PeerError):
        pair.start()
    assert not pair.session.vrings[0].is_started
    actions, kick = pair.start()
    assert isinstance(actions[0], StartVring)
    assert pair.open_fds() == [kick]


@pytest.mark.parametrize(
    "message",
    [
        Message(Request.SET_VRING_NUM, NEED_REPLY, VringState(0, 128)),
        Message(Request.SET_VRING_BASE, NEED_REPLY, VringState(0, 1)),
        Message(Request.SET_VRING_ADDR, NEED_REPLY, VringAddress(0, 0, 16, 16, 16, 0)),
    ],
    ids=lambda message: message.name(),
)
def test_session_refuses_to_change_a_started_vring(pair: SessionPair, message: Message) -> None:
    pair.start()
    assert is_nack(pair.deliver(message))


def test_session_refuses_sizes_and_addresses_that_cannot_be(pair: SessionPair) -> None:
    for payload in (VringState(0, 100), VringState(0, 65536)):
        assert is_nack(pair.deliver(Message(Request.SET_VRING_NUM, NEED_REPLY, payload)))
    for address in (VringAddress(0, 0, 8, 16, 16, 0), VringAddress(0, 2, 16, 16, 16, 0)):
        assert is_nack(pair.deliver(Message(Request.SET_VRING_ADDR, NEED_REPLY, address)))
    message = Message(Request.SET_VRING_BASE, NEED_REPLY, VringState(0, 0x10000))
    assert is_nack(pair.deliver(message))


@pytest.mark.parametrize("index", [4, 255, 2**32 - 1])
def test_session_refuses_vrings_beyond_their_number(pair: SessionPair, index: int) -> None:
    for request in (Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ENABLE):
        assert is_nack(pair.deliver(Message(request, NEED_REPLY, VringState(index, 1))))
    address = VringAddress(index, 0, 16, 16, 16, 0)
    assert is_nack(pair.deliver(Message(Request.SET_VRING_ADDR, NEED_REPLY, address)))
    for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        message = Message(request, NEED_REPLY, VringFile(index & 0xFF), (pair.fd(),))
        assert is_nack(pair.deliver(message))
    assert pair.open_fds() == []
    with pytest.raises(SessionError, match=f"vring {index} of 4"):
        pair.deliver(Message(Request.GET_VRING_BASE, NEED_REPLY, VringState(index, 0)))


@pytest.mark.parametrize("request_number", [12, 13, 14])
@pytest.mark.parametrize("has_fd", [True, False])
def test_session_refuses_vring_fds_that_contradict_bit_eight(
    pair: SessionPair, request_number: int, has_fd: bool
) -> None:
    pair.describe()
    fds = () if has_fd else (pair.fd(),)
    assert is_nack(pair.deliver(Message(request_number, NEED_REPLY, VringFile(0, has_fd), fds)))
    assert pair.open_fds() == []


@pytest.mark.parametrize("which", list(VringFd))
def test_fd_of_a_started_vring_is_exchanged_before_the_old_one_is_closed(
    pair: SessionPair, which: VringFd
) -> None:
    old, new = pair.fd(), pair.fd()
    pair.start()
    pair.tell(pair.frontend.set_vring_fd(0, which, old))
    message = pair.frontend.set_vring_fd(0, which, new)
    actions = pair.session.receive(message)
    assert actions == (SetVringFd(0, which, new), CloseFds((old,)))
    pair.session.complete()
    assert pair.session.receive(pair.frontend.set_vring_fd(0, which, None)) == (
        SetVringFd(0, which, None),
        CloseFds((new,)),
    )


def test_call_fd_may_be_set_several_times_before_the_start(pair: SessionPair) -> None:
    fds = [pair.fd() for _ in range(3)]
    for fd in fds:
        assert pair.tell(pair.frontend.set_vring_fd(0, VringFd.CALL, fd)) == []
    assert pair.open_fds() == fds[2:]
    actions, kick = pair.start()
    assert isinstance(actions[0], StartVring)
    assert actions[0].vring.call_fd == fds[2]
    assert kick


def test_get_vring_base_stops_closes_the_kick_fd_and_answers_where_it_stopped(
    pair: SessionPair,
) -> None:
    call = pair.fd()
    pair.tell(pair.frontend.set_vring_fd(0, VringFd.CALL, call))
    _, kick = pair.start()
    pair.base = 0xABCD
    message = pair.frontend.get_vring_base(0)
    assert pair.session.receive(message) == (StopVring(0), CloseFds((kick,)))
    assert pair.session.complete(0xABCD) == message.reply(VringState(0, 0xABCD))
    assert not pair.session.vrings[0].is_started
    pair.frontend.receive(message.reply(VringState(0, 0xABCD)))
    assert pair.ask(pair.frontend.get_vring_base(0)) == VringState(0, 0xABCD)


def test_get_vring_base_of_a_stopped_vring_answers_what_was_set(pair: SessionPair) -> None:
    pair.tell(pair.frontend.set_vring_base(3, 99))
    assert pair.ask(pair.frontend.get_vring_base(3)) == VringState(3, 99)


def test_call_and_err_fds_outlive_a_stop_since_qemu_sends_the_latter_once(
    pair: SessionPair,
) -> None:
    call, err = pair.fd(), pair.fd()
    pair.tell(pair.frontend.set_vring_fd(0, VringFd.CALL, call))
    pair.tell(pair.frontend.set_vring_fd(0, VringFd.ERR, err))
    pair.start()
    pair.tell(pair.frontend.get_vring_base(0))
    assert pair.open_fds() == [call, err]
    actions, _ = pair.start()
    assert isinstance(actions[0], StartVring)
    assert (actions[0].vring.call_fd, actions[0].vring.err_fd) == (call, err)


def test_reset_owner_disables_the_rings_and_does_no_more(pair: SessionPair) -> None:
    pair.start(0)
    pair.start(1)
    pair.tell(pair.frontend.set_vring_enable(1, True))
    assert pair.tell(pair.frontend.request(Request.RESET_OWNER)) == [EnableVring(1, False)]
    assert pair.session.vrings[0].is_started
    assert pair.session.vrings[1].is_started


def test_reset_device_stops_all_rings_but_keeps_what_qemu_sends_only_once(
    pair: SessionPair,
) -> None:
    err = pair.fd()
    pair.tell(pair.frontend.set_features(FEATURES | PROTOCOL_BIT))
    pair.tell(pair.frontend.set_vring_fd(0, VringFd.ERR, err))
    pair.start(0)
    pair.start(1)
    assert pair.tell(pair.frontend.request(Request.RESET_DEVICE)) == [ResetDevice()]
    assert pair.open_fds() == [err]
    assert pair.session.features == 0
    assert pair.session.protocol_features == PROTOCOL_FEATURES
    assert not any(v.is_started or v.is_enabled for v in pair.session.vrings)
    with pytest.raises(PeerError):
        pair.tell(pair.frontend.set_vring_fd(0, VringFd.KICK, pair.fd()))


def test_close_stops_what_runs_and_gives_up_every_fd(pair: SessionPair) -> None:
    call = pair.fd()
    pair.tell(pair.frontend.set_vring_fd(3, VringFd.CALL, call))
    _, kick = pair.start(1)
    assert pair.session.close() == (StopVring(1), CloseFds((kick, call)))
    assert pair.session.close() == ()


def test_close_counts_a_vring_that_was_just_starting_as_started(pair: SessionPair) -> None:
    pair.describe()
    kick = pair.fd()
    pair.session.receive(pair.frontend.set_vring_fd(0, VringFd.KICK, kick))
    assert pair.session.close() == (StopVring(0), CloseFds((kick,)))


# ---------------------------------------------------------------------- configuration space


@pytest.mark.parametrize(("offset", "size"), [(0, 96), (0, 60), (32, 1), (95, 1), (8, 4)])
def test_get_config_honours_the_offset_and_answers_the_size_that_was_asked(
    pair: SessionPair, offset: int, size: int
) -> None:
    message = pair.frontend.get_config(offset, size)
    assert pair.session.receive(message) == (ReadConfig(offset, size),)
    reply = pair.session.complete(CONFIG[offset : offset + size])
    assert reply is not None
    assert len(reply.encode()) == 12 + 12 + size
    config = pair.frontend.receive(reply)
    assert config == ConfigSpace(offset, size, 0, CONFIG[offset : offset + size])


@pytest.mark.parametrize(("offset", "size"), [(0, 97), (96, 1), (95, 2), (2**32 - 1, 1)])
def test_get_config_beyond_the_end_is_answered_by_an_empty_payload(
    pair: SessionPair, offset: int, size: int
) -> None:
    message = Message(Request.GET_CONFIG, 1, ConfigSpace(offset, size, 0, bytes(size)))
    assert pair.deliver(message) == message.reply(Empty())


def test_driver_may_write_the_writable_byte(pair: SessionPair) -> None:
    assert pair.tell(pair.frontend.set_config(32, b"\0")) == [WriteConfig(32, b"\0", False)]


@pytest.mark.parametrize(("offset", "size"), [(31, 1), (33, 1), (31, 2), (32, 2), (0, 96)])
def test_driver_may_write_nothing_else(pair: SessionPair, offset: int, size: int) -> None:
    with pytest.raises(PeerError):
        pair.tell(pair.frontend.set_config(offset, bytes(size)))


def test_migration_may_write_anything_that_the_device_then_compares(pair: SessionPair) -> None:
    message = pair.frontend.set_config(0, CONFIG, migration=True)
    assert pair.tell(message) == [WriteConfig(0, CONFIG, True)]


@pytest.mark.parametrize(
    "config",
    [
        ConfigSpace(32, 1, 2, b"\0"),
        ConfigSpace(32, 1, 0, b""),
        ConfigSpace(96, 1, 1, b"\0"),
        ConfigSpace(2**32 - 1, 1, 1, b"\0"),
    ],
)
def test_session_refuses_set_config_with_unknown_flags_no_data_or_beyond_the_end(
    pair: SessionPair, config: ConfigSpace
) -> None:
    assert is_nack(pair.deliver(Message(Request.SET_CONFIG, NEED_REPLY, config)))


# ---------------------------------------------------------------------- the back-end's own messages


def test_back_end_channel_is_given_away(pair: SessionPair) -> None:
    fd = pair.fd()
    assert pair.tell(pair.frontend.set_backend_req_fd(fd)) == [SetBackendChannel(fd)]
    assert pair.session.close() == ()


def test_config_change_is_told_once_and_not_before_a_vring_runs(pair: SessionPair) -> None:
    pair.tell(pair.frontend.set_backend_req_fd(pair.fd()))
    pair.session.config_changed()
    assert pair.session.take_backend_message() is None
    pair.start()
    assert pair.session.take_backend_message() == Message(BackendRequest.CONFIG_CHANGE_MSG)
    assert pair.session.take_backend_message() is None
    pair.session.config_changed()
    assert pair.session.take_backend_message() is not None


@pytest.mark.parametrize("missing", [ProtocolFeature.CONFIG, ProtocolFeature.BACKEND_REQ])
def test_config_change_is_not_told_to_a_front_end_that_did_not_negotiate_it(
    missing: ProtocolFeature,
) -> None:
    pair = SessionPair(negotiate=PROTOCOL_FEATURES & ~missing)
    pair.tell(pair.frontend.set_backend_req_fd(pair.fd()))
    pair.start()
    pair.session.config_changed()
    assert pair.session.take_backend_message() is None


def test_config_change_is_not_told_without_a_channel(pair: SessionPair) -> None:
    pair.start()
    pair.session.config_changed()
    assert pair.session.take_backend_message() is None
