"""Checks of the device as a whole: its status, and its state on the way to another back-end.

vhost-user, SET_STATUS, GET_STATUS, SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE. What a back-end's state says is its own
business: it is only given back to it.
"""

from __future__ import annotations

from vhostblk.client.conformance.check import Check, Level, check, collect, expect
from vhostblk.client.conformance.guest import Guest
from vhostblk.client.conformance.rig import Rig
from vhostblk.client.control import PROTOCOL_FEATURES
from vhostblk.errors import PeerError, SessionError
from vhostblk.vhost.message import ProtocolFeature

__all__ = ["CHECKS", "HOSTILE"]

_STATUS = ProtocolFeature.STATUS
_STATE = ProtocolFeature.DEVICE_STATE
_DRIVER_OK = 15
_NEEDS_RESET = 64


def _guest(rig: Rig) -> Guest:
    return rig.guest(protocol_features=PROTOCOL_FEATURES | _STATUS | _STATE)


def _stopped(rig: Rig) -> Guest:
    guest = _guest(rig)
    guest.client.stop_queue(0)
    return guest


@check("device.status", "GET_STATUS gives what SET_STATUS has said", "vhost-user, VHOST_USER_GET_STATUS",
       protocol=_STATUS)  # fmt: skip
def status(rig: Rig) -> None:
    with _guest(rig) as guest:
        for value in (1, 3, 11, _DRIVER_OK):
            guest.ask(guest.control.frontend.set_status(value))
            found = guest.control.status()
            expect(found == value, f"{found:#x} after {value:#x}")


@check("device.status-zero", "after SET_STATUS 0 the status is 0, and the device can be set up again",
       "VIRTIO 1.2 §2.1", protocol=_STATUS)  # fmt: skip
def status_zero(rig: Rig) -> None:
    with _guest(rig) as guest:
        guest.ask(guest.control.frontend.set_status(_DRIVER_OK))
        guest.client.stop_queue(0)
        guest.ask(guest.control.frontend.set_status(0))
        found = guest.control.status()
        expect(found & ~_NEEDS_RESET == 0, f"the status is {found:#x}")
        guest.control.set_features(guest.control.features)
        guest.client.make_queues(1, 64)
        guest.client.start_queue(0)
        guest.client.get_id()


@check("device.state", "a state that a device has given is taken back, and its rings go on",
       "vhost-user, Migrating back-end state", protocol=_STATE)  # fmt: skip
def state_goes_round(rig: Rig) -> str:
    with _stopped(rig) as guest:
        state = guest.control.save_device_state()
    with _stopped(rig) as guest:
        guest.control.load_device_state(state)
        guest.client.start_queue(0)
        guest.client.get_id()
    return f"{len(state)} bytes"


@check("device.state-check", "CHECK_DEVICE_STATE without a transfer is not a success",
       "vhost-user, VHOST_USER_CHECK_DEVICE_STATE", protocol=_STATE, level=Level.SHOULD)  # fmt: skip
def check_without_transfer(rig: Rig) -> None:
    with _stopped(rig) as guest:
        try:
            guest.control.check_device_state()
        except PeerError:
            return
        expect(False, "it was one")


@check("front-end.device-state-nonsense", "endures device states that make no sense",
       "vhost-user, Migrating back-end state", protocol=_STATE, hostile=True)  # fmt: skip
def nonsense(rig: Rig) -> str:
    refused = 0
    for size in (0, 1, 16, 28, 4096, 1 << 20):
        with _stopped(rig) as guest:
            try:
                guest.control.load_device_state(rig.chance.randbytes(size))
            except (PeerError, SessionError):
                refused += 1
            guest.client.abandon()
    rig.still_serves()
    return f"{refused} of 6 were refused"


CHECKS: tuple[Check, ...] = tuple(row for row in collect(globals()) if not row.hostile)
HOSTILE: tuple[Check, ...] = (nonsense,)
