"""Checks of in-flight tracking: what one back-end has left in flight, the next one finishes.

vhost-user, "Inflight I/O tracking". What a back-end leaves that is killed is written by hand here, so
that nobody has to kill one, for split rings; those that stop without a drain leave it by themselves.
"""

from __future__ import annotations

from vhostblk.client.client import FEATURES
from vhostblk.client.conformance.check import Check, check, collect, expect, skip
from vhostblk.client.conformance.guest import Guest
from vhostblk.client.conformance.rig import Rig
from vhostblk.client.queue import Pending
from vhostblk.errors import PeerError, SessionError
from vhostblk.vhost.inflight import (
    PACKED_ENTRY,
    PACKED_HEADER,
    SPLIT_ENTRY,
    SPLIT_HEADER,
    VERSION,
    part_size,
)
from vhostblk.vhost.message import ProtocolFeature
from vhostblk.virtio.blk import RequestType
from vhostblk.virtio.features import Feature

__all__ = ["CHECKS", "HOSTILE"]

_SPEC = "vhost-user, Inflight I/O tracking"
_TRACKS = ProtocolFeature.INFLIGHT_SHMFD
_PACKED = int(Feature.VIRTIO_F_RING_PACKED)
_SKIPS = ProtocolFeature.GET_VRING_BASE_INFLIGHT | ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN
_SKIP = "vhost-user, VHOST_USER_GET_VRING_BASE_SKIP_DRAIN"
_SIZE = 64


def _guest(rig: Rig) -> Guest:
    """A guest whose ring 0 is stopped, and was served before."""
    guest = rig.guest(without=_PACKED, queue_size=_SIZE)
    try:
        if guest.client.inflight is None:
            skip("the back-end makes no file")
        guest.client.get_id()
        guest.client.stop_queue(0)
    except BaseException:
        guest.client.abandon()
        guest.client.close()
        raise
    return guest


def _view(guest: Guest) -> memoryview:
    assert guest.client.inflight is not None
    return guest.client.inflight.view


def _marks(guest: Guest) -> int:
    step = SPLIT_ENTRY.size
    return sum(bytes(_view(guest)[SPLIT_HEADER.size : SPLIT_HEADER.size + _SIZE * step : step]))


def _reads(rig: Rig, guest: Guest, count: int, left: int) -> list[Pending]:
    """Reads in the ring, of which somebody who is dead has taken `left`."""
    driver = guest.driver()
    pending = []
    for order in range(count):
        request = guest.client.submit(RequestType.IN, 0, room=rig.block, notify=False)
        pending.append(request)
        if order < left:
            head = driver.newest_head
            fields = (1, 0, order)
            SPLIT_ENTRY.pack_into(
                _view(guest), SPLIT_HEADER.size + head * SPLIT_ENTRY.size, *fields
            )
    driver.publish()
    return pending


def _resume(guest: Guest) -> None:
    guest.client.start_queue(0, guest.driver().visible_base)


@check("inflight.file", "GET_INFLIGHT_FD gives zeroes, with room for the rings", _SPEC,
       protocol=_TRACKS)  # fmt: skip
def file_of_zeroes(rig: Rig) -> str:
    with rig.guest(without=_PACKED, queues=0) as guest:
        file = guest.control.create_inflight(2, 128)
        if file is None:
            skip("the back-end makes no file")
        assert file is not None
        try:
            size = file.description.mmap_size
            # libvhost-user counts two bytes for the header, not sixteen; rounded up that is the same.
            least = 2 * part_size(128, packed=False)
            expect(size >= least, f"{size} bytes, {least} are needed")
            expect(not any(file.view), "it is not zero")
        finally:
            file.close()
    return f"{size} bytes for 2 rings of 128"


@check("inflight.stopped", "a ring that was stopped has nothing in flight", _SPEC,
       protocol=_TRACKS)  # fmt: skip
def stopped_has_nothing(rig: Rig) -> None:
    with _guest(rig) as guest:
        version = SPLIT_HEADER.unpack_from(_view(guest))[1]
        expect(version == VERSION, f"version {version}")
        expect(not _marks(guest), f"{_marks(guest)} are marked")


@check("inflight.resubmitted", "what was left in flight is completed once, and so is the rest", _SPEC,
       protocol=_TRACKS)  # fmt: skip
def left_is_resubmitted(rig: Rig) -> None:
    for left in (1, 4, 8):
        with _guest(rig) as guest:
            pending = _reads(rig, guest, 8, left)
            _resume(guest)
            guest.client.wait(pending)
            failed = [p.status for p in pending if p.status]
            expect(not failed, f"{left} in flight: status {failed}")
            base = guest.client.stop_queue(0)
            expected = guest.driver().avail_idx
            expect(base == expected, f"{left} in flight: stopped at {base}, not {expected}")
            expect(not _marks(guest), f"{left} in flight: {_marks(guest)} still marked")


@check("inflight.first", "requests are resubmitted also if none had been completed before", _SPEC,
       protocol=_TRACKS)  # fmt: skip
def first_is_resubmitted(rig: Rig) -> None:
    with rig.guest(without=_PACKED, queue_size=_SIZE) as guest:
        guest.client.stop_queue(0)
        if guest.client.inflight is None:
            skip("the back-end makes no file")
        SPLIT_HEADER.pack_into(_view(guest), 0, 0, VERSION, _SIZE, 0, 0)
        pending = _reads(rig, guest, 3, 2)
        _resume(guest)
        guest.client.wait(pending)
        expect(not any(p.status for p in pending), "some failed")


def _suspended(rig: Rig, *, packed: bool) -> str:
    """Stop a ring again and again while it is busy, and see what becomes of its requests."""
    features = FEATURES | _PACKED if packed else FEATURES & ~_PACKED
    left = 0
    with rig.guest(features=features, queue_size=_SIZE) as guest:
        if guest.client.inflight is None:
            skip("the back-end makes no file")
        for _ in range(10):
            pending = [guest.client.submit(RequestType.IN, 0, room=rig.block) for _ in range(16)]
            guest.client.stop_queue(0, skip_drain=True)
            guest.client.poll()
            left += sum(not p.is_done for p in pending)
            guest.client.start_queue(0, guest.client.queues[0].driver.visible_base)
            guest.client.wait(pending)
            failed = [p.status for p in pending if p.status]
            expect(not failed, f"status {failed}")
        expect(guest.client.queues[0].driver.in_flight == 0, "some came twice")
    return f"{left} of 160 requests were left in flight"


@check("inflight.skip-drain", "a ring that is stopped without a drain completes each request once, later",
       _SKIP, protocol=_TRACKS | _SKIPS)  # fmt: skip
def skip_drain(rig: Rig) -> str:
    return _suspended(rig, packed=False)


@check("inflight.packed-skip-drain", "so does a packed ring", _SKIP, features=_PACKED,
       protocol=_TRACKS | _SKIPS)  # fmt: skip
def packed_skip_drain(rig: Rig) -> str:
    return _suspended(rig, packed=True)


@check("inflight.packed-stopped", "a packed ring that was stopped has nothing in flight", _SPEC,
       features=_PACKED, protocol=_TRACKS)  # fmt: skip
def packed_stopped_has_nothing(rig: Rig) -> None:
    with rig.guest(features=FEATURES | _PACKED, queue_size=_SIZE) as guest:
        if guest.client.inflight is None:
            skip("the back-end makes no file")
        least = part_size(_SIZE, packed=True)
        expect(len(_view(guest)) >= least, f"{len(_view(guest))} bytes, {least} are needed")
        for _ in range(3):
            guest.client.wait([guest.client.submit(RequestType.GET_ID, room=20) for _ in range(9)])
        guest.client.stop_queue(0)
        version = PACKED_HEADER.unpack_from(_view(guest))[1]
        expect(version == VERSION, f"version {version}")
        start, step = PACKED_HEADER.size, PACKED_ENTRY.size
        marks = sum(bytes(_view(guest)[start : start + _SIZE * step : step]))
        expect(not marks, f"{marks} are marked")


@check("front-end.inflight-packed-nonsense", "endures in-flight regions of packed rings that make no sense",
       _SPEC, features=_PACKED, protocol=_TRACKS, hostile=True)  # fmt: skip
def packed_nonsense(rig: Rig) -> None:
    for number in range(10):
        with rig.guest(features=FEATURES | _PACKED, queue_size=_SIZE) as guest:
            if guest.client.inflight is None:
                skip("the back-end makes no file")
            guest.client.get_id()
            base = guest.client.stop_queue(0)
            view = _view(guest)
            if number % 2:
                view[:] = rig.chance.randbytes(len(view))
                PACKED_HEADER.pack_into(view, 0, 0, VERSION, _SIZE, 0, 0, 5, 5, 1, 1)
            else:
                for _ in range(20):
                    view[rig.chance.randrange(len(view))] = rig.chance.randrange(256)
            guest.client.submit(RequestType.GET_ID, room=20, notify=False)
            try:
                guest.client.start_queue(0, base)
                guest.client.stop_queue(0)
            except (PeerError, SessionError, TimeoutError):
                pass
            guest.client.abandon()
    rig.still_serves()


@check("front-end.inflight-nonsense", "endures in-flight regions that make no sense", _SPEC,
       protocol=_TRACKS, hostile=True)  # fmt: skip
def nonsense(rig: Rig) -> None:
    for _ in range(10):
        with _guest(rig) as guest:
            view = _view(guest)
            view[:] = rig.chance.randbytes(len(view))
            SPLIT_HEADER.pack_into(view, 0, 0, VERSION, rig.chance.choice([_SIZE, 65535]), 77, 5)
            _reads(rig, guest, 4, 0)
            try:
                _resume(guest)
                guest.client.stop_queue(0)
            except (PeerError, SessionError, TimeoutError):
                pass
            guest.client.abandon()
    rig.still_serves()


CHECKS: tuple[Check, ...] = tuple(row for row in collect(globals()) if not row.hostile)
HOSTILE: tuple[Check, ...] = (nonsense, packed_nonsense)
