"""Checks of a ring's states: stopped and started again, disabled and enabled, fds exchanged.

vhost-user, "Ring states", VHOST_USER_GET_VRING_BASE, VHOST_USER_SET_VRING_CALL and _KICK.
"""

from __future__ import annotations

import itertools
import os
from contextlib import suppress

from vhostblk.client.conformance.check import Check, Level, check, collect, expect
from vhostblk.client.conformance.guest import Guest
from vhostblk.client.conformance.rig import Rig
from vhostblk.client.queue import Pending
from vhostblk.vhost.message import ProtocolFeature
from vhostblk.vhost.vring import VringFd
from vhostblk.virtio.blk import RequestType, Status
from vhostblk.virtio.features import Feature

__all__ = ["CHECKS"]

_STATES = "vhost-user, Ring states"
_BASE = "vhost-user, VHOST_USER_GET_VRING_BASE"
_ENABLE = Feature.VHOST_USER_F_PROTOCOL_FEATURES
_REPLY_ACK = ProtocolFeature.REPLY_ACK


def _reads(rig: Rig, guest: Guest, count: int, *, blocks: int = 8, queue: int = 0) -> list[Pending]:
    """Put as many reads in flight."""
    room = min(blocks * rig.block, rig.span)
    pending = [
        guest.submit(RequestType.IN, 0, room=room, queue=queue, notify=False) for _ in range(count)
    ]
    guest.driver(queue).publish()
    guest.queue(queue).kick()
    return pending


@check("state.base", "GET_VRING_BASE tells the next available index of a ring that is done", _BASE)
def base(rig: Rig) -> None:
    with rig.guest() as guest:
        for count in (0, 1, 7):
            if count:
                guest.client.wait(guest.identify(count))
            expected = guest.driver().avail_idx
            found = guest.client.stop_queue(0)
            expect(found == expected, f"{found} after {expected} requests")
            guest.client.start_queue(0, found)


@check(
    "state.restart",
    "a ring that was stopped goes on where it was",
    _BASE,
)
def restart(rig: Rig) -> None:
    with rig.guest() as guest:
        expected = guest.read(0, rig.block)
        for _ in range(20):
            guest.client.start_queue(0, guest.client.stop_queue(0))
            expect(guest.read(0, rig.block) == expected, "other data was read")


@check(
    "state.stop-in-flight",
    "stopped with requests in flight, a ring finishes what it took, and no more",
    _BASE,
)
def stop_in_flight(rig: Rig) -> str:
    with rig.guest(queue_size=256) as guest:
        taken = []
        for _ in range(10):
            before = guest.driver().used_idx
            pending = _reads(rig, guest, 64)
            stopped_at = guest.client.stop_queue(0)
            used = guest.used_idx()
            expect(
                used == stopped_at,
                f"VRING_BASE {stopped_at}, but {used - before & 0xFFFF} of"
                f" {stopped_at - before & 0xFFFF} that were taken are done",
            )
            taken.append(stopped_at - before & 0xFFFF)
            expect(not guest.is_done_soon(pending) or taken[-1] == 64, "a stopped ring went on")
            guest.client.start_queue(0, stopped_at)
            guest.queue().kick()
            guest.client.wait(pending)
            for one in pending:
                guest.expect_status(one, Status.OK)
        return f"of 64 each, taken: {min(taken)} to {max(taken)}"


@check(
    "state.stopped-takes-nothing",
    "a stopped ring takes no requests, and takes them when it is started",
    _STATES,
)
def stopped_takes_nothing(rig: Rig) -> None:
    with rig.guest() as guest:
        stopped_at = guest.client.stop_queue(0)
        pending = guest.identify(3)
        expect(not guest.is_done_soon(pending), "requests were served")
        guest.client.start_queue(0, stopped_at)
        guest.queue().kick()
        guest.finish(pending)


@check(
    "state.new-size",
    "a ring that was stopped may be started with another size",
    _STATES,
)
def new_size(rig: Rig) -> None:
    with rig.guest() as guest:
        expected = guest.read(0, rig.block)
        for size in (16, 512, 64):
            guest.client.stop_queue(0)
            guest.client.make_queues(1, size)
            guest.client.start_queue(0)
            for _ in range(2 * size // 3 if size < 100 else 20):
                expect(guest.read(0, rig.block) == expected, f"size {size}: other data was read")


@check(
    "state.disable-enable",
    "a ring that was disabled and enabled serves what came meanwhile",
    _STATES,
    features=_ENABLE,
)
def disable_enable(rig: Rig) -> None:
    with rig.guest() as guest:
        frontend = guest.control.frontend
        for _ in range(5):
            guest.ask(frontend.set_vring_enable(0, False))
            pending = guest.identify(3)
            guest.ask(frontend.set_vring_enable(0, True))
            guest.queue().kick()
            guest.finish(pending)
        guest.read(0, rig.block)


@check(
    "state.disabled-takes-nothing",
    "a disabled ring takes no requests",
    _STATES,
    features=_ENABLE,
    level=Level.SHOULD,
)
def disabled_takes_nothing(rig: Rig) -> None:
    with rig.guest() as guest:
        guest.quiet()
        guest.ask(guest.control.frontend.set_vring_enable(0, False))
        pending = guest.identify(3)
        expect(not guest.is_done_soon(pending), "requests were served")
        guest.ask(guest.control.frontend.set_vring_enable(0, True))
        guest.queue().kick()
        guest.finish(pending)


@check(
    "state.disabled-has-no-effect",
    "a write on a disabled ring does not reach the disk",
    _STATES,
    features=_ENABLE,
    queues=2,
    writes=True,
)
def disabled_has_no_effect(rig: Rig) -> str:
    with rig.guest(queues=2) as guest:
        before, data = rig.pattern(rig.block), rig.pattern(rig.block)
        guest.write(0, before)
        guest.ask(guest.control.frontend.set_vring_enable(0, False))
        pending = guest.submit(RequestType.OUT, 0, out=data)
        guest.queue().kick()
        was_done = guest.is_done_soon([pending])
        found = guest.read(0, rig.block, queue=1)
        expect(found == before, "the disk was changed")
        guest.ask(guest.control.frontend.set_vring_enable(0, True))
        guest.queue().kick()
        guest.finish([pending])
        if not was_done:
            guest.expect_status(pending, Status.OK)
            expect(guest.read(0, rig.block) == data, "enabled, the write did not happen")
        return "refused" if was_done else "kept until enabled"


@check(
    "state.other-rings-go-on",
    "while one ring is stopped or disabled the others go on",
    _STATES,
    queues=2,
)
def other_rings_go_on(rig: Rig) -> None:
    with rig.guest(queues=2) as guest:
        expected = guest.read(0, rig.block, queue=1)
        stopped_at = guest.client.stop_queue(0)
        expect(guest.read(0, rig.block, queue=1) == expected, "other data was read")
        guest.client.start_queue(0, stopped_at)
        if guest.control.features & _ENABLE:
            guest.ask(guest.control.frontend.set_vring_enable(0, False))
            expect(guest.read(0, rig.block, queue=1) == expected, "other data was read")
            guest.ask(guest.control.frontend.set_vring_enable(0, True))
        expect(guest.read(0, rig.block) == expected, "other data was read")


@check(
    "state.second-ring-alone",
    "a ring other than the first may be the only one that is started",
    _STATES,
    queues=2,
)
def second_ring_alone(rig: Rig) -> None:
    with rig.guest(queues=2) as guest:
        guest.client.stop_queue(0)
        guest.client.stop_queue(1)
        guest.client.start_queue(1)
        guest.read(0, rig.block, queue=1)


@check(
    "state.call-exchanged",
    "SET_VRING_CALL may come while requests are in flight; calls go to the new fd",
    "vhost-user, VHOST_USER_SET_VRING_CALL",
    protocol=_REPLY_ACK,
)
def call_exchanged(rig: Rig) -> None:
    with rig.guest(queue_size=256) as guest:
        for _ in range(10):
            pending = _reads(rig, guest, 32)
            old = guest.exchange(VringFd.CALL)
            try:
                # What the old one was told of is to be looked for: that is the driver's part.
                guest.wait_told(pending)
                for _ in range(2):
                    guest.wait_told(guest.identify())
                with suppress(BlockingIOError):
                    os.eventfd_read(old)
                guest.wait_told(guest.identify())
                guest.calls()
                try:
                    os.eventfd_read(old)
                except BlockingIOError:
                    pass
                else:
                    expect(False, "the old fd was called after the exchange")
            finally:
                os.close(old)


@check(
    "state.kick-exchanged",
    "SET_VRING_KICK may come while requests are in flight; the new fd is heard",
    "vhost-user, VHOST_USER_SET_VRING_KICK",
    protocol=_REPLY_ACK,
    level=Level.SHOULD,
)
def kick_exchanged(rig: Rig) -> None:
    with rig.guest(queue_size=256) as guest:
        for _ in range(10):
            pending = _reads(rig, guest, 32)
            os.close(guest.exchange(VringFd.KICK))
            pending += _reads(rig, guest, 8)
            guest.client.wait(pending)


@check(
    "state.no-call-fd",
    "a ring without a call fd is served; the driver polls",
    "vhost-user, VHOST_USER_SET_VRING_CALL",
)
def no_call_fd(rig: Rig) -> None:
    _without_fds(rig, kick=True, call=False)


@check(
    "state.no-kick-fd",
    "a ring without a kick fd is polled",
    "vhost-user, VHOST_USER_SET_VRING_KICK",
)
def no_kick_fd(rig: Rig) -> None:
    _without_fds(rig, kick=False, call=True)


@check(
    "state.no-fds",
    "a ring without kick and call fds is polled by both sides",
    "vhost-user, VHOST_USER_SET_VRING_KICK",
)
def no_fds(rig: Rig) -> None:
    _without_fds(rig, kick=False, call=False)


def _without_fds(rig: Rig, *, kick: bool, call: bool) -> None:
    with rig.guest() as guest:
        stopped_at = guest.client.stop_queue(0)
        guest.client.start_queue(0, stopped_at, kick=kick, call=call)
        for _ in range(20):
            pending = guest.identify(notify=False)
            guest.driver().publish()
            if kick:
                guest.queue().kick()
            guest.client.wait(pending)
        guest.client.start_queue(0, guest.client.stop_queue(0))
        guest.read(0, rig.block)


@check(
    "state.call-taken-away",
    "a running ring's call fd may be taken away and given back",
    "vhost-user, VHOST_USER_SET_VRING_CALL",
    protocol=_REPLY_ACK,
)
def call_taken_away(rig: Rig) -> None:
    with rig.guest() as guest:
        queue, frontend = guest.queue(), guest.control.frontend
        for fd, _ in itertools.product((None, queue.call_fd), range(2)):
            guest.ask(frontend.set_vring_fd(0, VringFd.CALL, fd))
            queue.is_polled = fd is None
            for _ in range(5):
                guest.client.wait(guest.identify())


@check(
    "state.error-fd",
    "SET_VRING_ERR is taken with a fd and without one",
    "vhost-user, VHOST_USER_SET_VRING_ERR",
    protocol=_REPLY_ACK,
)
def error_fd(rig: Rig) -> None:
    with rig.guest() as guest:
        frontend = guest.control.frontend
        for fd in (None, guest.queue().err_fd, guest.queue().err_fd):
            guest.ask(frontend.set_vring_fd(0, VringFd.ERR, fd))
        guest.read(0, rig.block)


@check(
    "state.base-of-a-ring-not-started",
    "GET_VRING_BASE of a ring that was not started gives the base that was set",
    _BASE,
    level=Level.SHOULD,
)
def base_of_a_ring_not_started(rig: Rig) -> None:
    with rig.guest(queues=0) as guest:
        frontend = guest.control.frontend
        guest.ask(frontend.set_vring_num(0, 64))
        guest.ask(frontend.set_vring_base(0, 17))
        found = guest.control.vring_base(0)
        expect(found == 17, f"{found}, not 17")


CHECKS: tuple[Check, ...] = collect(globals())
