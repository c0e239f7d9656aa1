"""Checks of coming and going: the next front-end, a second one, and those that vanish.

vhost-user, "Communication" and "Back-end program conventions"; what the text leaves open is reported.
"""

from __future__ import annotations

from vhostblk.client.client import Client
from vhostblk.client.conformance.check import Check, check, collect, expect
from vhostblk.client.conformance.rig import Rig
from vhostblk.client.control import Control
from vhostblk.errors import PeerError, SessionError
from vhostblk.virtio.blk import RequestType
from vhostblk.virtio.features import Feature

__all__ = ["CHECKS"]

_SPEC = "vhost-user, Communication"
_TIMES = 100
_SHORT = 0.2


@check("reconnect.same-data", "the next front-end reads what the one before did", _SPEC)
def same_data(rig: Rig) -> None:
    with rig.guest() as guest:
        expected = guest.read(0, rig.block)
    with rig.guest() as guest:
        expect(guest.read(0, rig.block) == expected, "other data was read")


@check("reconnect.written-data", "what was written is there for the next front-end", _SPEC,
       writes=True)  # fmt: skip
def written_data(rig: Rig) -> None:
    for _ in range(5):
        data = rig.pattern(8 * rig.block)
        with rig.guest() as guest:
            guest.write(0, data)
        with rig.guest() as guest:
            expect(guest.read(0, len(data)) == data, "other data was read")


@check("reconnect.many-times", f"{_TIMES} front-ends come and go", _SPEC)
def many_times(rig: Rig) -> None:
    with rig.guest() as guest:
        expected = guest.read(0, rig.block)
    for i in range(_TIMES):
        with rig.guest() as guest:
            expect(guest.read(0, rig.block) == expected, f"front-end {i + 1}: other data was read")


@check(
    "reconnect.other-features",
    "each front-end negotiates anew",
    "VIRTIO 1.2 §2.2.2; vhost-user, Feature negotiation",
)
def other_features(rig: Rig) -> None:
    for without in (0, Feature.VIRTIO_F_EVENT_IDX, Feature.VIRTIO_F_INDIRECT_DESC, 0):
        with rig.guest(without=without, queues=min(2, rig.offer.queues)) as guest:
            expect(guest.client.offered == rig.offer.features, "other features are offered")
            guest.client.wait(guest.identify(5))


@check("reconnect.silent", "a front-end that says nothing and leaves is no trouble", _SPEC)
def silent(rig: Rig) -> None:
    for _ in range(10):
        rig.dial().close()
    rig.still_serves()


@check(
    "reconnect.half-set-up", "a front-end that leaves half way through its set-up is none", _SPEC
)
def half_set_up(rig: Rig) -> None:
    for queues in (0, 1):
        with rig.guest(queues=queues) as guest:
            guest.client.abandon()
    control = rig.control()
    control.negotiate_protocol()
    control.close()
    rig.still_serves()


@check(
    "reconnect.vanished-in-flight",
    "a front-end that vanishes with requests in flight leaves the disk to the next one",
    _SPEC,
)
def vanished_in_flight(rig: Rig) -> None:
    for _ in range(5):
        with rig.guest(queue_size=256) as guest:
            for _ in range(64):
                guest.submit(RequestType.IN, 0, room=min(8 * rig.block, rig.span), notify=False)
            guest.driver().publish()
            guest.queue().kick()
            guest.client.abandon()
    rig.still_serves()


@check(
    "reconnect.second-at-once",
    "a second front-end, while one is served, is refused, kept waiting or served; the first goes on",
    _SPEC,
)
def second_at_once(rig: Rig) -> str:
    with rig.guest() as guest:
        expected = guest.read(0, rig.block)
        said = _second(rig)
        expect(guest.read(0, rig.block) == expected, "the first front-end read other data")
    rig.still_serves()
    return said


def _second(rig: Rig) -> str:
    try:
        control = Control(rig.path, timeout=_SHORT, strict=False)
    except (OSError, TimeoutError):
        return "refused"
    try:
        control.ask(control.frontend.get_features())
    except TimeoutError:
        return "kept waiting"
    except (SessionError, OSError):
        return "refused"
    finally:
        control.close()
    try:
        with Client.connect(rig.path, timeout=rig.timeout, strict=False) as client:
            client.get_id()
    except (PeerError, TimeoutError, OSError):
        return "heard, but not served"
    return "served"


CHECKS: tuple[Check, ...] = collect(globals())
