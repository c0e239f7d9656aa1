"""In-flight regions: their layout, who may say what of them, and which part is which ring's."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest

from tests.unit.vhost.sessions import PROTOCOL_BIT, SessionPair
from vhostblk.errors import PeerError
from vhostblk.vhost.action import (
    CreateInflight,
    ForgetInflight,
    MapInflight,
    ResetDevice,
    StartVring,
    StopVring,
)
from vhostblk.vhost.device_note import NOTE_SIZE, DeviceNote
from vhostblk.vhost.device_state import DeviceState
from vhostblk.vhost.inflight import (
    MAX_PARTS,
    PACKED_ENTRY,
    PACKED_HEADER,
    SPLIT_ENTRY,
    SPLIT_HEADER,
    VERSION_OFFSET,
    InflightState,
    part_size,
)
from vhostblk.vhost.message import InflightDescription, Message, ProtocolFeature, Request
from vhostblk.vhost.session import PROTOCOL_FEATURES, Session
from vhostblk.vhost.vring import VringFd
from vhostblk.virtio.features import Feature

# The largest ring is 256, as `SessionPair` has them.
REGION = InflightDescription(4 * part_size(256, packed=False), 0, 4, 256)


class DescStateSplit(ctypes.Structure):
    """As the specification has it."""

    _fields_ = (
        ("inflight", ctypes.c_uint8),
        ("padding", ctypes.c_uint8 * 5),
        ("next", ctypes.c_uint16),
        ("counter", ctypes.c_uint64),
    )


class QueueRegionSplit(ctypes.Structure):
    """As the specification has it."""

    _fields_ = (
        ("features", ctypes.c_uint64),
        ("version", ctypes.c_uint16),
        ("desc_num", ctypes.c_uint16),
        ("last_batch_head", ctypes.c_uint16),
        ("used_idx", ctypes.c_uint16),
        ("desc", DescStateSplit * 3),
    )


class DescStatePacked(ctypes.Structure):
    """As the specification has it."""

    _fields_ = (
        ("inflight", ctypes.c_uint8),
        ("padding", ctypes.c_uint8),
        ("next", ctypes.c_uint16),
        ("last", ctypes.c_uint16),
        ("num", ctypes.c_uint16),
        ("counter", ctypes.c_uint64),
        ("id", ctypes.c_uint16),
        ("flags", ctypes.c_uint16),
        ("len", ctypes.c_uint32),
        ("addr", ctypes.c_uint64),
    )


class QueueRegionPacked(ctypes.Structure):
    """As the specification has it."""

    _fields_ = (
        ("features", ctypes.c_uint64),
        ("version", ctypes.c_uint16),
        ("desc_num", ctypes.c_uint16),
        ("free_head", ctypes.c_uint16),
        ("old_free_head", ctypes.c_uint16),
        ("used_idx", ctypes.c_uint16),
        ("old_used_idx", ctypes.c_uint16),
        ("used_wrap_counter", ctypes.c_uint8),
        ("old_used_wrap_counter", ctypes.c_uint8),
        ("padding", ctypes.c_uint8 * 7),
        ("desc", DescStatePacked * 3),
    )


def fields(structure: ctypes.Structure, names: list[str]) -> list[int]:
    """Set each field to a number of its own; give the numbers."""
    values = [17 * (i + 1) for i in range(len(names))]
    for name, value in zip(names, values, strict=True):
        setattr(structure, name, value)
    return values


@pytest.mark.parametrize("kind", [QueueRegionSplit, QueueRegionPacked])
def test_layout_is_that_of_the_structures_that_a_compiler_makes(
    kind: type[QueueRegionSplit] | type[QueueRegionPacked],
) -> None:
    region = kind()
    packed = isinstance(region, QueueRegionPacked)
    header, entry = (PACKED_HEADER, PACKED_ENTRY) if packed else (SPLIT_HEADER, SPLIT_ENTRY)
    leave = ("desc", "padding")
    of_header = fields(region, [f[0] for f in kind._fields_ if f[0] not in leave])
    of_entry = fields(region.desc[2], [f[0] for f in region.desc[2]._fields_ if f[0] not in leave])
    data = bytes(region)
    assert list(header.unpack_from(data)) == of_header
    assert list(entry.unpack_from(data, header.size + 2 * entry.size)) == of_entry
    assert int.from_bytes(data[VERSION_OFFSET : VERSION_OFFSET + 2], "little") == region.version


@pytest.mark.parametrize("size", [2**n for n in range(16)])
def test_parts_are_as_large_as_those_of_libvhost_user(size: int) -> None:
    # It reserves two bytes, not sixteen, for the header; rounding up makes that the same.
    theirs = -(-(16 * size + 2) // 64) * 64
    assert part_size(size, packed=False) == theirs
    assert part_size(size, packed=True) >= ctypes.sizeof(DescStatePacked) * (size + 1)
    assert part_size(size, packed=True) % 64 == 0


# ---------------------------------------------------------------------- a session


def ask(pair: SessionPair, asked: InflightDescription) -> tuple[InflightDescription, int]:
    """GET_INFLIGHT_FD; give the answer, and how many fds came."""
    message = pair.frontend.request(Request.GET_INFLIGHT_FD, asked)
    reply = pair.deliver(message)
    assert reply is not None
    answer = pair.frontend.receive(reply)
    assert isinstance(answer, InflightDescription)
    return answer, len(reply.fds)


def share(pair: SessionPair, region: InflightDescription = REGION) -> None:
    """SET_INFLIGHT_FD, which has to succeed."""
    fd = pair.fd()
    (action,) = pair.tell(pair.frontend.set_inflight_fd(region, fd))
    assert isinstance(action, MapInflight)
    assert replace(action, note=None) == MapInflight(region.mmap_offset, region.mmap_size, fd)
    assert pair.open_fds() == []


@pytest.fixture
def pair() -> SessionPair:
    return SessionPair()


@pytest.mark.parametrize("packed", [False, True])
def test_session_answers_with_a_file_of_the_size_that_the_rings_need(packed: bool) -> None:
    session = Session(
        device_features=int(Feature.VIRTIO_F_RING_PACKED), num_queues=4, config_size=0
    )
    features = int(Feature.VIRTIO_F_RING_PACKED) if packed else 0
    pair = SessionPair(negotiate=None)
    pair.session = session
    pair.tell(pair.frontend.set_protocol_features(ProtocolFeature.INFLIGHT_SHMFD))
    pair.tell(pair.frontend.set_features(features | PROTOCOL_BIT))
    answer, fds = ask(pair, InflightDescription(0, 0, 4, 128))
    assert fds == 1
    assert answer == InflightDescription(4 * part_size(128, packed=packed) + NOTE_SIZE, 0, 4, 128)


def test_session_makes_the_file_by_an_action_and_keeps_nothing(pair: SessionPair) -> None:
    message = pair.frontend.get_inflight_fd(2, 64)
    actions = pair.session.receive(message)
    assert actions == (CreateInflight(2 * part_size(64, packed=False) + NOTE_SIZE),)
    reply = pair.session.complete(7)
    assert reply is not None
    assert reply.fds == (7,)
    pair.frontend.receive(reply)
    # Only the front-end decides whether it is used.
    pair.describe()
    (action,) = pair.tell(pair.frontend.set_vring_fd(0, VringFd.KICK, pair.fd()))
    assert isinstance(action, StartVring)
    assert action.vring.inflight is None


@pytest.mark.parametrize(
    ("num_queues", "queue_size"), [(0, 128), (MAX_PARTS + 1, 128), (1, 0), (1, 32769)]
)
def test_session_refuses_to_track_impossible_rings_by_a_size_of_zero(
    pair: SessionPair, num_queues: int, queue_size: int
) -> None:
    asked = InflightDescription(99, 99, num_queues, queue_size)
    assert ask(pair, asked) == (InflightDescription(0, 0, num_queues, queue_size), 0)
    refused = replace(asked, mmap_size=1 << 20, mmap_offset=0)
    with pytest.raises(PeerError):
        pair.tell(pair.frontend.set_inflight_fd(refused, pair.fd()))
    assert pair.open_fds() == []


def test_session_says_so_if_the_file_cannot_be_made(pair: SessionPair) -> None:
    pair.failure = PeerError("no memory")
    assert ask(pair, InflightDescription(0, 0, 1, 128)) == (InflightDescription(0, 0, 1, 128), 0)


def test_request_without_padding_is_answered_without_padding(pair: SessionPair) -> None:
    asked = InflightDescription(0, 0, 1, 128, is_padded=False)
    answer, _ = ask(pair, asked)
    assert len(answer.pack()) == 20


@pytest.mark.parametrize(
    "wrong",
    [
        replace(REGION, mmap_size=REGION.mmap_size - 1),
        replace(REGION, mmap_size=1 << 40),
        replace(REGION, mmap_offset=4),
        replace(REGION, queue_size=300),
        replace(REGION, num_queues=5),
    ],
)
def test_session_refuses_regions_that_cannot_be(
    pair: SessionPair, wrong: InflightDescription
) -> None:
    share(pair)
    with pytest.raises(PeerError, match="refused"):
        pair.tell(pair.frontend.set_inflight_fd(wrong, pair.fd()))
    assert pair.open_fds() == []
    (action, *_), _ = pair.start(3)
    assert isinstance(action, StartVring)  # the one before is still in use
    assert action.vring.inflight == range(3 * REGION.mmap_size // 4, REGION.mmap_size)


def test_region_with_room_for_more_at_a_place_of_its_own_is_taken(pair: SessionPair) -> None:
    share(pair, replace(REGION, mmap_size=REGION.mmap_size + 4096, mmap_offset=8))


def test_each_ring_has_its_part(pair: SessionPair) -> None:
    share(pair)
    size = part_size(256, packed=False)
    for index in range(4):
        (action, *_), _ = pair.start(index)
        assert isinstance(action, StartVring)
        assert action.vring.inflight == range(index * size, (index + 1) * size)


@pytest.mark.parametrize(
    "region",
    [
        InflightDescription(1 * part_size(256, packed=False), 0, 1, 256),
        InflightDescription(4 * part_size(128, packed=False), 0, 4, 128),
    ],
)
def test_session_does_not_start_rings_that_the_region_has_no_room_for(
    pair: SessionPair, region: InflightDescription
) -> None:
    share(pair, region)
    pair.describe(1)
    with pytest.raises(PeerError, match="refused"):
        pair.tell(pair.frontend.set_vring_fd(1, VringFd.KICK, pair.fd()))
    assert not pair.session.vrings[1].is_started
    assert pair.open_fds() == []


def test_part_of_another_format_than_the_region_was_made_for_is_not_used() -> None:
    state = InflightState()
    state.adopt(REGION, packed=False)
    assert state.part(0, 256, packed=True) == range(part_size(256, packed=True))
    with pytest.raises(PeerError, match="ends before"):
        state.part(3, 256, packed=True)


def test_region_cannot_be_exchanged_while_a_ring_is_started(pair: SessionPair) -> None:
    share(pair)
    pair.start(1)
    with pytest.raises(PeerError, match="refused"):
        pair.tell(pair.frontend.set_inflight_fd(REGION, pair.fd()))
    pair.tell(pair.frontend.get_vring_base(1))
    share(pair)


def test_reset_forgets_what_was_in_flight_but_not_where(pair: SessionPair) -> None:
    share(pair)
    size = part_size(256, packed=False)
    actions = pair.tell(pair.frontend.request(Request.RESET_DEVICE))
    versions = tuple(i * size + VERSION_OFFSET for i in range(4))
    assert actions == [ResetDevice(), ForgetInflight(versions)]
    (action, *_), _ = pair.start(0)
    assert isinstance(action, StartVring)
    assert action.vring.inflight == range(size)


def test_session_that_ends_stops_tracked_rings_as_all_others(pair: SessionPair) -> None:
    share(pair)
    pair.start(2)
    assert StopVring(2) in pair.session.close()


def test_requests_without_the_feature_are_refused() -> None:
    pair = SessionPair(negotiate=PROTOCOL_FEATURES & ~ProtocolFeature.INFLIGHT_SHMFD, strict=False)
    assert ask(pair, InflightDescription(0, 0, 1, 128))[1] == 0
    reply = pair.deliver(Message(Request.SET_INFLIGHT_FD, 9, REGION, (pair.fd(),)))
    assert reply is not None
    assert reply.payload.pack() != bytes(8)
    assert pair.open_fds() == []


# ---------------------------------------------------------------- behind the rings' parts


def mapped(pair: SessionPair, region: InflightDescription) -> MapInflight:
    """What the session makes of a region."""
    (action,) = pair.tell(pair.frontend.set_inflight_fd(region, pair.fd()))
    assert isinstance(action, MapInflight)
    return action


def test_note_is_at_the_end_of_a_region_that_has_room_for_it(pair: SessionPair) -> None:
    size = REGION.mmap_size
    assert mapped(pair, REGION).note is None
    assert mapped(pair, replace(REGION, mmap_size=size + NOTE_SIZE)).note == size
    assert mapped(pair, replace(REGION, mmap_size=size + 4096)).note == size + 4096 - NOTE_SIZE
    odd = mapped(pair, replace(REGION, mmap_size=size + NOTE_SIZE + 7))
    assert odd.note == size


def test_part_of_a_ring_never_has_the_note_in_it() -> None:
    state = InflightState()
    size = 2 * part_size(256, packed=False) + NOTE_SIZE
    state.adopt(InflightDescription(size, 0, 2, 256), packed=False)
    assert state.note == size - NOTE_SIZE
    exact = part_size(256, packed=True)
    state.adopt(InflightDescription(exact + 8, 0, 1, 256), packed=False)
    with pytest.raises(PeerError):
        state.part(0, 256, packed=True)


@pytest.mark.parametrize("writeback", [False, True])
@pytest.mark.parametrize("is_drivers", [False, True])
def test_note_is_read_as_it_was_written(writeback: bool, is_drivers: bool) -> None:
    note = DeviceNote(memoryview(bytearray(NOTE_SIZE)))
    assert note.read() is None
    state = DeviceState(3 << 30, writeback, is_drivers)
    note.write(state)
    assert note.read() == state


def test_note_that_makes_no_sense_is_none() -> None:
    memory = bytearray(NOTE_SIZE)
    note = DeviceNote(memoryview(memory))
    note.write(DeviceState(512, writeback=True, is_drivers=False))
    for bit in range(64):
        if bit not in (0, 1):  # the flags
            memory[bit // 8] ^= 1 << bit % 8
            assert note.read() is None
            memory[bit // 8] ^= 1 << bit % 8
    assert note.read() is not None
